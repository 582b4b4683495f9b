"""Scores of several labels an item against labels that are present, absent or unknown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np

from medm.metrics.base import (
    DEFAULT,
    MetricResult,
    Resampling,
    mean_result,
    ratio,
    summed_result,
    undefined,
    with_note,
)
from medm.metrics.classification import mean_defined

Criterion: TypeAlias = Literal["f1", "youden"]


def label_decisions(
    scores: np.ndarray,
    truths: np.ndarray,
    *,
    names: Sequence[str],
    thresholds: np.ndarray,
    undefined_as: Literal["left-out", "zero"] = "left-out",
    threshold_name: str = "0.5",
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """F1, sensitivity and specificity of decisions: means over the labels, then each label, and the
    fraction of items with every known label right.

    A label is decided present where its score reaches its threshold. Unknown labels count in
    nothing. A label without a positive or a negative item has no numbers.

    Args:
        scores: (n, L), higher for present; minus and plus infinity are allowed, nan is not.
        truths: (n, L), 1 present, 0 absent, nan unknown.
        names: L names.
        thresholds: (L,), in the unit of the scores.
        undefined_as: labels without a positive or a negative are left out of the means, and named;
            `zero` counts each undefined value as 0, as scikit-learn does.
        threshold_name: for the signature.
        resampling: how intervals are drawn.

    Returns:
        "macro-f1", "micro-f1", "weighted-f1" (by the positives of each label), "sensitivity",
        "specificity", "exact-match"; then "f1[name]", "sensitivity[name]", "specificity[name]".

    Raises:
        ValueError: shapes that differ, or a score that is nan.
    """
    scores, truths = np.asarray(scores, np.float64), np.asarray(truths, np.float64)
    if scores.shape != truths.shape or scores.ndim != 2 or scores.shape[1] != len(names):
        raise ValueError(
            f"labels: scores are {scores.shape}, truths are {truths.shape}; both need "
            f"(n, {len(names)})"
        )
    if np.isnan(scores).any():
        raise ValueError(f"labels: {int(np.isnan(scores).sum())} scores are nan")
    known, present = ~np.isnan(truths), truths == 1
    decided = scores >= np.asarray(thresholds, np.float64)
    labels = len(names)
    statistics = np.concatenate(
        [
            known & decided & present,
            known & decided & ~present,
            known & ~decided & present,
            known & ~decided & ~present,
        ],
        axis=1,
    )
    reasons = one_sided(truths)
    usable = np.array([reason is None for reason in reasons])
    kept = usable if undefined_as == "left-out" else np.ones(labels, dtype=bool)
    signature = f"labels:{int(kept.sum())}|threshold:{threshold_name}|undefined:{undefined_as}"
    left_out = [name for name, reason in zip(names, reasons, strict=True) if reason is not None]
    note = None
    if left_out and len(scores) and undefined_as == "left-out":
        note = (
            f"{len(left_out)} of {labels} labels have no positive or no negative item and are left "
            f"out: {', '.join(left_out)}"
        )

    def mean_of(
        values: Callable[[_Counts], np.ndarray],
    ) -> Callable[[np.ndarray], np.ndarray]:
        def mean(sums: np.ndarray) -> np.ndarray:
            found = values(_Counts(sums, labels))[:, kept]
            return mean_defined(found if undefined_as == "left-out" else np.nan_to_num(found))

        return mean

    def micro(sums: np.ndarray) -> np.ndarray:
        counts = _Counts(sums, labels)
        tp, wrong = (part[:, kept].sum(axis=1) for part in (counts.tp, counts.fp + counts.fn))
        return ratio(2 * tp, 2 * tp + wrong)

    def weighted(sums: np.ndarray) -> np.ndarray:
        counts = _Counts(sums, labels)
        weights = (counts.tp + counts.fn)[:, kept]
        return ratio((np.nan_to_num(counts.f1[:, kept]) * weights).sum(axis=1), weights.sum(axis=1))

    means = {
        "macro-f1": mean_of(lambda counts: counts.f1),
        "micro-f1": micro,
        "weighted-f1": weighted,
        "sensitivity": mean_of(lambda counts: counts.sensitivity),
        "specificity": mean_of(lambda counts: counts.specificity),
    }
    results = [
        with_note(summed_result(name, statistics, value, signature, resampling), note)
        for name, value in means.items()
    ]
    right = ((decided == present) | ~known).all(axis=1)
    match = f"labels:{labels}|threshold:{threshold_name}|every known label"
    results.append(mean_result("exact-match", right.astype(float), match, resampling))
    if undefined_as == "zero":
        return results
    for place, (name, reason) in enumerate(zip(names, reasons, strict=True)):
        columns = statistics[:, place::labels]
        single = f"binary|positive:1|threshold:{threshold_name}"
        for metric, value in _OF_ONE.items():
            result = summed_result(f"{metric}[{name}]", columns, value, single, resampling)
            results.append(result if reason is None else undefined(result, reason))
    return results


class _Counts:
    """True and false positives, false and true negatives of L labels, each (R, L)."""

    def __init__(self, sums: np.ndarray, labels: int) -> None:
        self.tp, self.fp, self.fn, self.tn = (
            sums[:, part * labels : (part + 1) * labels] for part in range(4)
        )

    @property
    def f1(self) -> np.ndarray:
        """Nan where there is neither a positive item nor a positive decision."""
        return ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def sensitivity(self) -> np.ndarray:
        return ratio(self.tp, self.tp + self.fn)

    @property
    def specificity(self) -> np.ndarray:
        return ratio(self.tn, self.tn + self.fp)


_OF_ONE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "f1": lambda sums: _Counts(sums, 1).f1[:, 0],
    "sensitivity": lambda sums: _Counts(sums, 1).sensitivity[:, 0],
    "specificity": lambda sums: _Counts(sums, 1).specificity[:, 0],
}


def one_sided(truths: np.ndarray) -> list[str | None]:
    """Return for each label of (n, L) why it has no numbers: no positive or no negative item."""
    reasons: list[str | None] = []
    for column in truths.T:
        known = column[~np.isnan(column)]
        if (known == 1).any() and (known == 0).any():
            reasons.append(None)
        elif not len(known):
            reasons.append("undefined: no item has this label known")
        else:
            reasons.append(f"undefined: all {len(known)} known labels are {int(known[0])}")
    return reasons


def best_thresholds(
    scores: np.ndarray, truths: np.ndarray, *, names: Sequence[str], criterion: Criterion
) -> list[MetricResult]:
    """Threshold of each label with the best F1 or Youden's J (sensitivity + specificity - 1).

    For items that are not those of the test: a threshold chosen on what it is scored on is too
    good. Of several the highest is taken. A label without a positive or a negative item has none.

    Args:
        scores: (n, L), as in `label_decisions`; infinite scores are no thresholds.
        truths: (n, L), 1 present, 0 absent, nan unknown.
        names: L names.
        criterion: what is best.

    Returns:
        "threshold[name]" for each label, without an interval.
    """
    results = []
    for place, (name, reason) in enumerate(zip(names, one_sided(truths), strict=True)):
        known = ~np.isnan(truths[:, place])
        column, present = scores[known, place], truths[known, place] == 1
        signature = f"best:{criterion}|decided:score>=threshold"
        value = math.nan
        if reason is None:
            value = _best(column, present, criterion)
        if reason is None and math.isnan(value):
            reason = "undefined: no item has a score"
        result = MetricResult(
            f"threshold[{name}]", value, int(known.sum()), math.nan, math.nan, signature
        )
        results.append(with_note(result, reason))
    return results


def _best(scores: np.ndarray, present: np.ndarray, criterion: Criterion) -> float:
    order = np.argsort(-scores, kind="stable")
    ranked, positive = scores[order], present[order]
    last = np.r_[ranked[1:] != ranked[:-1], True] & np.isfinite(ranked)  # of equal scores
    tp, fp = np.cumsum(positive), np.cumsum(~positive)
    if criterion == "f1":
        value = 2 * tp / (tp + fp + positive.sum())
    else:
        value = tp / positive.sum() - fp / (~positive).sum()
    if not last.any():
        return math.nan
    return float(ranked[int(np.argmax(np.where(last, value, -np.inf)))])
