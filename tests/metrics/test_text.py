"""BLEU, ROUGE, METEOR, CIDEr-D, BERTScore and matches: parity with the named programs, and numbers
by hand."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from medm.errors import CheckpointError, DeviceError
from medm.metrics.base import Resampling
from medm.metrics.bertscore import bertscore
from medm.metrics.bleu import bleu, bleu_coco, bleu_nltk, sentence_bleu
from medm.metrics.cider import cider_d, cider_d_scores
from medm.metrics.match import exact_match, normalized_match, token_f1
from medm.metrics.meteor import meteor, meteor_exact_stem, meteor_java, wordnet_available
from medm.metrics.ptb import ptb_tokens
from medm.metrics.rouge import rouge
from medm.metrics.words import normalize_answer

FAST = Resampling(rounds=50)

REPORTS = [
    "The heart is enlarged. There is no pleural effusion or pneumothorax.",
    "No acute cardiopulmonary disease. Lungs are clear bilaterally.",
    "Right lower-lobe opacity measuring 3.5 x 2 cm; stable since 1/2/2019.",
    "Patient's ET tube isn't in place (see prior). Mild edema, 50% loss of height at T8-T9.",
    "Cannot exclude pneumonia in the left base, e.g. aspiration.",
]
GENERATED = [
    "Heart size is enlarged. No pleural effusion.",
    "No acute disease. The lungs are clear.",
    "Left upper-lobe nodule measuring 3.5 cm, new since 2019.",
    "The ET tube is in place. Edema is mild.",
    "Pneumonia in the left base cannot be excluded.",
]
TWO_REFERENCES = [[text, "There is no acute disease of the chest."] for text in REPORTS]


def words(generator: random.Random, longest: int = 9) -> list[str]:
    return [
        generator.choice(["a", "b", "c", "d", "e", "f"])
        for _ in range(generator.randint(0, longest))
    ]


def test_bleu_equals_sacrebleu() -> None:
    import sacrebleu

    for order, result in enumerate(bleu(GENERATED, REPORTS, resampling=FAST), 1):
        expected = sacrebleu.BLEU(max_ngram_order=order).corpus_score(GENERATED, [REPORTS])
        assert result.value * 100 == pytest.approx(expected.score, abs=1e-9)
        assert result.low <= result.value <= result.high
        assert "tok:13a" in result.signature
        assert "nrefs:1" in result.signature


def test_bleu_with_several_references_equals_sacrebleu() -> None:
    import sacrebleu

    streams = [list(stream) for stream in zip(*TWO_REFERENCES, strict=True)]
    for order, result in enumerate(bleu(GENERATED, TWO_REFERENCES, resampling=FAST), 1):
        expected = sacrebleu.BLEU(max_ngram_order=order).corpus_score(GENERATED, streams)
        assert result.value * 100 == pytest.approx(expected.score, abs=1e-9)


def test_bleu_with_an_empty_prediction_equals_sacrebleu() -> None:
    import sacrebleu

    predictions = ["", *GENERATED[1:]]
    expected = sacrebleu.BLEU().corpus_score(predictions, [REPORTS]).score
    assert bleu(predictions, REPORTS, resampling=FAST)[3].value * 100 == pytest.approx(
        expected, abs=1e-9
    )


@pytest.mark.parametrize("smoothing", ["none", "epsilon", "add-one"])
def test_sentence_bleu_equals_nltk(smoothing: str) -> None:
    import warnings

    from nltk.translate.bleu_score import SmoothingFunction
    from nltk.translate.bleu_score import sentence_bleu as nltk_bleu

    method = {"none": "method0", "epsilon": "method1", "add-one": "method2"}[smoothing]
    generator = random.Random(0)
    for _ in range(200):
        mine, theirs = (
            words(generator),
            [words(generator) or ["a"] for _ in range(generator.randint(1, 3))],
        )
        for order in (1, 2, 3, 4):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = nltk_bleu(
                    theirs,
                    mine,
                    weights=[1 / order] * order,
                    smoothing_function=getattr(SmoothingFunction(), method),
                )
            assert sentence_bleu(mine, theirs, order, smoothing=smoothing) == pytest.approx(
                float(expected), rel=1e-9
            )


def test_bleu_by_hand() -> None:
    # "no effusion" for "no pleural effusion": all 2 words match, no bigram does; brevity exp(1 -
    # 3/2).
    penalty = math.exp(-0.5)
    first, second = (
        r.value for r in bleu_coco(["no effusion"], ["no pleural effusion"], resampling=FAST)[:2]
    )
    assert first == pytest.approx(penalty, rel=1e-6)
    assert second == pytest.approx(0, abs=1e-6)
    smoothed = bleu_nltk(["no effusion"], ["no pleural effusion"], resampling=FAST)
    assert smoothed[0].value == pytest.approx(penalty)
    assert smoothed[1].value == pytest.approx(penalty * math.sqrt(1 * 0.1))


def test_a_corpus_score_is_no_mean_of_sentence_scores() -> None:
    """BLEU-COCO pools counts: 1 of 1 and 1 of 3 words is 2 of 4, not the mean 2/3."""
    result = bleu_coco(["heart", "heart of stone"], ["heart", "heart is big"], resampling=FAST)[0]
    assert result.value == pytest.approx(2 / 4, rel=1e-6)


def test_rouge_equals_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    for stem in (False, True):
        scorer = RougeScorer(kinds, use_stemmer=stem)
        expected = [
            [scorer.score(r, p)[k].fmeasure for p, r in zip(GENERATED, REPORTS, strict=True)]
            for k in kinds
        ]
        for result, scores in zip(
            rouge(GENERATED, REPORTS, stem=stem, resampling=FAST), expected, strict=True
        ):
            assert result.per_item == pytest.approx(scores)
            assert result.value == pytest.approx(np.mean(scores))


def test_rouge_by_hand() -> None:
    # 2 of 2 and 2 of 3 words: F1 = 2 * 1 * (2/3) / (5/3) = 0.8; no bigram; longest common
    # subsequence 2.
    values = [
        result.value for result in rouge(["no effusion"], ["no pleural effusion"], resampling=FAST)
    ]
    assert values == pytest.approx([0.8, 0.0, 0.8])


def test_cider_d_by_hand() -> None:
    # Two documents; every word of each occurs in one only: idf = log 2 for all, equal vectors, so
    # 10 an item.
    assert cider_d_scores(
        [list("abcd"), list("efgh")], [[list("abcd")], [list("efgh")]]
    ) == pytest.approx([10, 10])
    # Words that are in every document weigh nothing.
    assert cider_d_scores([list("ab"), list("ab")], [[list("ab")], [list("ab")]]) == [0, 0]
    # Repeating a rare word is clipped: without clipping the cosine of (3, 0) and (1, 0) would be 1.
    once = cider_d_scores([["a"], ["b"]], [[["a"]], [["b"]]])[0]
    thrice = cider_d_scores([["a"] * 3, ["b"]], [[["a"]], [["b"]]])[0]
    assert once == pytest.approx(10 / 4)
    assert thrice == pytest.approx(10 / 4 * (1 / 3) * math.exp(-(2**2) / 72))


def test_meteor_exact_stem_by_hand() -> None:
    # "lungs clear" for "lung clear": one stem and one exact match in one chunk. P = R = 1, penalty
    # 0.5 * (1/2)^3.
    result = meteor_exact_stem(["lungs clear"], ["lung clear"], resampling=FAST)[0]
    assert result.value == pytest.approx(1 - 0.5 * (1 / 2) ** 3)
    assert result.name == "meteor-exact-stem"
    assert "wordnet" not in result.signature
    assert meteor_exact_stem(["", "x"], ["lung", "lung"], resampling=FAST)[0].per_item == [0, 0]


def test_meteor_refuses_without_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk.data
    from nltk.corpus import wordnet
    from nltk.corpus.util import LazyCorpusLoader

    if not isinstance(wordnet, LazyCorpusLoader):
        pytest.skip("WordNet is already loaded in this process")
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(DeviceError, match="NLTK_DATA"):
        meteor(["a"], ["a"])


def test_meteor_with_wordnet_sees_synonyms() -> None:
    if not wordnet_available():
        pytest.skip("the WordNet files are not on this machine (see docs/benchmarks.md)")
    with_synonyms = meteor(["a tumor there"], ["a tumour there"], resampling=FAST)[0]
    assert (
        with_synonyms.value
        > meteor_exact_stem(["a tumor there"], ["a tumour there"], resampling=FAST)[0].value
    )
    assert "wordnet" in with_synonyms.signature


@pytest.fixture(scope="module")
def toolkit() -> None:
    pytest.importorskip(
        "pycocoevalcap",
        reason="pycocoevalcap (104 MB) is not installed: pip install pycocoevalcap==1.2",
    )


@pytest.fixture(scope="module")
def java(toolkit: None) -> None:
    if shutil.which("java") is None:
        pytest.skip(
            "no Java on this machine: METEOR and the PTB tokeniser of the toolkit cannot run"
        )


def test_bleu_and_cider_equal_the_coco_toolkit(toolkit: None) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    generator = random.Random(4)
    for _ in range(20):
        mine = [words(generator, 12) or ["a"] for _ in range(6)]
        theirs = [
            [words(generator, 12) or ["b"] for _ in range(generator.randint(1, 3))]
            for _ in range(6)
        ]
        predictions = {i: [" ".join(item)] for i, item in enumerate(mine)}
        targets = {i: [" ".join(text) for text in item] for i, item in enumerate(theirs)}
        expected, _ = Bleu(4).compute_score(targets, predictions, verbose=0)
        results = bleu_coco(
            [" ".join(item) for item in mine],
            [[" ".join(t) for t in item] for item in theirs],
            resampling=Resampling(rounds=0),
        )
        assert [result.value for result in results] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        _, each = Cider().compute_score(targets, predictions)
        assert cider_d_scores(mine, theirs) == pytest.approx(each.tolist(), rel=1e-9, abs=1e-12)


def test_the_whole_caption_scoring_equals_the_coco_toolkit(java: None) -> None:
    """From raw report text, the toolkit's Java tokeniser against ours."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenise = PTBTokenizer().tokenize
    predictions = tokenise({i: [{"caption": text}] for i, text in enumerate(GENERATED)})
    targets = tokenise({i: [{"caption": text}] for i, text in enumerate(REPORTS)})
    assert [predictions[i][0].split() for i in range(5)] == [ptb_tokens(text) for text in GENERATED]
    assert [targets[i][0].split() for i in range(5)] == [ptb_tokens(text) for text in REPORTS]
    expected, _ = Bleu(4).compute_score(targets, predictions, verbose=0)
    assert [r.value for r in bleu_coco(GENERATED, REPORTS, resampling=FAST)] == pytest.approx(
        expected, rel=1e-9
    )
    assert cider_d(GENERATED, REPORTS, resampling=FAST)[0].value == pytest.approx(
        Cider().compute_score(targets, predictions)[0], rel=1e-9
    )
    _, each = Meteor().compute_score(targets, predictions)
    assert meteor_java(GENERATED, REPORTS, resampling=FAST)[0].per_item == pytest.approx(each)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        # What Stanford's tokeniser and the toolkit's list of marks made of these texts when they
        # were run once.
        ("The heart is enlarged (cardiomegaly), and there's no effusion.",
         "the heart is enlarged -lrb- cardiomegaly -rrb- and there 's no effusion"),
        ("Right/left lower-lobe opacities measuring 3.5 x 2-mm; stable since 1/2/2019.",
         "right/left lower-lobe opacities measuring 3.5 x 2-mm stable since 1/2/2019"),
        ("Patient's ET tube isn't in place!", "patient 's et tube is n't in place"),
        ('T8-T9 level, 50% loss: "old" fracture [stable].', "t8-t9 level 50 % loss old fracture -lsb- stable -rsb-"),
        ("Dr. Smith e.g. noted it at 5 p.m. today...", "dr. smith e.g. noted it at 5 p.m. today"),
        ("cannot exclude 1,234 nodules & a 2.5cm mass", "can not exclude 1,234 nodules & a 2.5 cm mass"),
        ("don't can't I'm they've we'll he'd", "do n't ca n't i 'm they 've we 'll he 'd"),
        ("Impression: 1. No change. 2. Stable.", "impression 1 no change 2 stable"),
    ],
)  # fmt: skip
def test_ptb_tokens(text: str, tokens: str) -> None:
    assert ptb_tokens(text) == tokens.split()


