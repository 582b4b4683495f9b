"""ResNet against transformers' model, in both published layouts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification

from medm.encoders.resnet import ResNetEncoder
from medm.errors import CheckpointError, RecipeError
from medm.imaging import preprocess_from_dict
from medm.models.vision import build_encoder, encoder_options

SIZES: dict[str, dict[str, Any]] = {
    "bottleneck": {"embedding_size": 8, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 2, 1, 2]},
    "basic": {
        "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [2, 1, 1, 1],
        "layer_type": "basic",
    },
    "downsampled": {
        "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1],
        "downsample_in_first_stage": True, "downsample_in_bottleneck": True,
    },
}  # fmt: skip


def published(kind: str) -> ResNetForImageClassification:
    """A classifier with statistics that are not the initial ones."""
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(**SIZES[kind], num_labels=3)).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.2)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


def torch_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of torch's own ResNets."""
    found = {}
    for name, tensor in state.items():
        name = name.removeprefix("resnet.").replace("embedder.embedder.convolution", "conv1")
        name = name.replace("embedder.embedder.normalization", "bn1").replace("classifier.1", "fc")
        parts = {"convolution": "conv", "normalization": "bn"}
        if match := re.match(r"encoder\.stages\.(\d)\.layers\.(\d+)\.(.+)", name):
            place = f"layer{int(match[1]) + 1}.{match[2]}"
            if short := re.match(r"shortcut\.(\w+)\.(.+)", match[3]):
                name = f"{place}.downsample.{list(parts).index(short[1])}.{short[2]}"
            elif layer := re.match(r"layer\.(\d)\.(\w+)\.(.+)", match[3]):
                name = f"{place}.{parts[layer[2]]}{int(layer[1]) + 1}.{layer[3]}"
        found[name] = tensor
    return found


@pytest.mark.parametrize("statistics", ["running", "batch"])
@pytest.mark.parametrize("kind", SIZES)
def test_a_published_folder_gives_the_map_of_transformers(
    kind: str, statistics: str, tmp_path: Path
) -> None:
    model = published(kind)
    model.save_pretrained(tmp_path)
    block = {"name": "resnet", "path": str(tmp_path), "statistics": statistics}
    encoder, _ = build_encoder(encoder_options(block, source="test"))
    pixels = torch.randn(2, 3, 70, 97)
    with torch.no_grad():
        expected = model.resnet(pixels)
        features = encoder(pixels)
    assert features.grid == tuple(expected.last_hidden_state.shape[2:])
    tokens = expected.last_hidden_state.flatten(2).mT
    torch.testing.assert_close(features.tokens, tokens, atol=1e-5, rtol=1e-5)
    assert features.pooled is not None
    pooled = expected.pooler_output.flatten(1)
    torch.testing.assert_close(features.pooled, pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
def test_a_state_dict_of_torch_gives_the_same(kind: str, tmp_path: Path) -> None:
    model = published(kind)
    state = torch_names(model.state_dict())
    assert {"conv1.weight", "bn1.running_var", "layer2.0.downsample.1.bias", "fc.bias"} <= {*state}
    # Files of old releases of torch have no counts of batches.
    state = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "resnet.pth")
    block = {"name": "resnet", "path": str(tmp_path / "resnet.pth"), "architecture": SIZES[kind]}
    encoder, _ = build_encoder(encoder_options(block, source="test"))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.resnet(pixels).last_hidden_state.flatten(2).mT
        torch.testing.assert_close(encoder(pixels).tokens, expected, atol=1e-5, rtol=1e-5)
    wrong = {**block, "architecture": SIZES[kind] | {"depths": [2, 2, 1, 2]}}
    with pytest.raises(CheckpointError, match="missing"):
        build_encoder(encoder_options(wrong, source="test"))


def test_size_and_statistics() -> None:
    with torch.device("meta"):
        encoder = ResNetEncoder(architecture={"depths": [3, 4, 23, 3]})
    # ResNet-101 without its classifier of 2048 x 1000 + 1000.
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 44_549_160 - 2_049_000
    assert encoder.grid((224, 224)) == (7, 7)
    assert encoder.dim == 2048
    small = ResNetEncoder(architecture=SIZES["basic"]).train()
    before = {name: value.clone() for name, value in small.named_buffers()}
    small(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(value, before[name]) for name, value in small.named_buffers())
    moving = ResNetEncoder(architecture=SIZES["basic"], statistics="batch").train()
    moving(torch.randn(2, 3, 64, 64))
    assert int(moving.tower.embedder.embedder.normalization.num_batches_tracked) == 1


def test_preprocessing_is_that_of_the_folder() -> None:
    # microsoft/resnet-50: the shorter side to the size, then a crop.
    file = {
        "size": 224, "resample": 3, "crop_pct": 0.875, "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    fields = ResNetEncoder.preprocess_from(file, {})
    preprocess = preprocess_from_dict({"kind": "image", **fields})
    assert (preprocess.size, fields["fit"]) == ([224, 224], "crop")
    assert (fields["interpolation"], fields["mean"]) == ("bicubic", [0.485, 0.456, 0.406])
    assert ResNetEncoder.preprocess_from({}, {"num_channels": 1}, 320)["mean"] == [0.5]
    square = {"size": {"height": 384, "width": 384}}
    assert ResNetEncoder.preprocess_from(square, {})["fit"] == "squash"


def test_another_model_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="folders of type 'resnet', found 'vit'"):
        ResNetEncoder.architecture_from({"model_type": "vit"})
