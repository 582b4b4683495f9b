"""UniBiomed's own scoring by hand, its quirks included."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medm.metrics import unibiomed
from medm.metrics.base import Resampling

FAST = Resampling(rounds=20)


def test_both_means_by_hand() -> None:
    results = unibiomed.class_means({"dice": [1.0, 0.5, 0.0]}, ["a", "a", "b"], FAST)
    assert {r.name: r.value for r in results} == {
        "unibiomed-dice-class-mean": pytest.approx((0.75 + 0) / 2, abs=1e-5),
        "unibiomed-dice-sample-mean": pytest.approx(0.5, abs=1e-5),
    }
    assert results[1].value < 0.5  # 1e-6 is added to the number
    assert all(r.note for r in unibiomed.class_means({"dice": []}, [], FAST))


def test_masks_without_partner_cost_nothing() -> None:
    first = np.array([[1, 1, 0, 0, 0]])
    second = np.array([[0, 0, 0, 1, 1]])
    assert unibiomed.matched_dice_of([first], [first, second]) == 1
    assert unibiomed.matched_dice_of([second], [first]) == 0
    assert unibiomed.matched_dice_of([first * 0], [first * 0]) == 1
    assert unibiomed.matched_dice_of([], [first]) == 0


def test_matching_is_greedy() -> None:
    # Dice: a-a 0.8, a-b 0.75, b-a 0.4, b-b 0. The best pair comes first, and b is left without one.
    a, b = np.array([[1, 1, 1, 0, 0]]), np.array([[0, 0, 0, 1, 1]])
    truth_a, truth_b = np.array([[0, 1, 1, 0, 0]]), np.array([[1, 1, 0, 0, 0]])
    assert unibiomed.matched_dice_of([a, b], [truth_a, truth_b]) == pytest.approx(0.8)


def test_a_phrase_anywhere_is_right() -> None:
    replies = ["It is [SEG]. no polyp in colon endoscopy.", "polyp in colon endoscopy", ""]
    result = unibiomed.phrase(replies, ["Polyp in colon endoscopy"] * 3, resampling=FAST)[0]
    assert result.per_item == [1, 0, 0]


def test_regions_forget_sides_and_sites() -> None:
    truth = ["left kidney in abdomen CT"] * 4
    replies = ["right kidney in pelvis CT", "kidney in abdomen MRI", "liver in abdomen CT", ""]
    assert unibiomed.region(replies, truth, resampling=FAST)[0].per_item == [1, 0, 0, 0]


def test_distances_are_of_mismatched_voxels() -> None:
    truth = np.zeros((1, 512, 512), dtype=bool)
    truth[0, 100:110, 100:110] = True
    assert math.isnan(unibiomed.surfaces_of(truth, truth)["hd95"])  # no voxel differs
    assert unibiomed.surfaces_of(truth, truth)["nsd"] == pytest.approx(1)
    assert unibiomed.surfaces_of(truth * 0, truth) == {
        "hd95": pytest.approx(math.nan, nan_ok=True),
        "nsd": 0,
    }
    wider = truth.copy()
    wider[0, 100:110, 110:114] = True  # 40 voxels, 10 each at distance 1 to 4
    assert unibiomed.surfaces_of(wider, truth)["hd95"] == 4
    small = np.zeros((1, 256, 256), dtype=bool)
    small[0, 50:55, 50:55] = True
    assert unibiomed.surfaces_of(small, small)["nsd"] == pytest.approx(1)  # resized alike


def test_undefined_distances_are_left_out_and_counted() -> None:
    result = unibiomed.defined_mean("d", [2.0, math.nan, 4.0], "s", FAST)
    assert (result.value, result.n) == (3, 3)
    assert result.note == "1 of 3 items with an empty mask, or equal ones, are left out"
    assert math.isnan(unibiomed.defined_mean("d", [math.nan], "s", FAST).value)
