"""Paired tests of two systems on the same items, from two results of one metric."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np

from medm.metrics.base import MetricResult, Resampling, draws, percentile_interval


@dataclass(frozen=True, slots=True)
class Comparison:
    """First against second."""

    name: str
    first: float
    second: float
    difference: float
    """first - second."""
    low: float
    high: float
    """Paired bootstrap interval of the difference."""
    p_value: float
    """Two-sided; the hypothesis is that both systems are equally good."""
    n: int
    test: str
    """"randomisation" (item scores exchanged between the systems) where the metric is a mean of
    item scores, else "bootstrap" (how often the difference changes its sign); "none" where the
    metric is undefined."""
    signature: str
    clusters: int | None = None
    """Number of groups that were drawn and exchanged whole; None where every item is
    independent."""

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON: undefined numbers are None."""
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in asdict(self).items()
        }


def compare(
    first: MetricResult, second: MetricResult, resampling: Resampling | None = None
) -> Comparison:
    """Compare two systems scored by the same metric on the same items in the same order.

    Where the metric is undefined for a side, so are difference, interval and p-value (nan).
    Items that were grouped for the intervals of the results are drawn, and exchanged, as the same
    whole groups.

    Raises:
        ValueError: the results have different metrics, signatures or numbers of items, or were read
            from a file and are not means (item scores are all that a file keeps).
    """
    for what in ("name", "signature", "n", "clusters"):
        if getattr(first, what) != getattr(second, what):
            raise ValueError(
                f"cannot compare: {what} is {getattr(first, what)!r} in the first and "
                f"{getattr(second, what)!r} in the second; score both with the same metric on the "
                "same items"
            )
    clusters = first.clusters
    if clusters is None and "|cluster:" in first.signature:
        raise ValueError(
            f"{first.name} was scored by groups that a file does not keep: score the predictions "
            "again"
        )
    groups = None if clusters is None else clusters.count
    if math.isnan(first.value) or math.isnan(second.value):
        nan = math.nan
        return Comparison(
            first.name,
            first.value,
            second.value,
            nan,
            nan,
            nan,
            nan,
            first.n,
            "none",
            first.signature,
            groups,
        )
    resampling = replace(resampling or Resampling(), clusters=clusters)
    deltas = _differences(first, second, resampling)
    low, high = percentile_interval(deltas, resampling.level)
    difference = first.value - second.value
    if first.per_item is not None and second.per_item is not None:
        p_value = randomization_test(
            np.asarray(first.per_item), np.asarray(second.per_item), resampling
        )
        test = "randomisation"
    else:
        p_value, test = _sign_change(deltas), "bootstrap"
    return Comparison(
        first.name,
        first.value,
        second.value,
        difference,
        low,
        high,
        p_value,
        first.n,
        test,
        first.signature,
        groups,
    )


def randomization_test(first: np.ndarray, second: np.ndarray, resampling: Resampling) -> float:
    """Return the two-sided p-value of the mean difference under random exchange.

    The two scores of each item, or of each group, are exchanged.

    With `rounds` shuffles the least possible value is 1 / (rounds + 1) (Phipson and Smyth 2010).
    """
    deltas = first - second
    if not len(deltas):
        return math.nan
    if resampling.clusters is not None:
        deltas = np.bincount(
            resampling.clusters.numbers(), weights=deltas
        )  # what exchanging a whole group changes
    random = np.random.default_rng(resampling.seed)
    observed, as_far = abs(deltas.sum()), 0
    for _ in range(resampling.rounds):
        signs = random.integers(0, 2, size=len(deltas)) * 2 - 1
        as_far += bool(abs(signs @ deltas) >= observed - 1e-12)
    return (as_far + 1) / (resampling.rounds + 1)


def _differences(first: MetricResult, second: MetricResult, resampling: Resampling) -> np.ndarray:
    """(rounds,) differences under common counts of the items."""
    values = []
    for result in (first, second):
        if result.reweighted is not None:
            values.append(result.reweighted)
        elif result.per_item is not None:
            scores = np.asarray(result.per_item)
            values.append(partial(_mean, scores))
        else:
            raise ValueError(
                f"{result.name} is a corpus metric without item scores: score the predictions again"
            )
    alone = resampling.clusters is not None and resampling.clusters.count < 2
    drawn = draws(first.n, resampling) if first.n and not alone else ()
    chunks = [values[0](counts) - values[1](counts) for counts in drawn]
    return np.concatenate(chunks) if chunks else np.array([np.nan])


def _mean(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return counts @ scores / counts.sum(axis=1)


def _sign_change(deltas: np.ndarray) -> float:
    defined = deltas[~np.isnan(deltas)]
    if not len(defined):
        return math.nan
    tail = min((defined <= 0).sum(), (defined >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(defined) + 1)))
