"""A model that says nothing, or nothing to the point, scores the worst value of every metric in the
table."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from medm.metrics import METRICS
from medm.metrics.base import MetricResult, Resampling
from medm.metrics.chest_labels import chest_label_f1, label_report
from medm.metrics.match import exact_match, normalized_match, token_f1

FAST = Resampling(rounds=0)
MODELS = ("bertscore", "radeval", "meteor", "meteor-java")
"""Metrics of which the files or packages are not on every machine; their tests stand beside their
other tests."""
REFERENCES = [
    "No acute cardiopulmonary process. The lungs are clear.",
    "There is a small left pleural effusion. The heart is enlarged.",
]
CLOSED = ["yes", "no"]
BOXES = {
    "uni-med": ["{<10><20><30><40>}", "{<0><0><100><50>}"],
    "m3d": ["[0.1, 0.1, 0.1, 0.5, 0.5, 0.5]"] * 2,
}
MASKS = [np.ones((3, 4, 4), bool), np.pad(np.ones((1, 2, 2), bool), ((1, 1), (1, 1), (1, 1)))]
DIAGNOSTICS = ("closed-unparsed", "choice-unparsed", "box-unreadable")
"""Shares of replies that could not be read, of which the worst is 1."""


def worst_of(name: str) -> float:
    if name.startswith("hd95"):
        return float(
            np.mean([np.linalg.norm(mask.shape) for mask in MASKS])
        )  # the diagonals of the grids
    if name == "missed-rate":
        return 1.0
    return -1.0 if name == "m3d-bench-box-iou" else 0.0


def references_of(name: str) -> tuple[list[Any], dict[str, Any]]:
    """References that the metric can read, and options."""
    if "closed" in name:
        return CLOSED, {}
    if "choice" in name:
        return ["A", "B"], {}
    if METRICS.entry(name).options.takes == "box":  # type: ignore[attr-defined]
        codec = "m3d" if name.startswith("m3d") else "uni-med"
        return BOXES[codec], {"codec": codec}
    return REFERENCES, {}


def scores(name: str, reply: Any) -> list[MetricResult]:
    takes = METRICS.entry(name).options.takes  # type: ignore[attr-defined]
    metric = METRICS.get(name)
    if takes == "mask":
        return metric([np.zeros_like(mask) for mask in MASKS], MASKS, resampling=FAST)
    if takes == "similarity":
        return metric(np.zeros((20, 20)), resampling=FAST)
    if takes == "score":
        return metric([-np.inf, np.inf], [1, 0], resampling=FAST)
    if name == "sensitivity-specificity":
        return metric([0, 1], [1, 0], resampling=FAST)
    if takes == "label":
        return metric([reply, reply], ["liver", "lung"], resampling=FAST)
    references, options = references_of(name)
    return metric([reply] * len(references), references, resampling=FAST, **options)


@pytest.mark.parametrize("reply", ["", " \n", "​"], ids=["empty", "blanks", "zero width"])
@pytest.mark.parametrize("name", [name for name in METRICS.names() if name not in MODELS])
def test_no_reply_scores_worst(name: str, reply: str) -> None:
    found = [result for result in scores(name, reply) if result.name not in DIAGNOSTICS]
    found = [
        result for result in found if not math.isnan(result.value)
    ]  # undefined for these references
    assert found
    for result in found:
        if result.name.endswith("median-rank"):
            assert result.value == 20
            continue
        assert result.value == pytest.approx(worst_of(result.name), abs=1e-6), result.name


@pytest.mark.parametrize("name", ["accuracy", "balanced-accuracy", "macro-f1"])
@pytest.mark.parametrize("nothing", [None, ""])
def test_no_label_equals_no_label(name: str, nothing: Any) -> None:
    assert METRICS.get(name)([nothing, nothing], [nothing, "lung"], resampling=FAST)[0].value == 0


@pytest.mark.parametrize(
    "name",
    ["exact-match", "normalised-match", "token-f1", "closed-accuracy", "uni-med-match", "uni-med-token-f1",
     "uni-med-closed-accuracy", "bleu-nltk", "uni-med-bleu"],
)  # fmt: skip
@pytest.mark.parametrize("reference", ["the", ".", "?", "A"])
def test_a_reference_that_normalizes_to_nothing_is_not_hit_by_nothing(
    name: str, reference: str
) -> None:
    for reply in ("", " ", "\t"):
        assert not METRICS.get(name)([reply], [reference], resampling=FAST)[0].value > 0


def test_marks_and_articles_are_different_answers() -> None:
    replies, references = [".", "the", "A", "?", "the A"], ["the", "A", "a.", "?", "A"]
    expected = [0.0, 0.0, 1.0, 1.0, 0.0]
    assert normalized_match(replies, references, resampling=FAST)[0].per_item == expected
    assert token_f1(["."], ["the"], resampling=FAST)[0].value == 0
    assert exact_match(["é"], ["e\u0301"], resampling=FAST)[0].value == 1  # composed and decomposed


@pytest.mark.parametrize(
    "reply",
    ["banana", "", "no", "ok", "I cannot tell.", "This is a chest x-ray.", "abnormal", "No change.",
     "The lungs are not clear.", "heart", "-", "As above."],
)  # fmt: skip
def test_a_report_without_evidence_is_not_called_normal(reply: str) -> None:
    assert label_report(reply) == {}
    for result in chest_label_f1([reply] * 2, REFERENCES, resampling=FAST):
        assert result.value == 0, result.name


@pytest.mark.parametrize(
    "report",
    ["Normal.", "No acute cardiopulmonary process.", "Unremarkable chest radiograph.", "Lungs are well expanded.",
     "No abnormality.", "Cardiomediastinal silhouette within normal limits.", "No evidence of active disease.",
     "The heart is not enlarged.", "No free air.", "Trachea is midline."],
)  # fmt: skip
def test_a_report_that_states_normality_is_no_finding(report: str) -> None:
    assert label_report(report)["No Finding"] == "positive"


def test_the_rule_of_chexpert_keeps_a_name_of_its_own() -> None:
    options: dict[str, Any] = {"no_finding": "unmentioned", "resampling": FAST}
    assert label_report("banana", no_finding="unmentioned") == {"No Finding": "positive"}
    result = chest_label_f1(["banana", "banana"], REFERENCES, **options)[0]
    assert result.value == pytest.approx(2 * 1 / (2 * 1 + 3))  # one hit, one invented, two missed
    assert "no-finding:unmentioned" in result.signature
    assert chest_label_f1(["", ""], REFERENCES, **options)[0].value == 0
