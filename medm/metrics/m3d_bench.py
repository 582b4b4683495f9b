"""Original scoring of M3D-Bench (arXiv 2404.00578, public code), with its quirks.

For comparison with published numbers.

METEOR and BERTScore of the published table are `meteor` and `bertscore` of this package, on the
same texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from medm.metrics.base import (
    DEFAULT,
    MetricResult,
    References,
    Resampling,
    as_references,
    check_lengths,
    is_blank,
    mean_result,
    optional,
    undefined,
)
from medm.metrics.boxes import CODECS, Box, enclosing_iou
from medm.metrics.rouge import rouge as corrected_rouge
from medm.metrics.words import ngrams, unsegmented


def bleu(
    predictions: Sequence[str], references: References, *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """Mean over items of unsmoothed BLEU-1 with tokenizer 13a.

    As the `evaluate` library computes it; an empty text scores 0.

    Wrong as a corpus measure: a mean of sentence scores is not corpus BLEU. Corrected: `bleu`.
    """
    check_lengths(predictions, references)
    tokenizers = optional(
        "sacrebleu.tokenizers.tokenizer_13a", package="sacrebleu", extra="text-metrics"
    )
    tokenize = tokenizers.Tokenizer13a()
    scores = []
    for prediction, texts in zip(predictions, as_references(references), strict=True):
        words = tokenize(prediction.strip()).split()
        targets = [tokenize(text.strip()).split() for text in texts]
        scores.append(_bleu_1(words, targets))
    result = mean_result(
        "m3d-bench-bleu-1", scores, "m3d-bench|evaluate-bleu|tok:13a|max_order:1|mean", resampling
    )
    reason = unsegmented(references, "use bleu with 'tokenize: zh'")
    return [result if reason is None else undefined(result, reason)]


def _bleu_1(words: list[str], references: list[list[str]]) -> float:
    shortest = min(map(len, references))
    if not words or not shortest:
        return 0.0
    most = ngrams(references[0], 1)
    for reference in references[1:]:
        most |= ngrams(reference, 1)
    precision = (ngrams(words, 1) & most).total() / len(words)
    return precision * min(1.0, math.exp(1 - shortest / len(words)))


def rouge(
    predictions: Sequence[str], references: References, *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """Mean ROUGE-1 F1 without stemming, under the name of the published column.

    The number is that of `rouge`.
    """
    check_lengths(predictions, references)
    found = corrected_rouge(predictions, references, resampling=resampling)[0]
    drawn = found.signature.partition("stem:no")[2]  # groups and level of the interval
    signature = f"m3d-bench|rouge-score|rouge1|stem:no|mean{drawn}"
    return [replace(found, name="m3d-bench-rouge-1", signature=signature)]


def choice_accuracy(
    predictions: Sequence[str], references: Sequence[str], *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """Fraction of texts that contain "<letter>." anywhere.

    Known flaws: "the AORTA." answers A, and an empty reference is always right.

    Corrected: `choice-accuracy`. References are letters, or texts that begin with one.
    """
    check_lengths(predictions, references)
    letters = [reference.strip()[:1] for reference in references]
    scores = [
        float(not is_blank(text) and (f"{letter}." in text or not letter))
        for letter, text in zip(letters, predictions, strict=True)
    ]
    return [
        mean_result(
            "m3d-bench-choice-accuracy", scores, "m3d-bench|substring:letter+stop", resampling
        )
    ]


def box_iou(
    predictions: Sequence[Box | str | None],
    references: Sequence[Box | str],
    *,
    codec: str = "m3d",
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Mean of intersection over the enclosing box; -1 for an unreadable box.

    Corrected: `box-iou`, where an unreadable box scores 0.
    """
    check_lengths(predictions, references)
    scores = []
    for guess, truth in zip(predictions, references, strict=True):
        guessed = CODECS[codec].parse(guess).first if isinstance(guess, str) else guess
        true = CODECS[codec].parse(truth).first if isinstance(truth, str) else truth
        scores.append(
            -1.0 if guessed is None or true is None else enclosing_iou(tuple(guessed), tuple(true))
        )
    return [
        mean_result(
            "m3d-bench-box-iou", scores, "m3d-bench|enclosing-box|unreadable:-1|mean", resampling
        )
    ]


def soft_dice_of(probabilities: np.ndarray, reference: np.ndarray) -> float:
    """2 sum(p y) / (sum p + sum y + 1)."""
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if p.shape != y.shape:
        raise ValueError(f"probabilities are {p.shape}, reference is {y.shape}")
    return float(2 * (p * y).sum() / (p.sum() + y.sum() + 1))


def dice(
    predictions: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
    *,
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Mean soft Dice on sigmoid probabilities.

    Known flaws: no threshold, and a perfect mask of one voxel scores 2/3.

    Corrected: `dice`.
    """
    check_lengths(predictions, references)
    scores = [soft_dice_of(a, b) for a, b in zip(predictions, references, strict=True)]
    return [mean_result("m3d-bench-dice", scores, "m3d-bench|soft|denominator:+1|mean", resampling)]
