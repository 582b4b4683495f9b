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
)

KINDS = {"rouge1": "rouge-1", "rouge2": "rouge-2", "rougeL": "rouge-l"}


def rouge(
    predictions: Sequence[str], references: References, *, resampling: Resampling = DEFAULT, stem: bool = False
) -> list[MetricResult]:
    """Mean F1 of ROUGE-1, 2 and L; with several references the best one counts."""
    check_lengths(predictions, references)
    module = optional("rouge_score.rouge_scorer", package="rouge-score", extra="text-metrics")
    scorer = module.RougeScorer(list(KINDS), use_stemmer=stem)
    scores = [
        scorer.score_multi(list(texts), prediction)
        for prediction, texts in zip(predictions, as_references(references), strict=True)
    ]
    signature = f"rouge-score:{version('rouge-score')}|f1|mean|stem:{'porter' if stem else 'no'}"
    return [
        mean_result(name, [score[kind].fmeasure for score in scores], signature, resampling)
        for kind, name in KINDS.items()
    ]
