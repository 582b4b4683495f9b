"""Image-report retrieval: the report of a study by its images, and the images by the report."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medm.errors import DataError
from medm.metrics.base import MetricResult, Resampling, mean_result, undefined, with_note
from medm.metrics.retrieval import recall_of_ranks
from medm.tasks import prompts
from medm.tasks.base import FAILED, Record, Scores, Task, make_sample, pick_template, scoped
from medm.tasks.retrieval import rank_places, vectors_of
from medm.tasks.study_sources.annotation import AnnotationFile
from medm.types import JsonObject, Media, PredictionField, Sample

CUTOFFS = (1, 5, 10)


class StudyRetrieval(Task):
    """Recall at 1, 5 and 10 of images and reports, and its mean over both directions.

    A report is right for every study with the same report; the published scoring, in which only the
    study's own is right, stands beside. Ties count against the query. With `rerank` the best
    candidates by cosine are ranked again by the sum of cosine and match.

    Args:
        options: see `medm.tasks.StudyRetrievalOptions`.
    """

    tag = "caption"
    splits = ("train", "val", "test")
    system = "motor"
    """Whose definition stands beside the corrected one."""

    def __init__(
        self,
        *,
        path: str = "annotation.json",
        rerank: int = 0,
        images: str = "all",
        image_folder: str | None = None,
        rounds: int = 1000,
        seed: int = 0,
        cluster_by: str | None = None,
    ) -> None:
        super().__init__(rounds=rounds, seed=seed, cluster_by=cluster_by)
        if cluster_by is None:
            self.cluster_by = "patient"
        self.source = AnnotationFile.with_options(
            {"path": path, "images": images, "image_folder": image_folder, "label_names": ()}
        )
        self.layout = self.source.layout
        self.matched = rerank
        self.needs: frozenset[PredictionField] = frozenset({"embeddings"})
        if rerank:
            self.needs |= {"matches"}

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        self._known_split(split)
        for row in self.source.studies(Path(folder), split):
            if row.report is None:
                raise DataError("a study without a report cannot be found", file=row.file,
                                index=row.index, field="report")  # fmt: skip
            extra: dict[str, Any] = {} if row.patient is None else {"patient": row.patient}
            yield make_sample(
                pick_template(prompts.CHEST_REPORT, rng),
                id=row.id,
                tag=self.tag,
                answer=row.report,
                media=[Media("image", path) for path in row.images],
                captions=[row.report],
                **extra,
            )

    def is_empty(self, record: Record) -> bool:
        return record.get("embedding") is None

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        if not records:
            return []
        studies = _Studies(records, self.matched)
        drawn = self.resampling_of(records)
        results = _recalls(studies, studies.equal_reports(), drawn, matches=True)
        if self.matched:
            results += scoped("cosine", _recalls(studies, studies.equal_reports(), drawn))
        return results

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        """Published scoring, where it differs: only the report of the study itself is right."""
        studies = _Studies(records, self.matched)
        own = [[place] for place in range(len(records))]
        if studies.equal_reports() == own:
            return []
        drawn = self.resampling_of(records)
        results = _recalls(studies, own, drawn, matches=True)
        note = "another study with the same report counts as wrong, as published"
        recalls = [result for result in results if not result.name.endswith("median-rank")]
        return scoped(self.system, [with_note(result, note) for result in recalls])

    def _scores(self, rows: Sequence[JsonObject]) -> Scores:
        scores = super()._scores(rows)
        reports = {" ".join(str(row["captions"][0]).split()) for row in rows}
        if len(reports) < len(rows):
            scores.notes.append(f"{len(rows)} studies have {len(reports)} different reports")
        if self.matched:
            scores.notes.append(
                f"the {self.matched} best candidates by cosine are ranked again by match + cosine"
            )
            lacking = sum(row.get("matches") is None and row.get(FAILED) is None for row in rows)
            if lacking:
                scores.notes.append(
                    f"{lacking} of {len(rows)} studies have no matches and are ranked by cosine"
                )
        return scores


class _Studies:
    """Vectors and matches of N studies.

    Args:
        records: with `embedding`, `text_embeddings` and `matches`.
        matched: candidates of a query that are ranked again.
    """

    def __init__(self, records: Sequence[Record], matched: int) -> None:
        self.images, self.texts, _ = vectors_of(records)
        self.matched = matched
        self._reports = [" ".join(str(record["captions"][0]).split()) for record in records]
        self.matches: np.ndarray | None = None
        if matched:
            place = {str(record["id"]): row for row, record in enumerate(records)}
            self.matches = np.full((len(records), len(records)), np.nan, dtype=np.float32)
            for row, record in enumerate(records):
                for name, score in (record.get("matches") or {}).items():
                    if name in place:  # a part of the studies may be scored by itself
                        self.matches[row, place[name]] = score

    def equal_reports(self) -> list[list[int]]:
        """Return for each study the studies with the same report."""
        same: dict[str, list[int]] = {}
        for place, text in enumerate(self._reports):
            same.setdefault(text, []).append(place)
        return [same[text] for text in self._reports]


def _recalls(
    studies: _Studies,
    relevant: Sequence[Sequence[int]],
    drawn: Resampling,
    *,
    matches: bool = False,
) -> list[MetricResult]:
    """Recall of both directions, the mean of all before them."""
    again = studies.matches if matches else None
    results: list[MetricResult] = []
    places: list[np.ndarray] = []
    for direction, queries, candidates, scores in (
        ("image-to-text", studies.images, studies.texts, again),
        ("text-to-image", studies.texts, studies.images, None if again is None else again.T),
    ):
        place = rank_places(queries, candidates, relevant, matches=scores, matched=studies.matched)
        places.append(place)
        found = recall_of_ranks(place, len(candidates), direction, resampling=drawn)
        if scores is not None:
            signature = f"|reranked:{studies.matched}"
            found = [replace(one, signature=one.signature + signature) for one in found]
        results += [_mean(f"{direction}-mean", [place], len(candidates), found[0], drawn), *found]
    mean = _mean("recall-mean", places, len(studies.images), results[1], drawn)
    return [mean, *results]


def _mean(
    name: str, places: Sequence[np.ndarray], candidates: int, like: MetricResult, drawn: Resampling
) -> MetricResult:
    """Mean of the recalls that are defined, of one direction or of both."""
    cutoffs = [k for k in CUTOFFS if k < candidates]
    hits = [(place <= k).astype(float) for place in places for k in cutoffs or CUTOFFS]
    parts = like.signature.split("|", 1)
    signature = f"mean of R@{','.join(map(str, cutoffs))}|{parts[1]}"
    result = mean_result(name, np.mean(hits, axis=0), signature, drawn)
    if not cutoffs:
        return undefined(result, f"undefined: there are {candidates} candidates")
    return result
