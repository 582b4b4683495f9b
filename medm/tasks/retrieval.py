"""Image-text retrieval: which caption belongs to an image, and which image to a caption."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from medm.data.options import SourceOptions
from medm.data.pairs import Pairs
from medm.data.records import Records
from medm.errors import DataError
from medm.metrics.base import Clusters, MetricResult, Resampling
from medm.metrics.retrieval import ranks, recall_of_ranks
from medm.tasks import prompts
from medm.tasks.base import FAILED, Record, Task, make_sample, pick_template
from medm.tasks.benchmark_files import require
from medm.types import PredictionField, Sample

_BLOCK = 1024
"""Queries that are ranked at once."""


class Retrieval(Task):
    """Recall at 1, 5 and 10 of images and captions by the cosine of their vectors.

    A caption is right for every image that has the same caption. Ties count against the query.

    Args:
        options: see `medm.tasks.RetrievalOptions`.
    """

    needs: frozenset[PredictionField] = frozenset({"embeddings"})
    tag = "caption"
    splits = ("test", "train")
    layout = "the annotation file of pairs that `path` names, and its images or volumes"

    def __init__(
        self, *, path: str, rounds: int = 1000, seed: int = 0, cluster_by: str | None = None
    ) -> None:
        super().__init__(rounds=rounds, seed=seed, cluster_by=cluster_by)
        self.path = path

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        self._known_split(split)
        file = require(Path(folder), self.path, layout=self.layout)
        records = Records([SourceOptions(path=str(file), root=str(folder))], Pairs())
        for index in range(len(records)):
            pair = records[index]
            pool = prompts.VOLUME_REPORT if pair.item.branch == "volume" else prompts.CAPTION
            yield make_sample(
                pick_template(pool, rng),
                id=pair.id if pair.id is not None else str(index),
                tag=self.tag,
                answer=pair.captions[0],
                media=[pair.item],
                captions=list(pair.captions),
                **pair.extra,
            )

    def is_empty(self, record: Record) -> bool:
        return record.get("embedding") is None

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        if not records:
            return []
        images, texts, owner = vectors_of(records)
        captions = [" ".join(text.split()) for record in records for text in record["captions"]]
        same: dict[str, list[int]] = {}
        for place, text in enumerate(captions):
            same.setdefault(text, []).append(place)
        own: list[list[int]] = [[] for _ in records]
        for place, image in enumerate(owner.tolist()):
            own[image] += same[captions[place]]
        holders = {text: owner[places].tolist() for text, places in same.items()}
        drawn = self.resampling_of(records)
        to_text = rank_places(images, texts, own)
        to_image = rank_places(texts, images, [holders[text] for text in captions])
        return [
            *recall_of_ranks(to_text, len(texts), "image-to-text", resampling=drawn),
            *recall_of_ranks(
                to_image, len(images), "text-to-image", resampling=_of_texts(drawn, owner)
            ),
        ]


def vectors_of(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors of length 1 of the images (N, D) and captions (M, D), and the image of each caption
    (M,). A row of nan is a vector that is missing.

    Raises:
        DataError: a record has not one vector for each caption, or of another length.
    """
    found = next((record["embedding"] for record in records if _has_vectors(record)), [0.0])
    dim = len(found)
    images = np.full((len(records), dim), np.nan)
    owner = np.repeat(np.arange(len(records)), [len(record["captions"]) for record in records])
    texts = np.full((len(owner), dim), np.nan)
    start = 0
    for row, record in enumerate(records):
        count = len(record["captions"])
        if _has_vectors(record):
            own, others = record["embedding"], record.get("text_embeddings") or []
            if len(others) != count or any(len(one) != dim for one in (own, *others)):
                raise DataError(
                    f"record {record.get('id')!r}: expected a vector of {dim} numbers and "
                    f"{count} of its captions, found one of {len(own)} and {len(others)}"
                )
            images[row] = own
            texts[start : start + count] = others
        start += count
    for array in (images, texts):
        array /= np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12)
    return images, texts, owner


def _has_vectors(record: Record) -> bool:
    return record.get(FAILED) is None and record.get("embedding") is not None


def rank_places(
    queries: np.ndarray,
    candidates: np.ndarray,
    relevant: Sequence[Sequence[int]],
    *,
    matches: np.ndarray | None = None,
    matched: int = 0,
) -> np.ndarray:
    """Return the rank of each query's best right candidate, (Q,).

    A vector that is missing is similar to none and, as a query, ranks the right one last.

    Args:
        queries: (Q, D) vectors of length 1.
        candidates: (C, D).
        relevant: right candidates of each query.
        matches: (Q, C) scores of a match, nan where there is none. The best candidates by cosine
            are ranked again by the sum of both, before all others (ALBEF, BLIP).
        matched: how many of them.
    """
    places = [np.zeros(0, dtype=int)]
    for start in range(0, len(queries), _BLOCK):
        block = queries[start : start + _BLOCK]
        similarity = block @ candidates.T
        if matches is not None:
            similarity = _ranked_again(similarity, matches[start : start + _BLOCK], matched)
        right = np.zeros(similarity.shape, dtype=bool)
        for row in range(len(block)):
            right[row, relevant[start + row]] = True
        place = ranks(np.where(np.isnan(similarity), -np.inf, similarity), right)
        places.append(np.where(np.isnan(block[:, 0]), len(candidates), place))
    return np.concatenate(places)


def _ranked_again(similarity: np.ndarray, matches: np.ndarray, matched: int) -> np.ndarray:
    """Return similarities (Q, C) whose best ones have their match added and lie above the rest."""
    count = min(matched, similarity.shape[1])
    if not count:
        return similarity
    order = np.where(np.isnan(similarity), np.inf, -similarity)
    best = np.zeros(similarity.shape, dtype=bool)
    np.put_along_axis(best, np.argpartition(order, count - 1, axis=1)[:, :count], True, axis=1)
    best &= ~np.isnan(matches)
    if not best.any():
        return similarity
    above = 3.0 - min(0.0, float(matches[best].min()))  # cosines lie within -1 and 1
    return np.where(best, similarity + matches + above, similarity)


def _of_texts(drawn: Resampling, owner: np.ndarray) -> Resampling:
    """Return the resampling of captions: several of one image are drawn with it."""
    if drawn.clusters is not None:
        members = tuple(drawn.clusters.members[row] for row in owner)
        return replace(drawn, clusters=replace(drawn.clusters, members=members))
    if len(set(owner.tolist())) == len(owner):
        return drawn
    return replace(drawn, clusters=Clusters("image", tuple(str(row) for row in owner)))
