"""Metrics of short answers, compared as a whole or word by word."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from medm.metrics.base import (
    DEFAULT,
    MetricResult,
    References,
    Resampling,
    as_references,
    check_lengths,
    is_blank,
    mean_result,
)
from medm.metrics.words import ANSWER_SIGNATURE, answer_words, same_answer


def best_of(
    predictions: Sequence[str], references: References, score: Callable[[str, str], float]
) -> list[float]:
    """Return each item's best score over its references.

    A blank prediction scores 0, whatever the reference is.
    """
    check_lengths(predictions, references)
    return [
        0.0 if is_blank(prediction) else max(score(prediction, text) for text in texts)
        for prediction, texts in zip(predictions, as_references(references), strict=True)
    ]


def exact_match(
    predictions: Sequence[str], references: References, *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """Fraction of predictions equal to a reference after trimming and case folding.

    Composed and decomposed accents are the same letters (Unicode's form C).
    """
    scores = best_of(predictions, references, lambda a, b: float(_folded(a) == _folded(b)))
    return [mean_result("exact-match", scores, "exact|nfc|trim|casefold", resampling)]


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip().casefold())


def normalized_match(
    predictions: Sequence[str], references: References, *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """Fraction of predictions equal to a reference after `normalize_answer` (see `same_answer`)."""
    scores = best_of(predictions, references, lambda a, b: float(same_answer(a, b)))
    return [mean_result("normalised-match", scores, f"exact|{ANSWER_SIGNATURE}", resampling)]


def token_f1(
    predictions: Sequence[str], references: References, *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """Mean F1 over normalized words.

    A shared word counts as often as it occurs on both sides (as in SQuAD).
    """
    scores = best_of(predictions, references, word_f1)
    return [mean_result("token-f1", scores, f"multiset|{ANSWER_SIGNATURE}|mean", resampling)]


def word_f1(prediction: str, reference: str) -> float:
    """F1 of the words of two texts.

    If either has no words, it is 1 for the same answer, else 0. An empty prediction scores 0.
    """
    mine, theirs = Counter(answer_words(prediction)), Counter(answer_words(reference))
    if not mine or not theirs:
        return float(same_answer(prediction, reference))
    return 2 * (mine & theirs).total() / (mine.total() + theirs.total())
