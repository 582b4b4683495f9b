"""The original scoring is repeated with its quirks, and the corrected scoring differs where it
should."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from medm.metrics import boxes, choice, m3d_bench, masks, match, uni_med
from medm.metrics.base import Resampling
from medm.metrics.bleu import bleu, bleu_nltk
from medm.metrics.rouge import rouge

FAST = Resampling(rounds=20)


def value(results: list) -> float:
    return results[0].value


def test_no_is_found_in_abnormal_only_by_uni_med() -> None:
    for text in ("abnormal", "normal", "unknown", "nodule"):
        assert value(uni_med.closed_accuracy([text], ["no"], resampling=FAST)) == 1
        assert value(choice.closed_accuracy([text], ["no"], resampling=FAST)) == 0


def test_repeats_are_hits_only_for_uni_med() -> None:
    assert value(uni_med.token_f1(["lung lung lung"], ["lung"], resampling=FAST)) == 1
    assert value(match.token_f1(["lung lung lung"], ["lung"], resampling=FAST)) == 0.5


def test_a_right_word_has_no_bleu_4_only_for_uni_med() -> None:
    published = [r.value for r in uni_med.bleu(["lung"], ["lung"], resampling=FAST)]
    assert published[0] == 1
    assert published[1] == pytest.approx(sys.float_info.min**0.5)
    assert published[3] == pytest.approx(sys.float_info.min ** (3 / 4))
    assert bleu_nltk(["lung"], ["lung"], resampling=FAST)[0].value == 1
    undefined = bleu_nltk(["lung"], ["lung"], resampling=FAST)[3]
    assert (math.isnan(undefined.value), undefined.note) == (
        True,
        "undefined: no reference has 4 words",
    )
    assert value(bleu(["lung"], ["lung"], resampling=FAST)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("none", "0"),
        ("The left-lung", "left lung"),
        ("left -lung", "left lung"),
        ("yes, it is a mass", "yes it is mass"),
        ("yes,it is", "yes it is"),
        ("a-b, c", "b c"),
        ("1,000 mm-ct", "1000 mmct"),
        ("3.5 cm.", "3.5 cm"),
        ("dont know.", "don't know"),
        ("hed've", "he'd've"),
        ("." * 40, "." * 8),
        ("seven", "7"),
    ],
)
def test_the_published_normaliser(text: str, published: str) -> None:
    assert uni_med.normalise(text) == published


def test_none_equals_zero_only_for_uni_med() -> None:
    assert value(uni_med.match(["none"], ["0"], resampling=FAST)) == 1
    assert value(match.normalized_match(["none"], ["0"], resampling=FAST)) == 0


def test_uni_med_boxes() -> None:
    extent = [(100.0, 100.0)]
    truth: list[boxes.Box] = [(10, 10, 20, 20)]
    score = lambda text: uni_med.box_iou([text], truth, extents=extent, resampling=FAST)[0].value  # noqa: E731
    assert score("{<10><10><20><20>}") == 1
    assert score("{<20><10><30><20>}") == pytest.approx(
        11 / (2 * 121 - 11)
    )  # boxes that only touch share a column
    assert boxes.iou((20, 10, 30, 20), truth[0]) == 0
    assert score("it is {<10><10><20><20>}") == 0  # anchored at the start
    assert score("{ <10> <10> <20> <20> } and more") == 1
    swapped = "{<20><20><10><10>}"
    assert score(swapped) == 0
    assert boxes.CODECS["uni-med"].parse(swapped).first == pytest.approx(
        (0.1, 0.1, 0.2, 0.2)
    )  # repaired and counted
    with pytest.raises(ValueError, match="codec 'uni-med'"):
        uni_med.box_iou(["x"], ["y"], codec="m3d")


def test_an_iou_of_one_half_is_no_hit_for_uni_med() -> None:
    # inclusive areas 2 and 4, shared 2
    published = uni_med.box_iou([(0, 0, 0, 1)], [(0, 0, 1, 1)], resampling=FAST)
    assert (published[0].value, published[1].value) == (0.5, 0)


def test_reports_are_cut_to_fifty_words_only_for_uni_med() -> None:
    text = " \n".join(f"word{i}" for i in range(60))
    assert uni_med.first_words(text).split() == [f"word{i}" for i in range(50)]


def test_m3d_letters_are_found_anywhere() -> None:
    text = ["the ascending AORTA. D"]
    assert value(m3d_bench.choice_accuracy(text, ["A"], resampling=FAST)) == 1
    options = [{"A": "liver", "B": "spleen", "C": "aneurysm", "D": "vein"}]
    assert value(choice.choice_accuracy(text, ["A"], options=options, resampling=FAST)) == 0
    assert value(m3d_bench.choice_accuracy(["x"], [""], resampling=FAST)) == 1


def test_m3d_boxes() -> None:
    guess, truth = (0.0, 0.0, 0.0, 0.2, 0.2, 0.2), (0.1, 0.1, 0.1, 0.3, 0.3, 0.3)
    published = m3d_bench.box_iou([guess, "nothing"], [truth, truth], resampling=FAST)[0]
    assert published.per_item == pytest.approx([0.001 / (0.027 + 1e-6), -1])
    sound = boxes.box_iou([guess, "nothing"], [truth, truth], codec="m3d", resampling=FAST)[0]
    assert sound.per_item == pytest.approx([1 / 15, 0])


def test_m3d_dice_is_soft_and_never_one() -> None:
    one_voxel = np.zeros((2, 2, 2))
    one_voxel[0, 0, 0] = 1
    assert value(m3d_bench.dice([one_voxel], [one_voxel], resampling=FAST)) == pytest.approx(2 / 3)
    assert value(masks.dice([one_voxel], [one_voxel], resampling=FAST)) == 1
    assert value(m3d_bench.dice([one_voxel * 0.6], [one_voxel], resampling=FAST)) == pytest.approx(
        1.2 / 2.6
    )


def test_m3d_text_scores() -> None:
    predictions, references = ["", "The liver is large."], ["liver", "The liver is big."]
    result = m3d_bench.bleu(predictions, references, resampling=FAST)[0]
    assert result.per_item == [0, pytest.approx(4 / 5)]  # the full stop is a token of its own
    assert bleu(predictions, references, resampling=FAST)[0].value != pytest.approx(result.value)
    assert value(m3d_bench.rouge(predictions, references, resampling=FAST)) == value(
        rouge(predictions, references, resampling=FAST)
    )
    assert m3d_bench.bleu(["liver"], ["liver is big"], resampling=FAST)[0].value == pytest.approx(
        np.exp(1 - 3)
    )
