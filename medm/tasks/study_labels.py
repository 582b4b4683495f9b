"""Diagnosis: which labels are present in a study, by a score for each.

A model gives a score for each of its labels, which are joined to those of the set by name.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from medm.errors import DataError, RecipeError
from medm.metrics.base import MetricResult
from medm.metrics.classification import auroc
from medm.metrics.multilabel import Criterion, best_thresholds, label_decisions
from medm.tasks import prompts
from medm.tasks.base import (
    FAILED,
    Prediction,
    Record,
    Scores,
    Task,
    make_sample,
    pick_template,
    scoped,
)
from medm.tasks.benchmark_files import read_json_map
from medm.tasks.study_sources.annotation import AnnotationFile
from medm.tasks.study_sources.base import StudyRow, StudySource, Uncertain, ordered_labels
from medm.tasks.study_sources.mimic import MimicCXR, label_table
from medm.tasks.study_sources.nih import NIHChestXray14
from medm.types import JsonObject, Media, PredictionField, Sample

TRUTH = "findings"
"""Field of a record: 1 present, 0 absent, None unknown, by label."""
_SEPARATOR = "|"
_NONE = "none"
_QUESTION = "Which findings are present?"
_THRESHOLD = re.compile(r"^threshold\[(.+)\]$")


class StudyLabels(Task):
    """AUROC, F1, sensitivity and specificity of labels, each and on average.

    An unknown label counts in nothing. A label without a positive or a negative item has no numbers
    and is named. Decisions are taken at 0.5, and where `thresholds` are given also at those. On
    other splits than the test split the best thresholds are among the results.

    Args:
        source: of the studies.
        probabilities: the scores are probabilities and not logits.
        thresholds: `results.json` of this task on a validation split.
        criterion: what is best on other splits than the test split: `f1` or `youden`.
        options: see `medm.tasks.LabelTaskOptions`.
    """

    needs: frozenset[PredictionField] = frozenset({"scores"})
    tag = "cls"
    splits = ("train", "val", "test")
    system = "motor"
    """Whose definitions stand beside the corrected ones."""

    def __init__(
        self,
        source: StudySource,
        *,
        probabilities: bool = False,
        thresholds: str | None = None,
        criterion: Criterion = "f1",
        rounds: int = 1000,
        seed: int = 0,
        cluster_by: str | None = None,
    ) -> None:
        super().__init__(rounds=rounds, seed=seed, cluster_by=cluster_by)
        if cluster_by is None:
            self.cluster_by = "patient"
        self.source, self.probabilities = source, probabilities
        self.criterion: Criterion = criterion
        self.layout = source.layout
        self.thresholds = None if thresholds is None else _read_thresholds(Path(thresholds))
        self._labels: list[str] = []
        self._split = self.eval_split
        self._uncertain: Uncertain | None = None
        """Policy of the uncertain labels that were read, if any."""

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        self._split = self._known_split(split)
        if label_table(Path(folder)) is not None:
            self._uncertain = getattr(self.source, "uncertain", None)
        rows = [row for row in self.source.studies(Path(folder), split) if row.labels is not None]
        if not rows:
            raise DataError(
                f"no study of split {split!r} has labels; expected {self.layout}", file=folder
            )
        self._labels = ordered_labels(rows)
        for row in rows:
            yield self._sample(row, rng)

    def _sample(self, row: StudyRow, rng: random.Random | None) -> Sample:
        truth = {name: (row.labels or {}).get(name) for name in self._labels}
        text = pick_template(prompts.CLASSIFY, rng)
        extra: JsonObject = {} if row.patient is None else {"patient": row.patient}
        return make_sample(
            text.format(question=_QUESTION, classes=", ".join(self._labels)),
            id=row.id,
            tag=self.tag,
            answer=_SEPARATOR.join(name for name, one in truth.items() if one == 1) or _NONE,
            media=[Media("image", path) for path in row.images],
            **extra,
            **{TRUTH: truth},
        )

    def labels(self) -> Sequence[str]:
        return self._labels

    def is_empty(self, record: Record) -> bool:
        return record.get("scores") is None

    def measure_item(
        self, record: JsonObject, prediction: Prediction | None, folder: Path
    ) -> JsonObject:
        """Add the labels that are decided present, for the reader of a report."""
        if record.get("scores") is None or str(record.get("prediction") or "").strip():
            return record
        names = list(record[TRUTH])
        scores = _scores_of(record, names)
        found = [
            name
            for name, one in zip(names, scores, strict=True)
            if one >= self._published_threshold
        ]
        return {**record, "prediction": _SEPARATOR.join(found) or _NONE}

    @property
    def _published_threshold(self) -> float:
        """0.5 in the unit of the scores."""
        return 0.5 if self.probabilities else 0.0

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        if not records:
            return []
        names, scores, truths = _tables(records)
        drawn = self.resampling_of(records)
        results = auroc(scores, truths, class_names=names, resampling=drawn)
        published = np.full(len(names), self._published_threshold)
        decisions = label_decisions(
            scores, truths, names=names, thresholds=published, resampling=drawn
        )
        means = [result for result in decisions if "[" not in result.name]
        results = [results[0], *means, *results[1:], *decisions[len(means) :]]
        if self.thresholds is not None:
            chosen = np.array([self._chosen(name) for name in names])
            results += scoped(
                "validation-threshold",
                label_decisions(
                    scores,
                    truths,
                    names=names,
                    thresholds=chosen,
                    threshold_name="validation",
                    resampling=drawn,
                ),
            )
        if self._split != self.eval_split:
            results += best_thresholds(scores, truths, names=names, criterion=self.criterion)
        return results

    def _chosen(self, name: str) -> float:
        """Return the threshold of a label; where the validation split gave none, that of 0.5."""
        return (self.thresholds or {}).get(same_name(name), self._published_threshold)

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        """Published means: an undefined value counts as 0, and an unknown label as absent."""
        if not records:
            return []
        names, scores, truths = _tables(records)
        truths = np.nan_to_num(truths)
        drawn = self.resampling_of(records)
        results = [
            auroc(scores, truths, class_names=names, resampling=drawn)[0],
            *label_decisions(
                scores,
                truths,
                names=names,
                thresholds=np.full(len(names), self._published_threshold),
                undefined_as="zero",
                resampling=drawn,
            ),
        ]
        return scoped(self.system, results)

    def _scores(self, rows: Sequence[JsonObject]) -> Scores:
        scores = super()._scores(rows)
        unknown = sum(one is None for row in rows for one in row[TRUTH].values())
        if unknown:
            scores.notes.append(f"{unknown} labels are unknown and count in nothing")
        if self._uncertain is not None:
            scores.notes.append(f"uncertain labels (-1) by the policy {self._uncertain}")
        if self.thresholds is not None and rows:
            lacking = [name for name in rows[0][TRUTH] if same_name(name) not in self.thresholds]
            if lacking:
                scores.notes.append(
                    f"no threshold was chosen for {', '.join(lacking)}: decided at 0.5"
                )
        return scores


class NIHChestXray14Labels(StudyLabels):
    """NIH ChestX-ray14 by its official lists.

    Args:
        options: see `medm.tasks.NIHOptions`.
    """

    def __init__(self, *, validation: str = "patient", **options: Any) -> None:
        super().__init__(NIHChestXray14.with_options({"validation": validation}), **options)


class MimicLabels(StudyLabels):
    """The 14 labels of MIMIC-CXR-JPG by its official split.

    Args:
        options: see `medm.tasks.MimicLabelOptions`.
    """

    def __init__(
        self,
        *,
        labeler: str = "chexpert",
        uncertain: Uncertain = "u-zero",
        images: str = "all",
        **options: Any,
    ) -> None:
        source = MimicCXR.with_options(
            {"labeler": labeler, "uncertain": uncertain, "images": images}
        )
        super().__init__(source, **options)


class OwnLabels(StudyLabels):
    """Labels of an annotation file: one's own studies, MOTOR's JSON, or R2Gen's with the labels of
    MIMIC-CXR-JPG beside it.

    Args:
        options: see `medm.tasks.OwnLabelOptions`.
    """

    def __init__(
        self,
        *,
        path: str,
        label_names: Sequence[str] = (),
        image_folder: str | None = None,
        uncertain: Uncertain = "u-zero",
        images: str = "all",
        **options: Any,
    ) -> None:
        given: dict[str, Any] = {"path": path, "image_folder": image_folder, "images": images}
        given["uncertain"] = uncertain
        if label_names:
            given["label_names"] = tuple(label_names)
        super().__init__(AnnotationFile.with_options(given), **options)


def same_name(name: str) -> str:
    """Return a form in which names of labels are compared: case, and _ or - for spaces, do not
    matter.
    """
    return " ".join(re.split(r"[\s_\-]+", name.strip())).casefold()


def unknown_labels(wanted: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return the labels that a model with these does not know."""
    names = {same_name(name) for name in known}
    return [name for name in wanted if same_name(name) not in names]


