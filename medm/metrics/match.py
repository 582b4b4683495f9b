"""Short answers compared as a whole, or word by word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from medm.metrics.base import DEFAULT, MetricResult, References, Resampling, as_references, check_lengths, mean_result
from medm.metrics.words import ANSWER_SIGNATURE, normalise_answer


def best_of(predictions: Sequence[str], references: References, score: Callable[[str, str], float]) -> list[float]:
    """Each item's best score over its references."""
    check_lengths(predictions, references)
    return [
        max(score(prediction, text) for text in texts)
        for prediction, texts in zip(predictions, as_references(references), strict=True)
    ]


def exact_match(
    predictions: Sequence[str], references: References, *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """Share of predictions equal to a reference after trimming and case folding."""
    scores = best_of(predictions, references, lambda a, b: float(a.strip().casefold() == b.strip().casefold()))
    return [mean_result("exact-match", scores, "exact|trim|casefold", resampling)]


def normalised_match(
    predictions: Sequence[str], references: References, *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """Share of predictions equal to a reference after `normalise_answer`."""
    scores = best_of(predictions, references, lambda a, b: float(normalise_answer(a) == normalise_answer(b)))
    return [mean_result("normalised-match", scores, f"exact|{ANSWER_SIGNATURE}", resampling)]


def token_f1(
    predictions: Sequence[str], references: References, *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """Mean F1 over normalised words, each shared as often as it occurs on both sides (as in SQuAD)."""
    scores = best_of(predictions, references, word_f1)
    return [mean_result("token-f1", scores, f"multiset|{ANSWER_SIGNATURE}|mean", resampling)]


def word_f1(prediction: str, reference: str) -> float:
    """F1 of two texts; 1 when both are empty, 0 when one is."""
    mine, theirs = Counter(normalise_answer(prediction).split()), Counter(normalise_answer(reference).split())
    if not mine or not theirs:
        return float(mine == theirs)
    return 2 * (mine & theirs).total() / (mine.total() + theirs.total())
