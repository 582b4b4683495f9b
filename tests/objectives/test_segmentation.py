"""Mask loss: values worked out by hand, parity with transformers and MONAI, and how it adds up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.mask2former import modeling_mask2former as mask2former

from medm.config import validate
from medm.errors import RecipeError
from medm.objectives import SegmentationOptions, TermsOptions
from medm.objectives.segmentation import Segmentation, sample
from medm.objectives.terms import Terms, terms_of
from medm.types import Batch

GRIDS = ((12, 10), (6, 8, 5))


def output(logits: Tensor, presence: Tensor | None = None, **more: Tensor) -> dict[str, Tensor]:
    return {
        "mask_logits": logits,
        "mask_presence": logits.new_zeros(len(logits)) if presence is None else presence,
        **more,
    }


def batch(targets: Tensor) -> Batch:
    return {"mask_targets": targets.to(torch.uint8), "labels": torch.zeros(1, 3).long()}


def random_masks(count: int, grid: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and boxes as targets; the second mask is empty."""
    torch.manual_seed(seed)
    logits, targets = torch.randn(count, *grid), torch.zeros(count, *grid)
    for index in range(count):
        box = tuple(slice(index % 3 + 1, index % 3 + 1 + size // 2) for size in grid)
        targets[index][box] = index != 1
    return logits, targets


def test_the_whole_grid_by_hand() -> None:
    """Logits 0 and ln 3 are probabilities 1/2 and 3/4; targets 0, 1, 0, 1."""
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, math.log(3)]]])
    targets = torch.tensor([[[0, 1], [0, 1]]])
    bce = (2 * math.log(2) + 2 * math.log(4 / 3)) / 4
    dice = 1 - (2 * 1.5 + 1) / (2.5 + 2 + 1)
    only = {
        "bce": Segmentation(bce=1.0, dice=0.0, points=None),
        "dice": Segmentation(bce=0.0, dice=1.0, points=None),
        "both": Segmentation(points=None),
    }
    found = {k: o.loss(output(logits), batch(targets)).item() for k, o in only.items()}
    assert found == pytest.approx({"bce": bce, "dice": dice, "both": 2 * bce + 0.5 * dice})


def test_presence_and_quality_by_hand() -> None:
    """Presence logits 0 and ln 3 of a target that is there and one that is not; IoU 1/3 and 0."""
    logits = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]]])
    targets = torch.tensor([[[0, 1], [0, 1]], [[0, 0], [0, 0]]])
    given = output(logits, torch.tensor([0.0, math.log(3)]), mask_quality=torch.tensor([0.5, 0.5]))
    options: dict[str, Any] = {"bce": 0.0, "dice": 0.0, "points": None}
    presence = Segmentation(presence=1.0, **options).loss(given, batch(targets))
    assert presence.item() == pytest.approx(math.log(2) + math.log(4))
    quality = Segmentation(quality=1.0, **options)
    assert quality.reads == {"mask_logits", "mask_presence", "mask_quality"}
    assert quality.loss(given, batch(targets)).item() == pytest.approx((1 / 6) ** 2 + 0.25)
    given["mask_logits"] = -logits.abs()
    # The second mask is empty, as its target: the best prediction there is.
    assert quality.loss(given, batch(targets)).item() == pytest.approx(0.25 + 0.25)


def test_an_absent_target_teaches_its_presence_alone_where_asked() -> None:
    logits, targets = random_masks(2, (4, 4))
    presence = torch.tensor([1.0, 2.0])
    options: dict[str, Any] = {"presence": 0.3, "points": None}
    learn = Segmentation(**options)
    only = Segmentation(absent="presence-only", **options)
    entropies = F.binary_cross_entropy_with_logits(presence, torch.tensor([1.0, 0.0]))
    masks = learn.mask_losses(logits, targets)
    given = output(logits, presence)
    torch.testing.assert_close(learn.loss(given, batch(targets)), masks.sum() + 0.6 * entropies)
    torch.testing.assert_close(only.loss(given, batch(targets)), masks[0] + 0.6 * entropies)
    assert only.count(batch(targets)) == 2


