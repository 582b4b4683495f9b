"""Metrics that are not defined for the data, or cannot read their language, give a reason in place
of a number."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from medm.metrics import METRICS
from medm.metrics.base import MetricResult, Resampling
from medm.metrics.bleu import bleu, bleu_coco, bleu_nltk
from medm.metrics.chest_labels import chest_label_f1
from medm.metrics.choice import choice_accuracy, parse_choice
from medm.metrics.cider import cider_d
from medm.metrics.classification import auroc, balanced_accuracy, macro_f1, sensitivity_specificity
from medm.metrics.compare import compare
from medm.metrics.match import normalized_match, token_f1
from medm.metrics.retrieval import recall_at_k
from medm.metrics.rouge import rouge

FAST = Resampling(rounds=20)
CHINESE = ["胸部X线检查未见明显异常，心影大小正常。", "左侧胸腔可见少量积液，建议复查。"]
JAPANESE = ["心臓の大きさは正常です。", "左側に少量の胸水が見られます。"]
THAI = ["หัวใจมีขนาดปกติไม่พบน้ำในช่องเยื่อหุ้มปอด", "พบน้ำในช่องเยื่อหุ้มปอดซ้ายเล็กน้อย"]
RUSSIAN = ["Сердце не увеличено, лёгкие чистые.", "Слева небольшой плевральный выпот."]
GERMAN = ["Das Herz ist vergrößert, kein Erguß.", "Links ein kleiner Erguß, sonst unauffällig."]


def assert_undefined(result: MetricResult, words: str) -> None:
    assert math.isnan(result.value), result.name
    assert math.isnan(result.low)
    assert result.per_item is None
    assert result.note is not None
    assert words in result.note
    assert result.as_dict()["note"] == result.note
    assert result.as_dict()["value"] is None


def test_one_item_has_no_cider() -> None:
    assert_undefined(cider_d(["a lung"], ["a lung"], resampling=FAST)[0], "undefined for one item")
    assert_undefined(cider_d(["a", "b"], ["same report"] * 2, resampling=FAST)[0], "in all of them")
    some = cider_d(["a b", "a", "c"], ["the lung", "the", "the heart"], resampling=FAST)[0]
    assert some.note is not None
    assert some.note.startswith("1 of 3 items score 0 whatever the reply")
    assert cider_d(["a b", "c d"], ["a b", "c d"], resampling=FAST)[0].note is None


def test_what_is_undefined_is_compared_with_nothing() -> None:
    sides = [cider_d([reply], ["a lung"], resampling=FAST)[0] for reply in ("a lung", "x")]
    found = compare(*sides)
    assert math.isnan(found.difference)
    assert math.isnan(found.p_value)
    assert found.as_dict()["low"] is None


def test_bleu_of_references_that_are_shorter_than_the_order() -> None:
    for metric in (bleu, bleu_coco, bleu_nltk):
        results = metric(["left lung", "liver"], ["left lung", "liver"], resampling=FAST)
        assert [math.isnan(result.value) for result in results] == [False, False, True, True]
        assert_undefined(results[2], "no reference has 3 words")
    mixed = bleu_nltk(["a b c d", "liver"], ["b c d e", "liver"], resampling=FAST)
    assert (
        mixed[3].note == "1 of 2 references have fewer than 4 words: a right reply scores low there"
    )


def test_areas_need_both_labels() -> None:
    assert_one = auroc([0.1, 0.2], [1, 1], resampling=FAST)[0]
    assert math.isnan(assert_one.value)
    assert assert_one.note == "undefined: all 2 labels are 1"
    classes = auroc(np.eye(3)[[0, 1, 0]], [0, 1, 0], class_names=["a", "b", "c"], resampling=FAST)
    assert classes[0].value == 1
    assert classes[0].note == "1 of 3 classes have one label only and are left out: c"
    assert classes[3].note == "undefined: all 3 labels are 0"
    assert classes[1].note is None


def test_recall_of_a_class_that_is_not_there() -> None:
    sensitivity, specificity = sensitivity_specificity([0, 1], [0, 0], resampling=FAST)
    assert math.isnan(sensitivity.value)
    assert sensitivity.note == "undefined: no reference is 1"
    assert (specificity.value, specificity.note) == (0.5, None)
    for metric in (balanced_accuracy, macro_f1):
        assert "all references are of one class" in str(
            metric(["a"], ["a"], resampling=FAST)[0].note
        )


def test_findings_of_normal_reports_only() -> None:
    results = chest_label_f1(
        ["", "Effusion."], ["No effusion.", "Lungs are clear."], resampling=FAST
    )
    by_name = {result.name: result for result in results}
    assert by_name["chest-label-f1-micro-14"].value == 0
    assert_undefined(
        by_name["chest-label-f1-macro-5"], "no reference affirms one of these 5 labels"
    )
    for foreign in (CHINESE, RUSSIAN, GERMAN):
        assert_undefined(
            chest_label_f1(foreign, foreign, resampling=FAST)[0], "the rules read English reports"
        )


def test_a_cutoff_that_every_ranking_reaches() -> None:
    by_name = {result.name: result for result in recall_at_k(np.eye(5), resampling=FAST)}
    assert_undefined(by_name["image-to-text-R@10"], "any ranking of 5 candidates")
    assert_undefined(by_name["text-to-image-R@5"], "among 5")
    assert by_name["image-to-text-R@1"].value == 1


def test_empty_masks_are_counted() -> None:
    pytest.importorskip("monai")
    empty, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    sides = ([empty, empty, full], [empty, full, full])
    expected = {
        "dice": "1 of 3 items have empty masks on both sides and count as 1",
        "mask-iou": "1 of 3 items have empty masks on both sides and count as 1",
        "nsd": "1 of 3 items have empty masks on both sides and count as 1",
        "hd95": "1 of 3 items have empty masks on both sides and count as 0; "
        "1 of 3 items have an empty mask on one side and count as the diagonal of the grid",
    }
    for name, note in expected.items():
        assert METRICS.get(name)(*sides, resampling=FAST)[0].note == note
        assert METRICS.get(name)([full], [full], resampling=FAST)[0].note is None


@pytest.mark.parametrize("reports", [CHINESE, JAPANESE, THAI], ids=["Chinese", "Japanese", "Thai"])
@pytest.mark.parametrize(
    "name",
    ["bleu", "bleu-coco", "cider-d", "meteor-exact-stem", "uni-med-bleu", "uni-med-token-f1", "m3d-bench-bleu",
     "rouge", "m3d-bench-rouge"],
)  # fmt: skip
def test_words_of_scripts_without_spaces_are_not_counted(name: str, reports: list[str]) -> None:
    for result in METRICS.get(name)(reports, reports, resampling=FAST):
        assert_undefined(result, "letters")


@pytest.mark.parametrize("reports", [CHINESE, JAPANESE, THAI, RUSSIAN, GERMAN])
def test_other_languages_have_metrics_that_read_them(reports: list[str]) -> None:
    wrong = reports[::-1]
    for name, options in (
        ("token-f1", {}),
        ("bleu-nltk", {}),
        ("normalised-match", {}),
        ("exact-match", {}),
        ("rouge", {"words": "unicode"}),
        ("bleu", {"tokenize": "char"}),
    ):
        metric = METRICS.get(name)
        right = metric(reports, reports, resampling=FAST, **options)[0]
        assert right.value == pytest.approx(1)
        assert right.note is None
        assert metric(wrong, reports, resampling=FAST, **options)[0].value < 0.7


def test_characters_are_the_words_of_chinese() -> None:
    # 左肺 against 右肺: one of two characters on both sides; a whole-run token would give 0.
    assert token_f1(["左肺"], ["右肺"], resampling=FAST)[0].value == 0.5
    assert normalized_match(["左肺。"], ["左肺"], resampling=FAST)[0].value == 1
    assert rouge(["左肺"], ["右肺"], words="unicode", resampling=FAST)[0].value == 0.5
    assert bleu(["左肺"], ["左肺"], tokenize="zh", resampling=FAST)[1].value == pytest.approx(1)


def test_segmented_chinese_is_counted() -> None:
    spaced = ["胸部 X线 检查 未见 异常 。", "左侧 胸腔 少量 积液 。"]
    assert bleu_coco(spaced, spaced, resampling=FAST)[0].value == pytest.approx(1)
    assert cider_d(spaced, spaced, resampling=FAST)[0].value == pytest.approx(10)


def test_cyrillic_is_counted_by_words_and_not_by_english_stems() -> None:
    assert bleu_coco(RUSSIAN, RUSSIAN, resampling=FAST)[0].value == pytest.approx(1)
    assert METRICS.get("bleu")(RUSSIAN, RUSSIAN, resampling=FAST)[0].value == pytest.approx(1)
    assert_undefined(
        METRICS.get("meteor-exact-stem")(RUSSIAN, RUSSIAN, resampling=FAST)[0], "not Latin"
    )


def test_rouge_says_what_it_drops() -> None:
    english = [
        "The heart is enlarged and there is a small pleural effusion on the left side of the chest"
    ] * 3
    few = [*english, "A Müller lesion"]
    result = rouge(few, few, resampling=FAST)[0]
    assert result.value == 1
    assert "drops letters other than a to z, 0.4% of" in str(result.note)
    assert rouge(english, english, resampling=FAST)[0].note is None
    assert_undefined(rouge(GERMAN, GERMAN, resampling=FAST)[0], "words: unicode")
    # Units and subscripts are no letters, and a reply does not decide what is counted.
    assert rouge(["größer"], ["5 mm²"], resampling=FAST)[0].note is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [("Ｂ．肺", "B"), ("B、肺", "B"), ("（B）", "B"), ("B。", "B"), ("肺", "B"), ("肝", "A")],
)
def test_choices_are_read_with_the_marks_of_other_languages(text: str, letter: str) -> None:
    options = {"A": "肝", "B": "肺"}
    assert parse_choice(text, options) == letter
    assert choice_accuracy([text], [letter], options=[options], resampling=FAST)[0].value == 1


def test_an_encoder_that_does_not_know_the_language_gives_no_score(tmp_path: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    from medm.metrics.bertscore import bertscore

    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "heart", "clear"])
    )
    vocab = str(tmp_path / "vocab.txt")
    BertTokenizerFast(vocab_file=vocab, vocab=vocab).save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    BertModel(BertConfig(vocab_size=7, max_position_embeddings=8, **sizes)).save_pretrained(
        tmp_path
    )
    for result in bertscore(RUSSIAN[::-1], RUSSIAN, path=str(tmp_path), resampling=FAST):
        assert_undefined(result, "unknown to this encoder")
    longer = bertscore(["heart"], ["heart clear " * 6], path=str(tmp_path), resampling=FAST)[2]
    assert (
        longer.note
        == "1 references are longer than the encoder reads and are compared by their beginning"
    )
    assert bertscore(["heart"], ["clear"], path=str(tmp_path), resampling=FAST)[2].note is None
