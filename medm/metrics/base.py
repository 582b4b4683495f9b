"""Result of a metric, and the bootstrap of its interval.

Every value is a function of the counts of the items. The interval is that function on random counts
(items drawn with replacement), and two systems are compared under the same counts. Items that
depend on each other (questions about one volume) are drawn together, as the group that they are.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Protocol, TypeAlias

import numpy as np

from medm.errors import DeviceError

Reweighted: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""(R, n) counts of the items in R resamples -> (R,) values of the metric; nan where it is
undefined."""

References: TypeAlias = Sequence[str | Sequence[str]]
"""One reference text for each item, or several."""


@dataclass(frozen=True, slots=True)
class Clusters:
    """Groups of items that depend on each other."""

    field: str
    """Record field that names the group ("volume", "patient")."""
    members: tuple[str, ...]
    """Its value for each item; equal values are one group."""

    @property
    def count(self) -> int:
        """Number of groups."""
        return len(set(self.members))

    def numbers(self) -> np.ndarray:
        """(n,) group of each item, from 0 in the order of the groups' names."""
        return np.unique(np.asarray(self.members, dtype=str), return_inverse=True)[1].reshape(-1)


@dataclass(frozen=True, slots=True)
class Resampling:
    """Settings of the bootstrap behind an interval."""

    rounds: int = 1000
    """Number of bootstrap samples; 0 leaves the interval out (nan)."""
    seed: int = 0
    """Seed of the draw: the same predictions give the same interval."""
    level: float = 0.95
    """Fraction of the bootstrap values inside the interval."""
    clusters: Clusters | None = None
    """Groups that are drawn whole; None where every item is independent."""

    def part(self, indices: Sequence[int]) -> Resampling:
        """Return the resampling of a subset of the items, for metrics that score no others."""
        if self.clusters is None:
            return self
        members = tuple(self.clusters.members[index] for index in indices)
        return replace(self, clusters=replace(self.clusters, members=members))


DEFAULT = Resampling()


@dataclass(frozen=True, slots=True)
class MetricResult:
    """A number with its interval, signature and caveats."""

    name: str
    value: float
    """nan where the metric is undefined (no items, one class only)."""
    n: int
    """Items that were scored."""
    low: float
    high: float
    """Bounds of the percentile bootstrap interval (95 % or as the signature says). nan for a single
    group."""
    signature: str
    """Variant, tokenizer, normalization, version: results with different signatures are not
    comparable."""
    per_item: list[float] | None = None
    """Score of each item, only where `value` is exactly their mean."""
    reweighted: Reweighted | None = field(default=None, repr=False, compare=False)
    """The value under other counts of the items, for comparisons; not stored."""
    clusters: Clusters | None = field(default=None, repr=False, compare=False)
    """Groups of items that were drawn whole; their number is stored."""
    note: str | None = None
    """Caveat of this number, or the reason why it is undefined."""

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON: undefined numbers are None, the function is left out."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {
            "name": self.name,
            "n": self.n,
            "signature": self.signature,
            **{key: None if math.isnan(number) else number for key, number in numbers.items()},
            **(
                {}
                if self.clusters is None
                else {"cluster_by": self.clusters.field, "clusters": self.clusters.count}
            ),
            **({} if self.per_item is None else {"per_item": self.per_item}),
            **({} if self.note is None else {"note": self.note}),
        }


class Metric(Protocol):
    """A member of the table. Some give several results from one pass (BLEU-1 to 4)."""

    def __call__(
        self, predictions: Any, references: Any, *, resampling: Resampling = ..., **options: Any
    ) -> list[MetricResult]:
        """Compare `predictions[i]` with `references[i]`.

        Raises `ValueError` when the lengths differ.
        """
        ...


def check_lengths(predictions: Sized, references: Sized) -> int:
    """Return the number of items; raises `ValueError` when the two sides differ."""
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references: scoring them "
            "pairwise would be meaningless; check that the predictions file belongs to this split"
        )
    return len(predictions)


def as_references(references: References) -> list[tuple[str, ...]]:
    """Each item's reference texts as a tuple. Raises `ValueError` for an item without any."""
    result = [(item,) if isinstance(item, str) else tuple(item) for item in references]
    for index, texts in enumerate(result):
        if not texts:
            raise ValueError(f"item {index} has no reference text")
    return result


