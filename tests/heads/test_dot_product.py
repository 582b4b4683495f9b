"""Dot-product head: its formula, its grid, what a batch may not change, and that it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medm.errors import RecipeError
from medm.heads import FeatureNetwork
from medm.heads.base import MaskHead, Points
from medm.heads.dot_product import DotProductHead
from medm.heads.similarity import ItemGroups, expected_iou
from medm.imaging import preprocess_from_dict
from medm.objectives.segmentation import Segmentation

TINY: dict[FeatureNetwork, dict[str, Any]] = {
    "unet": {"channels": [4, 8], "strides": [2]},
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
    "swin-unetr": {"feature_size": 12, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 2},
}
CASES = [
    pytest.param("unet", 2, (12, 8), id="unet-2d"),
    pytest.param("unet", 3, (4, 8, 6), id="unet-3d"),
    pytest.param("segresnet", 2, (12, 8), id="segresnet-2d"),
    pytest.param("segresnet", 3, (4, 8, 6), id="segresnet-3d"),
    pytest.param("swin-unetr", 2, (64, 32), id="swin-unetr-2d"),
    pytest.param("swin-unetr", 3, (32, 32, 64), id="swin-unetr-3d"),
]


def tiny(network: FeatureNetwork = "unet", axes: int = 2, **sizes: Any) -> DotProductHead:
    torch.manual_seed(0)
    own = {"axes": axes, "dim": 6, "features": 5, **TINY[network], **sizes}
    return DotProductHead(architecture=own, network=network)


@pytest.mark.parametrize(("network", "axes", "spatial"), CASES)
def test_a_batch_of_mixed_counts_equals_one_by_one(
    network: FeatureNetwork, axes: int, spatial: tuple[int, ...]
) -> None:
    """Items 0, 1, 2 have 1, 0 and 2 masks, out of order; in training mode, too."""
    head = tiny(network, axes).train()
    pixels, prompts = torch.randn(3, 1, *spatial), torch.randn(3, 6)
    items = torch.tensor([2, 0, 2])
    together = head(pixels, prompts, items)
    assert together.logits.shape == (3, *spatial) == (3, *head.grid(spatial))
    assert together.quality.shape == together.presence.shape == (3,)
    for mask, item in enumerate(items.tolist()):
        alone = head(pixels[item : item + 1], prompts[mask : mask + 1], torch.tensor([0]))
        for whole, own in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[mask], own[0], rtol=1e-4, atol=1e-5)


def test_the_logits_by_hand() -> None:
    head = tiny()
    decoder = head.decoder
    features, prompts = torch.randn(2, 5, 3, 4), torch.randn(3, 6)
    items = torch.tensor([1, 0, 1])
    found = head.decode((features,), prompts, items)
    kernels, bias = decoder.kernel(prompts), decoder.bias(prompts)
    expected = torch.einsum("mf,mfhw->mhw", kernels, features[items]) / 5**0.5
    torch.testing.assert_close(found.logits, expected + bias[:, :, None])
    weights = found.logits.flatten(1).softmax(1)
    seen = torch.einsum("mv,mfv->mf", weights, features[items].flatten(2))
    presence = decoder.presence(torch.cat([prompts, seen], 1))[:, 0]
    torch.testing.assert_close(found.presence, presence)
    torch.testing.assert_close(found.quality, expected_iou(found.logits))


def test_expected_iou_by_hand() -> None:
    """Sigmoids 3/4, 3/4, 1/4, 1/4: overlap 1.5, union 2 + 0.5; an empty mask has none."""
    logit = torch.tensor(3.0).log()
    logits = torch.stack([logit, logit, -logit, -logit]).reshape(1, 2, 2)
    found = expected_iou(torch.cat([logits, -logits.abs(), torch.full_like(logits, 50.0)]))
    assert found.tolist() == pytest.approx([0.6, 0.0, 1.0])
    assert expected_iou(torch.full((1, 2, 2), -1e4)).tolist() == [0.0]


def test_groups_keep_the_order_of_the_masks() -> None:
    items, rows = torch.tensor([2, 0, 2, 3, 0]), torch.arange(5.0)
    groups = ItemGroups(items, 5)
    parts = groups.split(rows)
    assert [part.tolist() for part in parts] == [[1, 4], [], [0, 2], [3], []]
    assert torch.equal(groups.join(parts), rows)


@pytest.mark.parametrize(
    ("axes", "stride", "spatial", "grid"),
    [
        (2, 1, (12, 8), (12, 8)),
        (2, 2, (12, 8), (6, 4)),
        (2, [1, 3], (4, 12), (4, 4)),
        (3, [1, 2, 2], (6, 8, 12), (6, 4, 6)),
    ],
)
def test_masks_may_be_coarser_than_the_input(
    axes: int, stride: int | list[int], spatial: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    head = tiny(axes=axes, stride=stride)
    assert head.grid(spatial) == grid
    out = head(torch.randn(1, 1, *spatial), torch.randn(1, 6), torch.tensor([0]))
    assert out.logits.shape == (1, *grid)


def test_every_weight_learns_and_the_prompt_has_a_gradient() -> None:
    head = tiny(stride=2)
    prompts = torch.randn(2, 6, requires_grad=True)
    out = head(torch.randn(1, 1, 16, 16), prompts, torch.tensor([0, 0]))
    (out.logits.pow(2).sum() + out.presence.sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in head.decoder.parameters())
    # The bias in front of an instance norm has no effect.
    weights = [p.grad for p in head.encoder.parameters() if p.dim() > 1]
    assert all(grad is not None and grad.any() for grad in weights)
    assert prompts.grad is not None and prompts.grad.any(dim=1).all()


def test_a_frozen_encoder_lets_the_prompt_and_the_decoder_learn() -> None:
    head = tiny()
    head.encoder.requires_grad_(False)
    prompts = torch.randn(1, 6, requires_grad=True)
    out = head(torch.randn(1, 1, 8, 8), prompts, torch.tensor([0]))
    out.logits.sum().backward()
    assert prompts.grad is not None and prompts.grad.any()
    assert head.decoder.kernel.weight.grad is not None
    assert all(p.grad is None for p in head.encoder.parameters())


def boxes(axes: int, side: int) -> tuple[Tensor, Tensor]:
    """An image with a bright and a dark box, and the masks of both and of a target that is not
    there."""
    torch.manual_seed(1)
    pixels = 0.1 * torch.randn(1, 1, *[side] * axes)
    targets = torch.zeros(3, *[side] * axes, dtype=torch.uint8)
    for index, (start, value) in enumerate([(1, 1.0), (side // 2 + 1, -1.0)]):
        box = (slice(start, start + side // 3),) * axes
        pixels[0, 0][box] += value
        targets[index][box] = 1
    return pixels, targets


@pytest.mark.parametrize(("axes", "side"), [(2, 32), (3, 12)])
def test_two_prompts_learn_their_masks_and_a_third_that_there_is_none(axes: int, side: int) -> None:
    pixels, targets = boxes(axes, side)
    head = tiny(axes=axes, features=8, channels=[8, 16]).train()
    prompts, items = torch.eye(3, 6), torch.zeros(3, dtype=torch.int64)
    objective = Segmentation(points=None, presence=1.0)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(60):
        out = head(pixels, prompts, items)
        output = {"mask_logits": out.logits, "mask_presence": out.presence}
        optimizer.zero_grad()
        objective.loss(output, {"mask_targets": targets}).backward()
        optimizer.step()
    with torch.no_grad():
        out = head.eval()(pixels, prompts, items)
    found = out.logits > 0
    overlap = (found & (targets > 0)).flatten(1).sum(1)
    dice = 2 * overlap / (found.flatten(1).sum(1) + targets.flatten(1).sum(1)).clamp(min=1)
    assert (dice[:2] > 0.9).all(), dice
    assert not found[2].any()
    assert (out.presence > 0).tolist() == [True, True, False]
    assert (out.quality[:2] > 0.6).all(), out.quality
    assert out.quality[2] == 0


def test_a_finer_target_is_learned_from_a_coarser_grid() -> None:
    pixels, targets = boxes(2, 32)
    head = tiny(stride=2)
    out = head(pixels, torch.eye(3, 6), torch.zeros(3, dtype=torch.int64))
    assert out.logits.shape == (3, 16, 16)
    output = {"mask_logits": out.logits, "mask_presence": out.presence}
    loss = Segmentation(points=None).loss(output, {"mask_targets": targets})
    resized = F.interpolate(out.logits[:, None], (32, 32), mode="bilinear")[:, 0]
    expected = Segmentation(points=None).mask_losses(resized, targets.float()).sum()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("size", [None, 16])
def test_the_preprocessing_fits_the_head(axes: int, size: int | None) -> None:
    kind = "volume" if axes == 3 else "image"
    sizes = DotProductHead.architecture_for(kind, {})
    assert sizes == {"axes": axes}
    preprocess = preprocess_from_dict(
        {"kind": kind, **DotProductHead.preprocess_from({}, sizes, size)}
    )
    assert preprocess.size is not None
    head = tiny(axes=axes)
    assert head.grid(tuple(preprocess.size)) == tuple(preprocess.size)
    assert head.channels == (1,)
    color = preprocess_from_dict(
        {"kind": kind, **DotProductHead.preprocess_from({}, {**sizes, "in_channels": 3})}
    )
    assert (color.channels, preprocess.channels) == (3, 1 if axes == 2 else None)


@pytest.mark.parametrize(
    ("spatial", "reason"),
    [
        ((8, 8, 8), r"size of 2 axes, found \[8, 8, 8\]"),
        ((10, 12), r"multiples of \[4, 4\], found \[10, 12\]"),
        ((4, 4), r"to a single voxel"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(spatial: tuple[int, ...], reason: str) -> None:
    head = tiny(channels=[4, 4, 8], strides=[2, 2])
    with pytest.raises(ValueError, match=reason):
        head.grid(spatial)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"filters": 3}, "unknown key 'filters'"),
        ({"axes": 1}, "axes: expected 2 or 3"),
        ({"stride": [1, 1, 1]}, r"stride: expected .* 2 of them, found \[1, 1, 1\]"),
        ({"stride": 0}, "stride: expected a number of at least 1"),
        ({"channels": [4, 8, 8], "strides": [2]}, "MONAI's UNet refuses the sizes"),
    ],
)
def test_sizes_of_the_network_are_checked(sizes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        DotProductHead(architecture=sizes)


def test_axes_that_contradict_the_kind_of_file_are_refused() -> None:
    with pytest.raises(RecipeError, match="kind volume has 3 axes, found 2; leave it out"):
        DotProductHead.architecture_for("volume", {"axes": 2})
    assert MaskHead.architecture_for("volume", {"width": 3}) == {"width": 3}


def test_points_are_refused() -> None:
    head = tiny()
    points = Points(torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="takes no points"):
        head(torch.randn(1, 1, 8, 8), torch.randn(1, 6), torch.tensor([0]), points)


def test_bf16_weights_stay_close_to_fp32() -> None:
    """Counts of voxels beyond 256 are not numbers of bf16: sums of the quality are in fp32."""
    head = tiny(axes=3).eval()
    pixels, prompts, items = torch.randn(1, 1, 8, 16, 16), torch.randn(2, 6), torch.zeros(2).long()
    with torch.no_grad():
        expected = head(pixels, prompts, items)
        found = head.bfloat16()(pixels.bfloat16(), prompts.bfloat16(), items)
    for half, full in zip(found, expected, strict=True):
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.05)
