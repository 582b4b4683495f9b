"""Decisions on several labels: hand-computed numbers, unknown labels, thresholds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medm.metrics.base import Resampling
from medm.metrics.classification import auroc
from medm.metrics.multilabel import best_thresholds, label_decisions

NAN = math.nan
NAMES = ["a", "b", "c"]
#                    a     b     c
TRUTHS = np.array([[1.0, 0.0, 0.0],
                   [1.0, 1.0, 0.0],
                   [0.0, NAN, 0.0],
                   [0.0, 0.0, 0.0]])  # fmt: skip
SCORES = np.array([[0.9, 0.1, 0.1],
                   [0.2, 0.8, 0.1],
                   [0.6, 0.9, 0.1],
                   [0.1, 0.5, 0.7]])  # fmt: skip
NO_INTERVAL = Resampling(rounds=0)


def decided(**options: object) -> dict[str, float]:
    results = label_decisions(
        SCORES, TRUTHS, names=NAMES, thresholds=np.full(3, 0.5), resampling=NO_INTERVAL, **options  # type: ignore[arg-type]
    )  # fmt: skip
    return {result.name: result.value for result in results}


def test_numbers_by_hand() -> None:
    """a: tp 1 fp 1 fn 1 tn 1. b: tp 1 fp 1 (0.5 counts) fn 0 tn 1, one unknown. c: no positive."""
    found = decided()
    assert found["f1[a]"] == pytest.approx(0.5)
    assert found["f1[b]"] == pytest.approx(2 / 3)
    assert math.isnan(found["f1[c]"])
    assert found["macro-f1"] == pytest.approx((0.5 + 2 / 3) / 2)
    assert found["micro-f1"] == pytest.approx(2 * 2 / (2 * 2 + 2 + 1))
    assert found["weighted-f1"] == pytest.approx((2 * 0.5 + 1 * 2 / 3) / 3)
    assert found["sensitivity"] == pytest.approx((0.5 + 1) / 2)
    assert found["specificity"] == pytest.approx((0.5 + 0.5) / 2)
    assert found["exact-match"] == pytest.approx(1 / 4)  # the first item alone


def test_a_label_without_positives_is_named_or_counts_as_zero() -> None:
    results = label_decisions(
        SCORES, TRUTHS, names=NAMES, thresholds=np.full(3, 0.5), resampling=NO_INTERVAL
    )
    by_name = {result.name: result for result in results}
    assert by_name["macro-f1"].note is not None
    assert "left out: c" in by_name["macro-f1"].note
    assert by_name["f1[c]"].note == "undefined: all 4 known labels are 0"
    zero = decided(undefined_as="zero")
    assert zero["macro-f1"] == pytest.approx((0.5 + 2 / 3 + 0) / 3)
    assert zero["specificity"] == pytest.approx((0.5 + 0.5 + 0.75) / 3)
    assert zero["micro-f1"] == pytest.approx(2 * 2 / (2 * 2 + 3 + 1))


def test_unknown_labels_count_in_no_area() -> None:
    """b without its unknown item: the positive lies above both negatives."""
    results = auroc(SCORES, TRUTHS, class_names=NAMES, resampling=NO_INTERVAL)
    found = {result.name: result.value for result in results}
    assert found["auroc[b]"] == 1.0
    assert found["auroc[a]"] == pytest.approx(3 / 4)
    assert found["auroc"] == pytest.approx((1 + 3 / 4) / 2)
    assert results[0].note is not None
    assert "c" in results[0].note


def test_the_best_threshold_is_a_score_that_is_reached() -> None:
    """b: deciding at 0.8 finds the positive and nothing else. a: F1 of 0.9, 0.6, 0.2, 0.1 is 2/3,
    1/2, 4/5, 2/3."""
    chosen = best_thresholds(SCORES, TRUTHS, names=NAMES, criterion="f1")
    assert [result.name for result in chosen] == ["threshold[a]", "threshold[b]", "threshold[c]"]
    assert [result.value for result in chosen[:2]] == [0.2, 0.8]
    assert math.isnan(chosen[2].value)
    youden = best_thresholds(SCORES, TRUTHS, names=NAMES, criterion="youden")
    assert youden[0].value == 0.9  # 1/2 - 0; at 0.2 it is 1 - 1/2 as well, and the highest counts


def test_intervals_draw_whole_patients() -> None:
    from medm.metrics.base import Clusters

    drawn = Resampling(rounds=50, clusters=Clusters("patient", ("p", "p", "q", "q")))
    results = label_decisions(
        SCORES, TRUTHS, names=NAMES, thresholds=np.full(3, 0.5), resampling=drawn
    )
    assert all("cluster:patient" in result.signature for result in results)
    first = results[0]
    assert first.low <= first.value <= first.high