@pytest.mark.parametrize("grid", GRIDS)
def test_the_whole_grid_equals_the_definition(grid: tuple[int, ...]) -> None:
    logits, targets = random_masks(3, grid)
    expected = torch.zeros(())
    for values, wanted in zip(logits, targets, strict=True):
        p = values.sigmoid()
        bce = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean()
        dice = 1 - (2 * (p * wanted).sum() + 1) / (p.sum() + wanted.sum() + 1)
        expected = expected + 2.0 * bce + 0.5 * dice
    found = Segmentation(points=None).loss(output(logits), batch(targets))
    torch.testing.assert_close(found, expected)


def drawn(objective: Segmentation, seeds: Tensor, axes: int = 2) -> tuple[Tensor, Tensor]:
    """The candidates and the uniform points of each mask."""
    assert objective.points is not None
    candidates = objective.points * objective.oversample
    uniform = objective.points - int(objective.points * objective.important)
    every = [
        torch.rand(candidates + uniform, axes, generator=torch.Generator().manual_seed(seed))
        for seed in seeds.tolist()
    ]
    return torch.stack(every).split([candidates, uniform], dim=1)  # type: ignore[return-value]


def test_points_and_losses_equal_those_of_mask2former(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same candidates give the same points, and the same points the same losses."""
    logits, targets = random_masks(3, (12, 10))
    objective, seeds = Segmentation(points=64), torch.tensor([3, 1, 4])
    draws = [part.contiguous() for part in drawn(objective, seeds)]
    coords = objective.sample_points(logits, seeds)
    at = {"align_corners": False, "padding_mode": "border"}
    reference = mask2former.sample_point
    with monkeypatch.context() as patched:
        # transformers takes values beyond the outer voxel centers as half of a 0.
        patched.setattr(mask2former, "sample_point", lambda *a, **k: reference(*a, **{**k, **at}))
        patched.setattr(torch, "rand", lambda *_, **__: draws.pop(0))
        expected = mask2former.Mask2FormerLoss.sample_points_using_uncertainty(
            None, logits[:, None], lambda values: -values.abs(), 64, 3, 0.75
        )
    torch.testing.assert_close(coords, expected)
    point_logits = reference(logits[:, None], coords, **at).squeeze(1)
    labels = reference(targets[:, None], coords, **at).squeeze(1)
    bce = mask2former.sigmoid_cross_entropy_loss(point_logits, labels, 1)
    dice = mask2former.dice_loss(point_logits, labels, 1)
    monkeypatch.setattr("medm.objectives.segmentation._seeds", lambda count: seeds)
    found = objective.loss(output(logits), batch(targets))
    torch.testing.assert_close(found, 2.0 * bce + 0.5 * dice)


def test_the_whole_grid_equals_the_published_form_of_monai() -> None:
    from monai.losses import DiceCELoss

    logits, targets = random_masks(1, (6, 8, 5))
    reference = DiceCELoss(
        sigmoid=True, smooth_nr=1.0, smooth_dr=1.0, lambda_dice=0.5, lambda_ce=2.0
    )
    found = Segmentation(points=None).loss(output(logits), batch(targets))
    torch.testing.assert_close(found, reference(logits[None], targets[None]))


@pytest.mark.parametrize("grid", GRIDS)
def test_points_lie_where_the_logits_are_uncertain(grid: tuple[int, ...]) -> None:
    """One band along the last axis has logits near 0: x is the first coordinate."""
    logits = torch.full((2, *grid), 9.0)
    logits[..., :2] = 0.1
    objective = Segmentation(points=40, important=0.5, oversample=10)
    coords = objective.sample_points(logits, torch.tensor([0, 1]))
    border = 2 / grid[-1]
    assert (coords[:, :20, 0] < border).all()
    assert (coords[:, 20:, 0] > border).any()
    assert coords.shape == (2, 40, len(grid))
    assert not torch.equal(coords[0], coords[1])


@pytest.mark.parametrize("grid", GRIDS)
def test_points_read_the_voxel_that_they_lie_in(grid: tuple[int, ...]) -> None:
    """A voxel's center has its value, and the outer half voxel continues it to the face."""
    values = torch.arange(math.prod(grid), dtype=torch.float32).reshape(1, *grid)
    index = (2, *(size - 1 for size in grid[1:]))
    center = [(place + 0.5) / size for place, size in zip(index, grid, strict=True)]
    coords = torch.tensor([[center[::-1], [0.0] * len(grid), [1.0] * len(grid)]])
    expected = [values[0][index].item(), 0.0, values.max().item()]
    assert sample(values, coords)[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_many_points_come_near_the_whole_grid() -> None:
    logits, targets = random_masks(4, (16, 16))
    smooth = F.interpolate(logits[:, None], (128, 128), mode="bilinear").squeeze(1)
    boxes = F.interpolate(targets[:, None], (128, 128)).squeeze(1)
    dense = Segmentation(points=None).mask_losses(smooth, boxes)
    # Uniform points only: uncertain ones change the mean on purpose.
    found = Segmentation(points=40_000, important=0.0, oversample=1).mask_losses(smooth, boxes)
    torch.testing.assert_close(found, dense, rtol=0.02, atol=0)


@pytest.mark.parametrize("points", [None, 200])
@pytest.mark.parametrize("grid", GRIDS)
def test_micro_batches_add_up_to_the_step(grid: tuple[int, ...], points: int | None) -> None:
    """The same random state, the same points: in one batch or in three of 1, 0 and 3 masks."""
    logits, targets = random_masks(4, grid)
    objective = Segmentation(points=points, presence=0.1)
    terms = Terms.of(objective)

    def run(parts: list[slice]) -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        values = logits.clone().requires_grad_()
        presence = torch.linspace(-1, 1, 4).requires_grad_()
        total = torch.zeros(())
        for part in parts:
            given: Batch = batch(targets[part]) if len(targets[part]) else {"labels": torch.ones(1)}
            model = Given(output(values[part], presence[part]))
            loss = terms(model, given, torch.tensor([4])).total
            loss.backward()
            total = total + loss.detach()
        assert values.grad is not None
        return total, values.grad

    whole, parts = run([slice(0, 4)]), run([slice(0, 1), slice(1, 1), slice(1, 4)])
    torch.testing.assert_close(whole, parts)


class Given(nn.Module):
    """Returns an output, whatever the batch."""

    def __init__(self, given: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.given = given

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        return dict(self.given)


def test_evaluation_depends_on_the_masks_alone_and_draws_nothing() -> None:
    logits, targets = random_masks(3, (12, 10))
    objective = Segmentation(points=50)
    state = torch.get_rng_state()
    with torch.no_grad():
        whole = objective.loss(output(logits), batch(targets))
        parts = [
            objective.loss(output(logits[part]), batch(targets[part]))
            for part in (slice(2, 3), slice(0, 2))
        ]
    torch.testing.assert_close(whole, sum(parts, torch.zeros(())))
    assert torch.equal(torch.get_rng_state(), state)


def test_training_draws_new_points_each_step_and_the_same_after_a_resume() -> None:
    logits, targets = random_masks(3, (12, 10))
    objective = Segmentation(points=50)
    given = output(logits.requires_grad_())
    state = torch.get_rng_state()
    first, second = (objective.loss(given, batch(targets)) for _ in range(2))
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    resumed = [objective.loss(given, batch(targets)) for _ in range(2)]
    assert torch.equal(torch.stack(resumed), torch.stack([first, second]))


@pytest.mark.parametrize("points", [None, 500])
def test_targets_may_be_on_a_finer_grid_than_the_logits(points: int | None) -> None:
    """The logits are interpolated between the same faces, so a fitting mask stays the best."""
    _, coarse = random_masks(3, (6, 5))
    fine = F.interpolate(coarse[:, None], (24, 20)).squeeze(1)
    objective = Segmentation(points=points, quality=1.0)
    with torch.no_grad():
        right = objective.mask_losses(20 * coarse - 10, fine)
        shifted = objective.mask_losses((20 * coarse - 10).roll(1, -1), fine)
    assert (right[[0, 2]] < shifted[[0, 2]] / 3).all()
    if points is None:
        resized = F.interpolate(coarse[:, None], (24, 20), mode="bilinear").squeeze(1)
        expected = objective.mask_losses(20 * resized - 10, fine)
        torch.testing.assert_close(right, expected)


@pytest.mark.parametrize("points", [None, 100])
def test_arithmetic_is_in_fp32_below_mixed_precision(points: int | None) -> None:
    logits, targets = random_masks(2, (12, 10))
    half = logits.bfloat16()
    objective = Segmentation(points=points, presence=0.5, quality=0.5)
    quality = torch.rand(2).bfloat16()
    given = output(half, torch.ones(2).bfloat16(), mask_quality=quality)
    full = {name: value.float() for name, value in given.items()}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective.loss(given, batch(targets))
    with torch.no_grad():
        expected = objective.loss(full, batch(targets))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_batch_without_masks_is_zero_and_reaches_every_output() -> None:
    """Ranks without masks call backward too, through all that the head gives."""
    outputs = {
        name: torch.zeros(shape, requires_grad=True)
        for name, shape in (
            ("mask_logits", (0, 4, 4)),
            ("mask_presence", (0,)),
            ("mask_quality", (0,)),
        )
    }
    objective = Segmentation(presence=1.0)
    nothing: Batch = {"labels": torch.zeros(1, 2).long()}
    assert objective.count(nothing) == 0
    loss = objective.loss(outputs, nothing)
    loss.backward()
    assert loss.item() == 0
    assert all(value.grad is not None for value in outputs.values())


def test_outputs_without_a_weight_have_a_gradient_of_zero() -> None:
    logits, targets = random_masks(2, (4, 4))
    presence, quality = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    given = output(logits.requires_grad_(), presence, mask_quality=quality)
    Segmentation(points=20).loss(given, batch(targets)).backward()
    assert presence.grad is not None and not presence.grad.any()
    assert quality.grad is not None and not quality.grad.any()
    assert logits.grad is not None and logits.grad.any()


@pytest.mark.parametrize("points", [None, 60])
def test_the_gradient_leads_to_the_mask(points: int | None) -> None:
    torch.manual_seed(0)
    _, targets = random_masks(3, (8, 8))
    logits = torch.randn(3, 8, 8, requires_grad=True)
    presence = torch.zeros(3, requires_grad=True)
    objective = Segmentation(points=points, presence=1.0)
    optimizer = torch.optim.Adam([logits, presence], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        objective.loss(output(logits, presence), batch(targets)).backward()
        optimizer.step()
    assert torch.equal(logits > 0, targets > 0.5)
    assert (presence > 0).tolist() == [True, False, True]


def test_masks_and_words_are_terms_of_one_run_each_with_its_own_count() -> None:
    """Two labeled tokens and three masks; the step has five masks and four tokens."""
    logits, targets = random_masks(3, (4, 4))
    section = {
        "terms": {
            "language": {"objective": "language-modeling"},
            "masks": {"objective": {"name": "segmentation", "points": None}, "weight": 0.5},
        }
    }
    terms = terms_of(validate(TermsOptions, section, source="recipe"))
    given: Batch = {**batch(targets), "labels": torch.tensor([[-100, 5, 6]])}
    assert terms.counts(given).tolist() == [2, 3]
    assert terms.counts({"labels": torch.tensor([[-100, 5, 6]])}).tolist() == [2, 0]
    model = Given({**output(logits), "loss_sum": torch.tensor(8.0)})
    losses = terms(model, given, torch.tensor([4, 5]))
    masks = Segmentation(points=None).mask_losses(logits, targets).sum().item()
    assert {k: v.item() for k, v in losses.terms.items()} == pytest.approx(
        {"language": 2.0, "masks": 0.5 * masks / 5}
    )


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (None, "found none"),
        (torch.zeros(3, 4, 4), r"found shape \(3, 4, 4\)"),
        (torch.zeros(2, 4, 4, 4), r"found shape \(2, 4, 4, 4\)"),
    ],
)
def test_targets_that_do_not_fit_are_refused(targets: Tensor | None, found: str) -> None:
    given: Batch = {} if targets is None else {"mask_targets": targets}
    with pytest.raises(RecipeError, match=rf"2 logits of shape \(2, 4, 4\), {found}"):
        Segmentation().loss(output(torch.zeros(2, 4, 4)), given)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bce": 0.0, "dice": 0.0}, "all 0"),
        ({"absent": "presence-only"}, "set presence above 0"),
        ({"points": 0}, "greater than or equal to 1"),
        ({"important": 1.5}, "less than or equal to 1"),
    ],
)
def test_options_that_teach_nothing_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        validate(SegmentationOptions, {"name": "segmentation", **options}, source="recipe")