def original_tokens() -> list[tuple[str, str]]:
    """Texts, and what pycocoevalcap 1.2 with Stanford's tokenizer (corenlp 3.4.1, Java 17) made of
    each alone."""
    lines = Path(__file__).with_name("ptb_tokens.tsv").read_text(encoding="utf-8").splitlines()
    return [(text, tokens) for text, _, tokens in (line.partition("\t") for line in lines)]


@pytest.mark.parametrize(("text", "tokens"), original_tokens())
def test_tokens_are_those_that_the_original_prints(text: str, tokens: str) -> None:
    assert ptb_tokens(text) == tokens.split()


def test_the_table_of_tokens_is_that_of_the_original(java: None) -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    table = original_tokens()
    # A line of its own between them: the original looks at the beginning of the next caption.
    captions = [text for pair in ((text, "x") for text, _ in table) for text in pair]
    printed = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(captions)})
    assert [printed[2 * i][0].split() for i in range(len(table))] == [
        tokens.split() for _, tokens in table
    ]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  The Left   Lung. ", "left lung"),
        ("T2-weighted MRI", "t2-weighted mri"),
        ("two (2) nodules!", "2 2 nodules"),
        ("3.5 cm, 1,200 mm", "3.5 cm 1200 mm"),
        ("None", "none"),
        ("doesn't", "doesnt"),
        ("An effusion - small", "effusion small"),
        ("≥ 50%", ">=50%"),
        ("≤ 50 %", "<=50 %"),
        ("p < .05", "p <0.05"),
        ("−5 HU", "-5 hu"),
        ("10–15 mm – stable", "10-15 mm stable"),
        ("A", "a"),
        ("the", "the"),
        (".", ""),
        ("SpO₂ 98％", "spo2 98%"),
        ("٣ cm", "3 cm"),
        ("Größe", "grösse"),
        ("Лёгкие чистые.", "лёгкие чистые"),
        ("हृदय सामान्य।", "हृदय सामान्य"),
        ("左肺。", "左肺"),
        ("", ""),
    ],
)
def test_normalize_answer(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal
    assert normalize_answer(normalize_answer(text)) == normalize_answer(text)


def test_matches_by_hand() -> None:
    predictions, references = (
        ["The left lung.", "right lung", "Lung"],
        ["left lung", "left lung", "lung "],
    )
    assert exact_match(predictions, references, resampling=FAST)[0].per_item == [0, 0, 1]
    assert normalized_match(predictions, references, resampling=FAST)[0].per_item == [1, 0, 1]
    # "right lung" against "left lung": one of two on both sides.
    assert token_f1(predictions, references, resampling=FAST)[0].per_item == pytest.approx(
        [1, 0.5, 1]
    )


def test_token_f1_counts_a_repeat_once() -> None:
    # 1 shared of 3 and of 1: F1 = 2 / 4.
    assert token_f1(["lung lung lung"], ["lung"], resampling=FAST)[0].value == 0.5
    assert token_f1(["", "x", ""], ["", "", "x"], resampling=FAST)[0].per_item == [0, 0, 0]


def test_the_best_of_several_references_counts() -> None:
    assert normalized_match(["ct"], [["computed tomography", "CT"]], resampling=FAST)[0].value == 1
    with pytest.raises(ValueError, match="item 0 has no reference"):
        normalized_match(["ct"], [[]])


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *["no", "small", "pleural", "effusion", "heart", "lung", "clear"],
    ]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(
        vocab_file=str(folder / "vocab.txt"), vocab=str(folder / "vocab.txt")
    ).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=12,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
        )
    ).save_pretrained(folder)
    return folder


