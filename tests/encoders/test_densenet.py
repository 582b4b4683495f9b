"""DenseNet against a straight-line computation on published names, and against MONAI's model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import DenseNet
from torch import Tensor
from torch.nn import functional as F

from medm.encoders.densenet import DenseNetEncoder
from medm.models.vision import build_encoder, encoder_options

TINY: dict[str, Any] = {
    "init_features": 8, "growth_rate": 4, "block_config": [2, 1, 2], "bn_size": 2,
}  # fmt: skip


def monai() -> Any:
    """MONAI's model with statistics that are not the initial ones."""
    torch.manual_seed(0)
    model = DenseNet(spatial_dims=2, in_channels=3, out_channels=5, **TINY).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.2)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


def torch_names(state: dict[str, Tensor], *, old: bool) -> dict[str, Tensor]:
    """The names of torch's published files: `norm1`, and `norm.1` without counts in those of 2017."""
    found = {}
    for name, tensor in state.items():
        name = name.replace(".layers.", ".").replace("class_layers.out", "classifier")
        if old and "denselayer" in name:
            name = re.sub(r"\.(norm|conv)([12])\.", r".\1.\2.", name)
        if not (old and name.endswith("num_batches_tracked")):
            found[name] = tensor
    return found


def straight_line(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """The last map, with torch functions alone."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"features.{name}.{kind}"].view(1, -1, 1, 1)
            for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 1e-5).sqrt() * weight + bias).clamp(min=0)

    def conv(x: Tensor, name: str, **options: int) -> Tensor:
        return F.conv2d(x, state[f"features.{name}.weight"], **options)

    x = norm(conv(pixels, "conv0", stride=2, padding=3), "norm0")
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for block, layers in ((1, 2), (2, 1), (3, 2)):
        for layer in range(1, layers + 1):
            name = f"denseblock{block}.denselayer{layer}"
            new = conv(norm(x, f"{name}.norm1"), f"{name}.conv1")
            new = conv(norm(new, f"{name}.norm2"), f"{name}.conv2", padding=1)
            x = torch.cat([x, new], dim=1)
        if block < 3:
            name = f"transition{block}"
            x = F.avg_pool2d(conv(norm(x, f"{name}.norm"), f"{name}.conv"), 2, 2)
    return norm(x, "norm5")


@pytest.mark.parametrize("statistics", ["running", "batch"])
@pytest.mark.parametrize("layout", ["torch", "torch 2017", "monai", "chexnet"])
def test_published_layouts_give_the_published_map(
    layout: str, statistics: str, tmp_path: Path
) -> None:
    model = monai()
    names = torch_names(model.state_dict(), old=False)
    state = names if layout == "torch" else torch_names(model.state_dict(), old=True)
    if layout == "monai":
        state = model.state_dict()
    if layout == "chexnet":
        state = {"state_dict": {f"module.densenet121.{name}": t for name, t in state.items()}}
    torch.save(state, tmp_path / "densenet.pth")
    block = {
        "name": "densenet", "path": str(tmp_path / "densenet.pth"), "architecture": TINY,
        "statistics": statistics,
    }  # fmt: skip
    encoder, _ = build_encoder(encoder_options(block, source="test"))
    pixels = torch.randn(2, 3, 70, 99)
    expected = straight_line(names, pixels)
    with torch.no_grad():
        features = encoder(pixels)
        published = F.relu(model.features(pixels))
    assert features.grid == tuple(expected.shape[2:])
    torch.testing.assert_close(features.tokens, expected.flatten(2).mT, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(expected, published, atol=1e-5, rtol=1e-5)
    assert features.pooled is not None
    torch.testing.assert_close(features.pooled, expected.mean(dim=(2, 3)), atol=1e-5, rtol=1e-5)


def test_size_of_the_published_network() -> None:
    with torch.device("meta"):
        encoder = DenseNetEncoder(architecture={})
    # DenseNet-121 without its classifier of 1024 x 1000 + 1000.
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 7_978_856 - 1_025_000
    assert encoder.grid((224, 224)) == (7, 7)
    assert encoder.dim == 1024


@pytest.mark.parametrize("side", [13, 14, 15, 16, 17, 31, 33])
def test_the_grid_is_that_of_the_map(side: int) -> None:
    encoder = DenseNetEncoder(architecture=TINY).eval()
    features = encoder(torch.randn(1, 3, side, 40))
    cells = encoder.last_map(torch.randn(1, 3, side, 40))
    assert features.grid == tuple(cells.shape[2:])


def test_an_image_without_a_cell_is_refused() -> None:
    encoder = DenseNetEncoder(architecture=TINY)
    with pytest.raises(ValueError, match="at least 13 x 13 pixels"):
        encoder.grid((12, 40))


def test_statistics_are_kept_in_training() -> None:
    encoder = DenseNetEncoder(architecture=TINY).train()
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    encoder(torch.randn(2, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in encoder.named_buffers())