def _tables(records: Sequence[Record]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the names of the labels, scores (n, L) and truths (n, L) with nan where unknown.

    A study without scores is ranked and decided as wrong as can be.
    """
    names = list(records[0][TRUTH])
    truths = np.array(
        [
            [math.nan if record[TRUTH].get(name) is None else record[TRUTH][name] for name in names]
            for record in records
        ],
        dtype=np.float64,
    ).reshape(len(records), len(names))
    scores = np.where(truths == 1, -np.inf, np.inf)
    for row, record in enumerate(records):
        if record.get(FAILED) is None and record.get("scores") is not None:
            scores[row] = _scores_of(record, names)
    return names, scores, truths


def _scores_of(record: Mapping[str, Any], names: Sequence[str]) -> list[float]:
    """Return the score of each label.

    Raises:
        DataError: one is missing, or is no finite number.
    """
    given = record["scores"]
    if isinstance(given, Mapping):
        found = {same_name(str(name)): float(value) for name, value in given.items()}
    else:
        values = list(given) if isinstance(given, (list, tuple)) else [given]
        named = zip(names, values, strict=False) if len(values) == len(names) else ()
        found = {same_name(name): float(value) for name, value in named}
    scores = [found.get(same_name(name), math.nan) for name in names]
    lacking = [name for name, one in zip(names, scores, strict=True) if not math.isfinite(one)]
    if lacking:
        raise DataError(
            f"record {record.get('id')!r}: expected 'scores' with a number for each of "
            f"{', '.join(names)}; {lacking[0]!r} has none"
        )
    return scores


def _read_thresholds(file: Path) -> dict[str, float]:
    """Return thresholds by label from the results of a validation split.

    Raises:
        RecipeError: the results are those of a test split, or hold no thresholds.
        DataError: the file cannot be read.
    """
    content = read_json_map(file)
    split = content.get("split")
    found = {
        same_name(match[1]): float(result["value"])
        for result in cast(list[Any], content.get("scores", []))
        if isinstance(result, dict)
        and (match := _THRESHOLD.match(str(result.get("name"))))
        and result.get("value") is not None
    }
    if split == "test" or not found:
        raise RecipeError(
            f"thresholds: {file} holds no thresholds (its split is {split!r}); expected "
            "results.json of the same task with --split val"
        )
    return found