def test_bertscore_equals_its_formula(tiny_bert: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    predictions, references = ["no effusion", "heart"], ["small pleural effusion", "heart"]
    results = bertscore(
        predictions, references, path=str(tiny_bert), layer=1, batch_size=2, resampling=FAST
    )
    tokenizer, model = (
        AutoTokenizer.from_pretrained(tiny_bert),
        AutoModel.from_pretrained(tiny_bert).eval(),
    )

    def vectors(text: str) -> np.ndarray:
        with torch.no_grad():
            states = model(
                **tokenizer(text, return_tensors="pt"), output_hidden_states=True
            ).hidden_states[1][0]
        return (states / states.norm(dim=1, keepdim=True)).numpy()

    for item in range(2):
        mine, theirs = vectors(predictions[item]), vectors(references[item])
        similarity = mine @ theirs.T
        precision, recall = similarity.max(1)[1:-1].mean(), similarity.max(0)[1:-1].mean()
        f1 = 2 * precision * recall / (precision + recall)
        assert [result.per_item[item] for result in results] == pytest.approx(
            [precision, recall, f1], abs=1e-5
        )
    assert results[2].per_item[1] == pytest.approx(1, abs=1e-5)
    assert "layer:1" in results[2].signature


def test_bertscore_of_nothing_is_zero_and_of_no_encoder_an_error(tiny_bert: Path) -> None:
    assert bertscore([""], ["heart"], path=str(tiny_bert), resampling=FAST)[2].value == 0
    with pytest.raises(CheckpointError, match="no encoder at"):
        bertscore(["a"], ["a"], path=str(tiny_bert / "nothing"))
