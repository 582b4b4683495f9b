"""Labels and scores against labels.

Undefined values (a class that a resample lacks) are left out of means.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from medm.metrics.base import (
    DEFAULT,
    MetricResult,
    Resampling,
    check_lengths,
    is_blank,
    mean_result,
    ratio,
    result_of,
    summed_result,
    with_note,
)


def accuracy(
    predictions: Sequence[Hashable],
    references: Sequence[Hashable],
    *,
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Fraction of equal labels; no label (None, or a blank text) is a miss."""
    check_lengths(predictions, references)
    hits = [float(a == b and not is_blank(a)) for a, b in zip(predictions, references, strict=True)]
    return [mean_result("accuracy", hits, "labels:equal", resampling)]


def balanced_accuracy(
    predictions: Sequence[Hashable],
    references: Sequence[Hashable],
    *,
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Mean over the reference classes of the fraction that is found."""
    statistics, classes = _confusion(predictions, references)

    def recall(sums: np.ndarray) -> np.ndarray:
        return mean_defined(ratio(sums[:, :classes], sums[:, :classes] + sums[:, 2 * classes :]))

    result = summed_result(
        "balanced-accuracy", statistics, recall, f"classes:{classes}|of:references", resampling
    )
    return [with_note(result, _single_class(classes))]


def macro_f1(
    predictions: Sequence[Hashable],
    references: Sequence[Hashable],
    *,
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Mean F1 over the classes of the references.

    A prediction outside of these classes is a miss, and adds no class.
    """
    statistics, classes = _confusion(predictions, references)

    def value(sums: np.ndarray) -> np.ndarray:
        true, false, missed = (
            sums[:, :classes],
            sums[:, classes : 2 * classes],
            sums[:, 2 * classes :],
        )
        f1 = ratio(2 * true, 2 * true + false + missed)
        f1[true + missed == 0] = np.nan  # the class is not in this resample
        return mean_defined(f1)

    result = summed_result(
        "macro-f1", statistics, value, f"classes:{classes}|of:references", resampling
    )
    return [with_note(result, _single_class(classes))]


def _single_class(classes: int) -> str | None:
    return (
        "all references are of one class, which a constant answer gets right"
        if classes == 1
        else None
    )


def sensitivity_specificity(
    predictions: Sequence[int], references: Sequence[int], *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """Sensitivity and specificity: fractions of ones and of zeros that are predicted as such."""
    check_lengths(predictions, references)
    guessed, true = np.asarray(predictions, dtype=int), np.asarray(references, dtype=int)
    for side, values in (("predictions", guessed), ("references", true)):
        if not np.isin(values, (0, 1)).all():
            raise ValueError(
                f"sensitivity-specificity needs 0/1 {side}, found "
                f"{sorted(set(values.tolist()))[:5]}"
            )
    results = []
    for name, label in (("sensitivity", 1), ("specificity", 0)):
        rows = np.stack([(true == label) & (guessed == label), true == label], axis=1)
        fraction = lambda sums: ratio(sums[:, 0], sums[:, 1])  # noqa: E731
        result = summed_result(name, rows, fraction, f"binary|positive:1|class:{label}", resampling)
        missing = len(true) and not (true == label).any()
        results.append(
            with_note(result, f"undefined: no reference is {label}" if missing else None)
        )
    return results


def auroc(
    predictions: Sequence[Sequence[float]] | np.ndarray,
    references: Sequence[Sequence[int]] | np.ndarray,
    *,
    class_names: Sequence[str] | None = None,
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Area under the ROC curve.

    This is the probability that a positive item scores above a negative one; ties count half.

    Args:
        predictions: (n,) or (n, C) scores, higher for positive.
        references: (n,) or (n, C) of 0/1, nan where it is unknown, which leaves the item out of the
            class; for C > 1 also (n,) class numbers, scored one against the rest.
        class_names: C names for the per-class results.
        resampling: how the interval is drawn.

    Returns:
        the mean over the classes that have both labels ("auroc"), then each class where C > 1.
    """
    check_lengths(predictions, references)
    scores, labels = np.asarray(predictions, dtype=np.float64), np.asarray(references)
    scores = scores.reshape(len(scores), -1)
    classes = scores.shape[1]
    if labels.ndim == 1 and classes > 1:
        labels = labels[:, None] == np.arange(classes)
    labels = labels.reshape(len(scores), -1)
    if labels.shape != scores.shape:
        raise ValueError(
            f"auroc: scores are {scores.shape}, labels are {labels.shape}; both need (n, C)"
        )
    if np.isnan(scores).any():
        raise ValueError(
            f"auroc: {int(np.isnan(scores).sum())} scores are nan and cannot be ranked"
        )
    labels = labels.astype(np.float64)
    known = ~np.isnan(labels)
    if not np.isin(labels[known], (0, 1)).all():
        raise ValueError(f"auroc needs 0/1 labels, found {sorted(set(labels[known].tolist()))[:5]}")
    columns = [_RankedScores(scores[:, c], labels[:, c] == 1, known[:, c]) for c in range(classes)]
    names = class_names or [str(c) for c in range(classes)]
    signature = f"mann-whitney|ties:half|classes:{classes}"
    mean = result_of(
        "auroc",
        lambda counts: mean_defined(np.stack([column(counts) for column in columns], axis=1)),
        len(scores),
        f"{signature}|macro",
        resampling,
    )
    reasons = [_one_label(labels[:, c]) for c in range(classes)]
    if classes == 1:
        return [with_note(mean, reasons[0])]
    left_out = [
        str(name) for name, reason in zip(names, reasons, strict=True) if reason is not None
    ]
    if left_out and len(scores):
        mean = with_note(
            mean,
            f"{len(left_out)} of {classes} classes have one label only and are left out: "
            f"{', '.join(left_out)}",
        )
    return [mean] + [
        with_note(result_of(f"auroc[{name}]", column, len(scores), signature, resampling), reason)
        for name, column, reason in zip(names, columns, reasons, strict=True)
    ]


def _one_label(labels: np.ndarray) -> str | None:
    """Return the reason why a class has no area under the curve, or None if it has one."""
    known = labels[~np.isnan(labels)]
    found = sorted(set(known.astype(int).tolist()))
    if len(labels) and not found:
        return f"undefined: all {len(labels)} labels are unknown"
    return f"undefined: all {len(known)} labels are {found[0]}" if len(found) == 1 else None


class _RankedScores:
    """One class's AUROC under any counts of the items; sorted once."""

    def __init__(self, scores: np.ndarray, positive: np.ndarray, known: np.ndarray) -> None:
        items = np.flatnonzero(known)
        self.order = items[np.argsort(scores[items], kind="stable")]
        ranked = scores[self.order]
        self.positive = positive[self.order]
        self.starts = (
            np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
            if len(ranked)
            else np.array([], int)
        )

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """(R, n) -> (R,); nan where a resample holds only one label."""
        if not len(self.order):
            return np.full(len(counts), np.nan)
        counts = counts[:, self.order]
        positives = np.add.reduceat(
            counts * self.positive, self.starts, axis=1
        )  # (R, distinct scores)
        negatives = np.add.reduceat(counts * ~self.positive, self.starts, axis=1)
        below = np.cumsum(negatives, axis=1) - negatives
        wins = (positives * (below + negatives / 2)).sum(axis=1)
        return ratio(wins, positives.sum(axis=1) * negatives.sum(axis=1))


def _confusion(
    predictions: Sequence[Hashable], references: Sequence[Hashable]
) -> tuple[np.ndarray, int]:
    """(n, 3C) rows of true, false and missed for each class of the references, and C."""
    n = check_lengths(predictions, references)
    index = {label: number for number, label in enumerate(dict.fromkeys(references))}
    rows = np.zeros((n, 3, len(index)))
    for item, (guess, truth) in enumerate(zip(predictions, references, strict=True)):
        if guess == truth and not is_blank(guess):
            rows[item, 0, index[truth]] = 1
            continue
        rows[item, 2, index[truth]] = 1
        if guess in index:
            rows[item, 1, index[guess]] = 1
    return rows.reshape(n, -1), len(index)


def mean_defined(values: np.ndarray) -> np.ndarray:
    """(R, C) -> (R,): the mean without nan; nan where all are."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0.0).sum(axis=1), defined.sum(axis=1).astype(float))
