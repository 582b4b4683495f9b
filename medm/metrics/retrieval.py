"""Retrieval by similarity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from medm.metrics.base import DEFAULT, MetricResult, Resampling, mean_result, result_of, undefined


def ranks(similarity: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """(Q,) rank from 1 of each query's best relevant candidate.

    A tie counts against the query: a model that gives all candidates the same score ranks last, not
    first.

    Args:
        similarity: (Q, C), higher is nearer.
        relevant: (Q, C) booleans; every query needs at least one.
    """
    if similarity.shape != relevant.shape:
        raise ValueError(f"similarity is {similarity.shape}, relevance is {relevant.shape}")
    if not relevant.any(axis=1).all():
        raise ValueError(f"{int((~relevant.any(axis=1)).sum())} queries have no relevant candidate")
    if np.isnan(similarity).any():
        raise ValueError("similarities hold nan and cannot be ranked")
    best = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((similarity >= best) & ~relevant).sum(axis=1)


def nearest(queries: np.ndarray, candidates: np.ndarray, k: int) -> Iterator[np.ndarray]:
    """Yield for each query the (k,) positions of the candidates with the highest cosines, in
    ascending order of position; all of them where there are no more.

    Args:
        queries: (Q, D) vectors of any length.
        candidates: (C, D).
        k: candidates of a query.
    """
    queries, candidates = unit(queries), unit(candidates)
    k = min(k, len(candidates))
    for start in range(0, len(queries), _BLOCK):
        similarity = queries[start : start + _BLOCK] @ candidates.T
        for row in np.argpartition(-similarity, k - 1, axis=1)[:, :k] if k else similarity[:, :0]:
            yield np.sort(row)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors (N, D) of length 1; one without length stays."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


_BLOCK = 1024
"""Queries that are compared at once."""


def recall_at_k(
    predictions: np.ndarray,
    references: np.ndarray | None = None,
    *,
    cutoffs: Sequence[int] = (1, 5, 10),
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Fraction of queries with a relevant candidate among the first k, and the median rank.

    Both are computed in both directions.

    Args:
        predictions: (Q, C) similarities, images in rows and texts in columns.
        references: (Q, C) relevance; without it row i belongs to column i.
        cutoffs: the values of k.
        resampling: how the interval is drawn.
    """
    similarity = np.asarray(predictions, dtype=np.float64)
    relevant = (
        np.eye(*similarity.shape) == 1 if references is None else np.asarray(references, dtype=bool)
    )
    results = []
    for direction, scores, wanted in (
        ("image-to-text", similarity, relevant),
        ("text-to-image", similarity.T, relevant.T),
    ):
        place = ranks(scores, wanted)
        results += recall_of_ranks(
            place, scores.shape[1], direction, cutoffs=cutoffs, resampling=resampling
        )
    return results


def recall_of_ranks(
    place: np.ndarray,
    candidates: int,
    direction: str,
    *,
    cutoffs: Sequence[int] = (1, 5, 10),
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Fraction of queries whose rank is among the first k, and the median rank.

    Args:
        place: (Q,) rank from 1 of each query's best relevant candidate.
        candidates: how many were ranked.
        direction: beginning of the names of the results.
        cutoffs: the values of k.
        resampling: how the interval is drawn.
    """
    results = []
    signature = f"{direction}|candidates:{candidates}|ties:last"
    for k in cutoffs:
        result = mean_result(
            f"{direction}-R@{k}", (place <= k).astype(float), signature, resampling
        )
        if len(place) and k >= candidates:
            reason = (
                f"undefined: any ranking of {candidates} candidates has the right one among {k}"
            )
            result = undefined(result, reason)
        results.append(result)
    median = _WeightedMedian(place)
    results.append(result_of(f"{direction}-median-rank", median, len(place), signature, resampling))
    return results


class _WeightedMedian:
    """Median of values with counts.

    The mean of the middle two if the total count is even.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.order = np.argsort(values, kind="stable")
        self.values = values[self.order].astype(float)

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        cumulated = np.cumsum(counts[:, self.order], axis=1)
        total = cumulated[:, -1:]
        lower = (cumulated < np.floor((total + 1) / 2)).sum(axis=1)
        upper = (cumulated < np.floor(total / 2) + 1).sum(axis=1)
        return (self.values[lower] + self.values[upper]) / 2
