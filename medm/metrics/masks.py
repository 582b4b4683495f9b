"""Metrics of binary masks of equal shape with any number of axes.

Surface distances are MONAI's (torch is imported inside the functions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from medm.metrics.base import (
    DEFAULT,
    MetricResult,
    Resampling,
    check_lengths,
    mean_result,
    optional,
    with_note,
)

EMPTY = "empty:1-if-both"


def dice_of(prediction: np.ndarray, reference: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|); 1 when both are empty."""
    mine, theirs = _pair(prediction, reference)
    total = int(mine.sum()) + int(theirs.sum())
    return 2 * int((mine & theirs).sum()) / total if total else 1.0


def iou_of(prediction: np.ndarray, reference: np.ndarray) -> float:
    """|A and B| / |A or B|; 1 when both are empty."""
    mine, theirs = _pair(prediction, reference)
    union = int((mine | theirs).sum())
    return int((mine & theirs).sum()) / union if union else 1.0


def hd95_of(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> float:
    """95th percentile of surface distances in mm, the larger of both directions.

    0 when both masks are empty; where only one is, the diagonal of the whole grid, so that a missed
    structure is penalized.
    """
    mine, theirs = _pair(prediction, reference)
    if not mine.any() or not theirs.any():
        return 0.0 if mine.any() == theirs.any() else diagonal(mine.shape, spacing)
    torch, metrics = _monai()
    pair = [torch.from_numpy(mask[None, None].astype(np.uint8)) for mask in (mine, theirs)]
    distance = metrics.compute_hausdorff_distance(
        *pair, include_background=True, percentile=95, spacing=list(map(float, spacing))
    )
    return float(distance[0, 0])


def diagonal(shape: Sequence[int], spacing: Sequence[float] | None = None) -> float:
    """Length of the diagonal of a grid, the worst distance in it; in voxels without a spacing."""
    steps = [1.0] * len(shape) if spacing is None else spacing
    return math.dist(
        [0] * len(shape), [size * step for size, step in zip(shape, steps, strict=True)]
    )


def nsd_of(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerance: float
) -> float:
    """Fraction of both surfaces that lies within `tolerance` mm of the other.

    1 when both are empty, 0 when one is.
    """
    mine, theirs = _pair(prediction, reference)
    if not mine.any() or not theirs.any():
        return float(mine.any() == theirs.any())
    torch, metrics = _monai()
    pair = [torch.from_numpy(mask[None, None].astype(np.uint8)) for mask in (mine, theirs)]
    fraction = metrics.compute_surface_dice(
        *pair,
        class_thresholds=[tolerance],
        include_background=True,
        spacing=list(map(float, spacing)),
    )
    return float(fraction[0, 0])


def dice(
    predictions: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
    *,
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Mean Dice over items."""
    result = mean_result(
        "dice", _each(predictions, references, dice_of), f"hard|{EMPTY}|mean", resampling
    )
    return [with_note(result, _empty_masks(predictions, references, both="1"))]


def mask_iou(
    predictions: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
    *,
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Mean IoU over items."""
    result = mean_result(
        "mask-iou", _each(predictions, references, iou_of), f"hard|{EMPTY}|mean", resampling
    )
    return [with_note(result, _empty_masks(predictions, references, both="1"))]


def hd95(
    predictions: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
    *,
    spacings: Sequence[Sequence[float]] | None = None,
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Mean 95 % Hausdorff distance.

    Without `spacings` (mm per step of each axis, per item) the unit is voxels.
    """
    steps = _spacings(predictions, references, spacings)
    scores = [
        hd95_of(a, b, step) for a, b, step in zip(predictions, references, steps, strict=True)
    ]
    unit = "voxel" if spacings is None else "mm"
    result = mean_result("hd95", scores, f"monai|unit:{unit}|one-empty:diagonal|mean", resampling)
    return [
        with_note(
            result, _empty_masks(predictions, references, both="0", one="the diagonal of the grid")
        )
    ]


def nsd(
    predictions: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
    *,
    tolerance: float = 2.0,
    spacings: Sequence[Sequence[float]] | None = None,
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Mean normalized surface Dice. Without `spacings` tolerance and distances are in voxels."""
    steps = _spacings(predictions, references, spacings)
    scores = [
        nsd_of(a, b, step, tolerance)
        for a, b, step in zip(predictions, references, steps, strict=True)
    ]
    unit = "voxel" if spacings is None else "mm"
    result = mean_result(
        f"nsd@{tolerance:g}", scores, f"monai|unit:{unit}|{EMPTY}|mean", resampling
    )
    return [with_note(result, _empty_masks(predictions, references, both="1"))]


def _empty_masks(
    predictions: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
    *,
    both: str,
    one: str | None = None,
) -> str | None:
    """Describe how items with empty masks count, for which the formula has no value.

    These are items with two empty masks, and for a distance, those with one.
    """
    pairs = [
        (bool(np.any(mine)), bool(np.any(theirs)))
        for mine, theirs in zip(predictions, references, strict=True)
    ]
    counts = [(sum(not a and not b for a, b in pairs), "empty masks on both sides", both)]
    if one is not None:
        counts.append((sum(a != b for a, b in pairs), "an empty mask on one side", one))
    parts = [
        f"{count} of {len(pairs)} items have {what} and count as {value}"
        for count, what, value in counts
        if count
    ]
    return "; ".join(parts) or None


def _each(
    predictions: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
    score: Callable[[np.ndarray, np.ndarray], float],
) -> list[float]:
    check_lengths(predictions, references)
    return [score(a, b) for a, b in zip(predictions, references, strict=True)]


def _pair(prediction: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as booleans. Probabilities are refused: their threshold is the caller's choice."""
    masks = []
    for side, mask in (
        ("prediction", np.asarray(prediction)),
        ("reference", np.asarray(reference)),
    ):
        if not np.isin(mask, (0, 1)).all():
            raise ValueError(
                f"{side}: expected a mask of 0 and 1, found values up to {mask.max()}; threshold "
                "it first"
            )
        masks.append(mask.astype(bool))
    if masks[0].shape != masks[1].shape:
        raise ValueError(
            f"prediction is {masks[0].shape}, reference is {masks[1].shape}: bring the prediction "
            "back to the grid of the reference first"
        )
    return masks[0], masks[1]


def _spacings(
    predictions: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
    spacings: Sequence[Sequence[float]] | None,
) -> list[Sequence[float]]:
    check_lengths(predictions, references)
    if spacings is None:
        return [[1.0] * np.ndim(reference) for reference in references]
    check_lengths(spacings, references)
    return list(spacings)


def _monai() -> tuple[Any, Any]:
    """Torch and monai.metrics; scipy, which MONAI's distances need, is asked for by name."""
    import torch

    optional("scipy.ndimage", package="scipy", extra="surface-metrics")
    return torch, optional("monai.metrics", package="monai", extra="surface-metrics")
