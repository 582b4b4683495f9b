"""Mask metrics by hand, and surface distances in millimetres."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medm.metrics.base import Resampling
from medm.metrics.masks import dice, dice_of, hd95, hd95_of, iou_of, mask_iou, nsd, nsd_of

FAST = Resampling(rounds=20)


def square(start: int, stop: int, size: int = 12) -> np.ndarray:
    mask = np.zeros((size, size), dtype=np.uint8)
    mask[start:stop, start:stop] = 1
    return mask


def test_overlap_by_hand() -> None:
    first, second = square(0, 4), square(2, 6)  # 16 and 16 pixels, 4 shared
    assert dice_of(first, second) == pytest.approx(2 * 4 / 32)
    assert iou_of(first, second) == pytest.approx(4 / 28)
    assert dice([first, second], [second, second], resampling=FAST)[0].per_item == pytest.approx(
        [0.25, 1]
    )
    assert mask_iou([first], [second], resampling=FAST)[0].value == pytest.approx(1 / 7)


def test_empty_masks() -> None:
    empty, full = np.zeros((4, 4)), np.ones((4, 4))
    assert dice_of(empty, empty) == iou_of(empty, empty) == nsd_of(empty, empty, (1, 1), 1) == 1
    assert dice_of(empty, full) == iou_of(full, empty) == nsd_of(empty, full, (1, 1), 1) == 0
    assert hd95_of(empty, empty, (1, 1)) == 0
    assert hd95_of(full, empty, (3, 4)) == pytest.approx(
        math.hypot(12, 16)
    )  # the diagonal of the grid, in mm


def test_surface_distances_are_millimetres() -> None:
    """Two one-voxel points, three steps apart along the axis whose step is 5 mm."""
    first, second = np.zeros((1, 9, 9)), np.zeros((1, 9, 9))
    first[0, 2, 4], second[0, 5, 4] = 1, 1
    assert hd95_of(first, second, (1, 5, 0.5)) == pytest.approx(15)
    assert hd95_of(first, second, (1, 1, 1)) == pytest.approx(3)
    in_mm = hd95([first], [second], spacings=[(1, 5, 0.5)], resampling=FAST)[0]
    assert in_mm.value == pytest.approx(15)
    assert "unit:mm" in in_mm.signature
    assert "unit:voxel" in hd95([first], [second], resampling=FAST)[0].signature


def test_surface_dice_counts_what_lies_within_the_tolerance() -> None:
    first, second = square(2, 8), square(3, 9)  # shifted by one pixel along both axes
    assert nsd_of(first, first, (1, 1), 0) == 1
    assert nsd_of(first, second, (1, 1), 1.5) == 1
    strict = nsd_of(first, second, (1, 1), 0.5)
    assert 0 < strict < 1
    assert nsd_of(first, second, (2, 2), 1.0) == pytest.approx(
        strict
    )  # the same picture, twice as large
    assert nsd([first], [second], tolerance=1.5, resampling=FAST)[0].name == "nsd@1.5"


def test_probabilities_and_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="threshold it first"):
        dice_of(np.full((2, 2), 0.4), np.ones((2, 2)))
    with pytest.raises(ValueError, match="grid of the reference"):
        dice_of(np.ones((2, 2)), np.ones((2, 3)))
