"""Presence, hits, instances and phrases by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medm.metrics.base import Clusters, Resampling
from medm.metrics.grounded import (
    absent_rates,
    false_positive_rate,
    hit_rate,
    instance_counts,
    instance_f1,
    instance_results,
    instances_of,
    paired_dice_of,
    phrase_match,
    statement_of,
    without_marks,
)

FAST = Resampling(rounds=50)


def bar(start: int, stop: int, row: int = 0) -> np.ndarray:
    mask = np.zeros((4, 20), dtype=bool)
    mask[row, start:stop] = True
    return mask


NONE = np.zeros((4, 20), dtype=bool)


def test_absent_targets_are_counted_apart_from_present_ones() -> None:
    rates = absent_rates([True, False, False, True, False], [False, False, False, True, True], FAST)
    assert {r.name: (r.value, r.n) for r in rates} == {
        "false-positive-rate": (pytest.approx(1 / 3), 3),
        "true-absent-rate": (pytest.approx(2 / 3), 3),
        "missed-rate": (0.5, 2),
    }
    assert 0 <= rates[0].low <= rates[0].value <= rates[0].high <= 1
    assert rates[0].low < rates[0].high


def test_a_single_voxel_is_a_false_positive() -> None:
    assert false_positive_rate([bar(3, 4)], [NONE], resampling=FAST)[0].value == 1
    assert false_positive_rate([NONE], [NONE], resampling=FAST)[0].value == 0


def test_without_absent_targets_there_is_no_rate() -> None:
    rate, absent, missed = absent_rates([True], [True], FAST)
    assert math.isnan(rate.value)
    assert rate.note == "no target of these items is absent"
    assert math.isnan(absent.value)
    assert missed.value == 0


def test_the_rates_draw_groups_whole() -> None:
    drawn = Resampling(rounds=50, clusters=Clusters("patient", ("a", "a", "b", "b")))
    rates = absent_rates([True, True, False, False], [False, False, False, True], drawn)
    assert rates[0].clusters is not None
    assert rates[0].clusters.members == ("a", "a", "b")


def test_hits_by_hand() -> None:
    truth = bar(0, 10)
    # 2*1/(10+9) = 0.105 and 2*1/(10+11) = 0.095
    predictions = [bar(9, 18), bar(9, 20), NONE, truth]
    assert hit_rate(predictions, [truth] * 4, resampling=FAST)[0].per_item == [1, 0, 0, 1]
    assert hit_rate(predictions, [truth] * 4, threshold=0.5, resampling=FAST)[0].value == 0.25
    left_out = hit_rate([truth, truth], [truth, NONE], resampling=FAST)[0]
    assert (left_out.value, left_out.n) == (1, 1)


def test_touching_parts_are_one_instance() -> None:
    mask = np.array([[1, 0, 0, 1], [0, 1, 0, 0]])
    assert instances_of(mask).tolist() == [[1, 0, 0, 2], [0, 1, 0, 0]]
    named = np.array([[1, 1, 2]])  # touching instances that a label map tells apart
    assert instances_of(named).tolist() == named.tolist()
    with pytest.raises(ValueError, match="whole number"):
        instances_of(np.array([0.5]))


def test_instances_by_hand() -> None:
    truth = bar(0, 4) | bar(10, 14)
    # The first is found (Dice 2*2/(4+4) = 0.5), the second is missed (2*1/(4+9) = 0.15), and two
    # parts belong to nothing.
    predicted = bar(2, 6) | bar(13, 20) | bar(0, 2, row=2)
    assert instance_counts(predicted, truth) == (1, 2, 1)
    assert instance_counts(predicted, truth, threshold=0.1) == (2, 1, 0)
    assert instance_counts(NONE, truth) == (0, 0, 2)
    assert instance_counts(truth, NONE) == (0, 2, 0)
    assert instance_counts(truth, truth) == (2, 0, 0)
    with pytest.raises(ValueError, match="prediction is"):
        instance_counts(truth[1:], truth)


def test_as_many_instances_as_possible_are_paired() -> None:
    # One prediction overlaps both instances, the other only the first: by Dice alone the first
    # prediction would take the first instance, and the second would get nothing.
    truth = np.array([[1] * 6 + [2] * 4])
    predicted = np.array([[2] * 2 + [1] * 8])
    assert instance_counts(predicted, truth) == (2, 0, 0)


def test_precision_and_recall_sum_over_items() -> None:
    results = instance_results([(1, 3, 0), (1, 0, 1)], FAST)
    assert {r.name: r.value for r in results} == {
        "instance-precision@0.2": 0.4,
        "instance-recall@0.2": pytest.approx(2 / 3),
        "instance-f1@0.2": 0.5,
    }
    silent = instance_results([(0, 0, 2)], FAST)
    assert [r.value for r in silent] == [0, 0, 0]
    assert all(r.note for r in instance_results([(0, 0, 0)], FAST))
    assert instance_f1([bar(0, 3)], [bar(0, 3)], resampling=FAST)[2].value == 1


def test_a_mask_without_partner_costs() -> None:
    first, second = bar(0, 4), bar(10, 14)
    assert paired_dice_of([first], [first, second]) == 0.5
    assert paired_dice_of([second, first], [first, second]) == 1
    assert paired_dice_of([first, second], [first]) == 0.5
    assert paired_dice_of([NONE], []) == 1
    assert paired_dice_of([], [first]) == paired_dice_of([first], [NONE]) == 0


@pytest.mark.parametrize(
    ("reply", "statement"),
    [
        ("It is [SEG]. liver tumor in abdomen CT.", "liver tumor in abdomen CT"),
        ("It is. liver tumor in abdomen CT.", "liver tumor in abdomen CT"),
        ("<p> Cardiomegaly. </p> [SEG]", "Cardiomegaly"),
        ("Lung nodule [SEG].", "Lung nodule"),
        ("polyp in colon endoscopy", "polyp in colon endoscopy"),
        ("[SEG]", ""),
    ],
)
def test_the_statement_of_a_reply(reply: str, statement: str) -> None:
    assert statement_of(reply) == statement


def test_words_without_marks() -> None:
    reply = "<p> Cardiomegaly. The heart is large. </p> [SEG]"
    assert without_marks(reply) == "Cardiomegaly. The heart is large."


def test_the_best_of_several_phrases_counts() -> None:
    found = phrase_match(["cyst"], [["tumor", "cyst"]], resampling=FAST)
    assert [r.value for r in found[:2]] == [1, 1]


def test_phrases_by_their_parts() -> None:
    truth = ["left kidney in abdomen CT"] * 5
    replies = [
        "Left kidney in abdomen CT.",
        "right kidney in abdomen CT",
        "left kidney in abdomen MRI",
        "left kidney",
        "",
    ]
    whole, target, place = phrase_match(replies, truth, resampling=FAST)
    assert whole.per_item == [1, 0, 0, 0, 0]
    assert target.per_item == [1, 0, 1, 1, 0]
    assert place.per_item == [1, 1, 0, 0, 0]
    nowhere = phrase_match(
        ["polyp", "polyp in colon CT"], ["polyp", "x in colon CT"], resampling=FAST
    )
    assert (nowhere[2].value, nowhere[2].n) == (1, 1)
    assert phrase_match(["polyp"], ["polyp"], resampling=FAST)[2].note is not None