def draws(n: int, resampling: Resampling, chunk: int = 64) -> Iterator[np.ndarray]:
    """Bootstrap counts, (chunk, n) at a time. The same seed, n and groups give the same rows.

    Independent items are drawn n times, so that a row sums to n. Groups are drawn as often as there
    are groups, and every item of one counts as often as its group came.
    """
    random = np.random.default_rng(resampling.seed)
    group_of = None if resampling.clusters is None else resampling.clusters.numbers()
    units = n if group_of is None else int(group_of.max()) + 1
    for start in range(0, resampling.rounds, chunk):
        rows = min(chunk, resampling.rounds - start)
        picked = random.integers(units, size=(rows, units)) + np.arange(rows)[:, None] * units
        counts = (
            np.bincount(picked.ravel(), minlength=rows * units)
            .reshape(rows, units)
            .astype(np.float64)
        )
        yield counts if group_of is None else counts[:, group_of]


def percentile_interval(values: np.ndarray, level: float) -> tuple[float, float]:
    """Return the bounds with (1 - level) / 2 of the defined values on each side.

    Both are nan if no value is defined.
    """
    defined = values[~np.isnan(values)]
    if not len(defined):
        return math.nan, math.nan
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def result_of(
    name: str,
    reweighted: Reweighted,
    n: int,
    signature: str,
    resampling: Resampling,
    *,
    per_item: Sequence[float] | np.ndarray | None = None,
) -> MetricResult:
    """Return the metric at one count each, with its bootstrap interval.

    Raises:
        ValueError: the groups of `resampling` are those of other items.
    """
    clusters = resampling.clusters
    if clusters is not None:
        if len(clusters.members) != n:
            raise ValueError(
                f"{name}: {n} items are scored, but groups by {clusters.field!r} are given for "
                f"{len(clusters.members)}; a metric that leaves items out passes on "
                "resampling.part(indices)"
            )
        if f"|cluster:{clusters.field}" not in signature:
            signature = f"{signature}|cluster:{clusters.field}"
    if n == 0:
        return MetricResult(name, math.nan, 0, math.nan, math.nan, signature)
    value = float(reweighted(np.ones((1, n)))[0])
    alone = (
        clusters is not None and clusters.count < 2
    )  # one group drawn again and again varies by nothing
    sampled = [] if alone else [reweighted(counts) for counts in draws(n, resampling)]
    low, high = (
        percentile_interval(np.concatenate(sampled), resampling.level)
        if sampled
        else (math.nan, math.nan)
    )
    if resampling.level != 0.95:
        signature = f"{signature}|interval:{resampling.level:g}"
    scores = None if per_item is None else [float(score) for score in per_item]
    return MetricResult(name, value, n, low, high, signature, scores, reweighted, clusters)


def mean_result(
    name: str, per_item: Sequence[float] | np.ndarray, signature: str, resampling: Resampling
) -> MetricResult:
    """Return the mean of item scores."""
    scores = np.asarray(per_item, dtype=np.float64)
    return result_of(
        name,
        lambda counts: counts @ scores / counts.sum(axis=1),
        len(scores),
        signature,
        resampling,
        per_item=per_item,
    )


def summed_result(
    name: str,
    statistics: np.ndarray,
    finish: Callable[[np.ndarray], np.ndarray],
    signature: str,
    resampling: Resampling,
) -> MetricResult:
    """Return the result of a corpus metric.

    The metric is a function `(R, k) -> (R,)` of the sums over items of `statistics` (n, k).
    """
    statistics = np.asarray(statistics, dtype=np.float64)
    return result_of(
        name, lambda counts: finish(counts @ statistics), len(statistics), signature, resampling
    )


def with_note(result: MetricResult, note: str | None) -> MetricResult:
    """Return the result with a note, after one that it already has. None changes nothing."""
    if note is None:
        return result
    return replace(result, note=note if result.note is None else f"{result.note}; {note}")


def undefined(result: MetricResult, reason: str) -> MetricResult:
    """Return the result without its number, where the metric has no meaning for these data."""
    return replace(
        result,
        value=math.nan,
        low=math.nan,
        high=math.nan,
        per_item=None,
        reweighted=None,
        note=reason,
    )


def is_blank(prediction: object) -> bool:
    """True for no prediction: None, or a text without any visible character."""
    return prediction is None or (isinstance(prediction, str) and not prediction.strip())


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Element-wise quotient; nan where the denominator is 0."""
    safe = np.where(denominator == 0, 1.0, denominator)
    return np.where(denominator == 0, np.nan, numerator / safe)


def optional(module: str, *, package: str, extra: str) -> ModuleType:
    """An optional library, or a `DeviceError` that says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise DeviceError(
            f"this metric needs {package}: pip install '{package}' (or 'medm[{extra}]')"
        ) from None
