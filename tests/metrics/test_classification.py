"""Accuracy, F1, AUROC and retrieval against numbers by hand and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medm.metrics.base import Resampling
from medm.metrics.classification import (
    accuracy,
    auroc,
    balanced_accuracy,
    macro_f1,
    sensitivity_specificity,
)
from medm.metrics.retrieval import ranks, recall_at_k

FAST = Resampling(rounds=50)
TRUE = ["a", "a", "a", "a", "b", "b", "c", "c"]
GUESS = ["a", "a", "b", "x", "b", "a", "c", "b"]
# a: tp 2, fp 1, missed 2 -> F1 4/7; b: tp 1, fp 2, missed 1 -> 2/5; c: tp 1, fp 0, missed 1 -> 2/3.
# x is a miss only.


def test_label_metrics_by_hand() -> None:
    assert accuracy(GUESS, TRUE, resampling=FAST)[0].value == pytest.approx(4 / 8)
    assert balanced_accuracy(GUESS, TRUE, resampling=FAST)[0].value == pytest.approx(
        (2 / 4 + 1 / 2 + 1 / 2) / 3
    )
    assert macro_f1(GUESS, TRUE, resampling=FAST)[0].value == pytest.approx(
        (4 / 7 + 2 / 5 + 2 / 3) / 3
    )


def test_the_majority_answer_has_high_accuracy_and_low_balanced_accuracy() -> None:
    true = [0] * 95 + [1] * 5
    guess = [0] * 100
    assert accuracy(guess, true, resampling=FAST)[0].value == 0.95
    assert balanced_accuracy(guess, true, resampling=FAST)[0].value == 0.5


def test_sensitivity_and_specificity_by_hand() -> None:
    guess, true = [1, 1, 0, 0, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0]
    sensitivity, specificity = sensitivity_specificity(guess, true, resampling=FAST)
    assert (sensitivity.name, sensitivity.value) == ("sensitivity", 0.5)
    assert (specificity.name, specificity.value) == ("specificity", pytest.approx(2 / 3))
    with pytest.raises(ValueError, match="0/1 predictions"):
        sensitivity_specificity([2], [1])


@pytest.mark.parametrize(
    ("scores", "labels", "area"),
    [
        ([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.75),
        ([0.5, 0.5, 0.5, 0.5], [0, 1, 0, 1], 0.5),  # a constant score knows nothing
        ([0.2, 0.5, 0.5], [0, 1, 0], 0.75),  # one tie: half a win
        ([1, 2, 3], [1, 0, 0], 0.0),
        ([1, 2, 3], [0, 0, 1], 1.0),
    ],
)
def test_auroc_by_hand(scores: list[float], labels: list[int], area: float) -> None:
    assert auroc(scores, labels, resampling=FAST)[0].value == pytest.approx(area)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auroc_equals_counting_all_pairs(items: list[tuple[int, bool]]) -> None:
    positive = [score for score, label in items if label]
    negative = [score for score, label in items if not label]
    found = auroc(
        [s for s, _ in items], [int(y) for _, y in items], resampling=Resampling(rounds=0)
    )[0].value
    if not positive or not negative:
        assert math.isnan(found)
        return
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    assert found == pytest.approx(np.mean(pairs))


def test_auroc_of_classes_and_their_mean() -> None:
    scores = [[0.9, 0.2, 0.5], [0.8, 0.1, 0.6], [0.1, 0.7, 0.6], [0.2, 0.8, 0.7]]
    mean, first, second, third = auroc(
        scores, [0, 0, 1, 1], class_names=["x", "y", "z"], resampling=FAST
    )
    assert (first.name, first.value, second.value) == ("auroc[x]", 1, 1)
    assert math.isnan(
        third.value
    )  # class 2 never occurs: it is left out of the mean and not counted as 0
    assert mean.value == 1
    multi_hot = auroc(scores, [[1, 0, 0], [1, 0, 1], [0, 1, 1], [0, 1, 0]], resampling=FAST)
    assert multi_hot[3].value == 0.5  # 0.6 > 0.5 twice, 0.6 < 0.7 twice: 2 of 4 wins


def test_auroc_under_weights_equals_auroc_of_the_repeated_items() -> None:
    scores, labels = [0.1, 0.4, 0.4, 0.8, 0.3], [0, 1, 0, 1, 0]
    counts = np.array([[2, 0, 1, 1, 1]])
    result = auroc(scores, labels, resampling=FAST)[0]
    assert result.reweighted is not None
    repeated = auroc([0.1, 0.1, 0.4, 0.8, 0.3], [0, 0, 0, 1, 0], resampling=FAST)[0].value
    assert result.reweighted(counts)[0] == pytest.approx(repeated)


def test_auroc_refuses_what_cannot_be_ranked() -> None:
    with pytest.raises(ValueError, match="1 scores are nan"):
        auroc([0.1, math.nan], [0, 1])
    with pytest.raises(ValueError, match="0/1 labels"):
        auroc([0.1, 0.2], [0, 2])


def test_retrieval_by_hand() -> None:
    similarity = np.array([[0.9, 0.1, 0.2], [0.8, 0.7, 0.1], [0.3, 0.4, 0.2]])
    place = ranks(similarity, np.eye(3, dtype=bool))
    assert place.tolist() == [1, 2, 3]
    results = {r.name: r.value for r in recall_at_k(similarity, cutoffs=(1, 2), resampling=FAST)}
    assert results["image-to-text-R@1"] == pytest.approx(1 / 3)
    assert results["image-to-text-R@2"] == pytest.approx(2 / 3)
    assert results["image-to-text-median-rank"] == 2
    # columns: text 0 finds image 0 first, text 1 image 1 first, text 2 ties its image with image 0
    assert results["text-to-image-R@1"] == pytest.approx(2 / 3)


def test_a_constant_similarity_retrieves_nothing() -> None:
    assert ranks(np.ones((4, 4)), np.eye(4, dtype=bool)).tolist() == [4, 4, 4, 4]


def test_several_relevant_candidates_and_none() -> None:
    similarity = np.array([[0.1, 0.9, 0.5]])
    assert ranks(similarity, np.array([[True, False, True]])).tolist() == [2]
    with pytest.raises(ValueError, match="1 queries have no relevant"):
        ranks(similarity, np.zeros((1, 3), dtype=bool))


def test_the_median_of_an_even_number_is_between() -> None:
    similarity = np.array([[0.9, 0.1], [0.8, 0.2]])  # ranks 1 and 2
    median = recall_at_k(similarity, resampling=FAST)[3]
    assert (median.name, median.value) == ("image-to-text-median-rank", 1.5)
