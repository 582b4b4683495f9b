"""ROUGE by Google's rouge-score (Lin 2004)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from medm.metrics.base import (
    DEFAULT,
    MetricResult,
    References,
    Resampling,
    as_references,
    check_lengths,
    mean_result,
    optional,
    undefined,
    with_note,
)
from medm.metrics.words import answer_words, fraction_outside_ascii

_FEW = 0.01
"""Fraction of letters that rouge-score may drop ("naïve", "µm") before its number means something
else."""
KINDS = {"rouge1": "rouge-1", "rouge2": "rouge-2", "rougeL": "rouge-l"}


def rouge(
    predictions: Sequence[str],
    references: References,
    *,
    resampling: Resampling = DEFAULT,
    stem: bool = False,
    words: str = "rouge-score",
) -> list[MetricResult]:
    """Mean F1 of ROUGE-1, 2 and L; with several references the best one counts.

    rouge-score sees the letters a to z and digits alone. References with more than a few other
    letters have no ROUGE of that program; `words="unicode"` counts the words of any language
    (characters, in scripts without spaces).
    """
    check_lengths(predictions, references)
    module = optional("rouge_score.rouge_scorer", package="rouge-score", extra="text-metrics")
    scorer = module.RougeScorer(
        list(KINDS), use_stemmer=stem, tokenizer=_AnyLanguage() if words == "unicode" else None
    )
    scores = [
        scorer.score_multi(list(texts), prediction)
        for prediction, texts in zip(predictions, as_references(references), strict=True)
    ]
    signature = f"rouge-score:{version('rouge-score')}|f1|mean|stem:{'porter' if stem else 'no'}"
    if words == "unicode":
        signature += "|words:unicode"
    results = [
        mean_result(name, [score[kind].fmeasure for score in scores], signature, resampling)
        for kind, name in KINDS.items()
    ]
    dropped = fraction_outside_ascii(references) if words == "rouge-score" else 0.0
    if dropped == 0:
        return results
    note = f"rouge-score drops letters other than a to z, {dropped:.1%} of those of the references"
    if dropped < _FEW:
        return [with_note(result, note) for result in results]
    return [
        undefined(result, f"{note}; rouge with 'words: unicode' counts them") for result in results
    ]


class _AnyLanguage:
    """A tokenizer for rouge-score: words of normalized answers."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        return answer_words(text)
