"""Interface of a task, and the conversion of its samples into training records.

A task reads a benchmark's files, words the questions and scores the answers. It does not know which
model answers, and opens no image except to ask for its size.
"""

from __future__ import annotations

import copy
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from medm.errors import DataError, MedmError
from medm.metrics.base import Clusters, MetricResult, Resampling
from medm.types import (
    KIND_OF_PLACEHOLDER,
    JsonObject,
    Media,
    PredictionField,
    Sample,
    Turn,
    TurnPart,
    written,
)

Record: TypeAlias = Mapping[str, Any]
"""One scored item: `id`, `prediction`, `answer`, and the `extra` fields of its sample."""


FAILED = "inference_error"
"""Field of a record that could not be answered: the reason."""


@dataclass(frozen=True, slots=True)
class PredictedMask:
    """One mask of a prediction: a file, or a run-length code."""

    file: str | None = None
    """Relative to `Prediction.folder`."""
    value: int | None = None
    """Label of the target in a label map; None takes all that is not 0."""
    rle: JsonObject | None = None
    """COCO run-length code (`medm.imaging.rle`), where there is no file."""
    media: int = 0
    """Position of its image among the images of the item; only items with several read it."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Output of a model or another program for one item."""

    text: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Scores that come with the prediction (overlaps of masks)."""
    scores: Mapping[str, float] | Sequence[float] | None = None
    """A score for each class, by name or in the order of the task's classes; a single one is in
    `numbers`."""
    embedding: Sequence[float] | None = None
    """Vector of the item's file."""
    text_embeddings: Sequence[Sequence[float]] | None = None
    """Vectors of its captions."""
    matches: Mapping[str, float] | None = None
    """By id of an item the score that its text belongs to the images of this one."""
    error: str | None = None
    """Reason why there is no prediction; the text is then empty."""
    masks: tuple[PredictedMask, ...] = ()
    """Masks, in the order of the reply. A reply without any says that nothing is there."""
    folder: Path | None = None
    """Folder of the files of masks."""


@dataclass(slots=True)
class Scores:
    """Results of scoring a set of predictions."""

    results: list[MetricResult]
    """The corrected numbers, the headline first."""
    original: list[MetricResult] = field(default_factory=list)
    """The benchmark's own scoring with its quirks, to be printed beside."""
    groups: dict[str, dict[str, list[MetricResult]]] = field(default_factory=dict)
    """Record field -> its value -> the corrected numbers of that part."""
    notes: list[str] = field(default_factory=list)
    """Caveats for the reader: missing answers, parts that were left out."""
    empty: int = 0
    """Items with an empty reply, or none."""
    failed: int = 0
    """Items that could not be answered because of an error."""


class Task(ABC):
    """One benchmark.

    Args:
        rounds: bootstrap samples behind each interval.
        seed: seed of the bootstrap.
        cluster_by: record field in place of the task's own `cluster_by`.
    """

    needs: frozenset[PredictionField] = frozenset({"text"})
    """Parts of a prediction that scoring reads. A run whose predictions lack one of these is
    refused before it begins."""
    tag: ClassVar[str]
    """Kind of task of its samples ("vqa", "caption", ...), for task tokens and mixtures."""
    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    """Splits by medm's names; each task says which file holds one."""
    eval_split: ClassVar[str] = "test"
    """The split that is scored."""
    layout: str
    """The files it expects, for the message about a missing one."""
    group_by: tuple[str, ...] = ()
    """Record fields whose values get a row each in the tables."""
    cluster_by: str | None = None
    """Record field, or kind of file ("image", "volume"), whose equal values are drawn together:
    several questions about one scan are no independent items. None where every item is
    independent."""

    matched: int = 0
    """Candidates of a query, the best by its vector, whose matches are scored as well
    (`Prediction.matches`)."""

    def __init__(self, *, rounds: int = 1000, seed: int = 0, cluster_by: str | None = None) -> None:
        self.resampling = Resampling(rounds=rounds, seed=seed)
        self._must_cluster = cluster_by is not None
        if cluster_by is not None:
            self.cluster_by = cluster_by

    @abstractmethod
    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        """Return the questions of one split in the order of the files.

        Each has an `answer`, a unique `id` and the fields that scoring reads.

        Args:
            folder: where the benchmark lies; media paths are relative to it.
            split: one of `splits`.
            rng: draws an instruction from the pool for each sample (training). Without it every
                sample has the same, first one (evaluation).

        Raises:
            DataError: an unknown split, or a file is missing or damaged, by name.
        """

    @abstractmethod
    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        """Return the corrected numbers of these records."""

    def class_texts(self) -> Mapping[str, Mapping[str, Sequence[str]]]:
        """Texts whose similarity to an item is its score: by set (the field `set` of an item), then
        by class. Known after `samples` was read. Nothing for a task without such scores.
        """
        return {}

    def labels(self) -> Sequence[str]:
        """Names of the labels that scores are of, where a model knows them by name. Known after
        `samples` was read. Nothing for a task without such scores.
        """
        return ()

    def measure_item(
        self, record: JsonObject, prediction: Prediction | None, folder: Path
    ) -> JsonObject:
        """Return the record with the numbers that scoring needs from a large prediction.

        For predictions that are too large to be kept, such as masks.

        Args:
            record: with the prediction's text, numbers and scores.
            prediction: None where there is none for this item.
            folder: where the benchmark lies.

        Raises:
            DataError: the prediction does not fit its reference.
        """
        return record

    def is_empty(self, record: Record) -> bool:
        """Return whether a prediction holds nothing that is scored."""
        return not str(record["prediction"]).strip()

    def without_models(self) -> Task:
        """Return the task without intervals and without metrics that load a model.

        Metrics that start a program are left out, too.

        It scores single items, and records on trial.
        """
        task = copy.copy(self)
        task.resampling = replace(self.resampling, rounds=0)
        return task

    def require_metrics(self) -> None:  # noqa: B027 (most metrics need nothing beyond medm)
        """Refuse metrics whose model or program is not on this machine, without starting it.

        Raises:
            CheckpointError: there is no encoder for BERTScore.
            DeviceError: a package or Java is missing.
        """

    def check(self, records: Sequence[Record]) -> None:
        """Refuse records that would stop their scoring.

        A trial that takes seconds, before hours of inference.

        Raises:
            DataError: a reference cannot be scored, or a field is missing.
            CheckpointError, DeviceError: as `require_metrics`.
        """
        self.require_metrics()
        self.resampling_of(records)
        self.without_models().score(records)

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        """Return the numbers as the benchmark's authors compute them.

        Nothing is returned if they are the same or unknown.
        """
        return []

    def resampling_of(self, records: Sequence[Record]) -> Resampling:
        """Return the resampling of intervals on these records.

        Whole groups are drawn if the records say which items belong together.

        Raises:
            DataError: a record lacks the field that `cluster_by` names.
        """
        name = self.cluster_by
        lacking = next(
            (record for record in records if name is not None and record.get(name) is None), None
        )
        if name is None or (
            not self._must_cluster and all(record.get(name) is None for record in records)
        ):
            return self.resampling
        if lacking is not None:
            raise DataError(
                f"record {lacking.get('id')!r} has no {name!r}, by which cluster_by groups the "
                f"items; it has {', '.join(sorted(lacking))}"
            )
        return replace(
            self.resampling, clusters=Clusters(name, tuple(str(record[name]) for record in records))
        )

    def score(self, records: Iterable[Record]) -> Scores:
        """Score the records of one split.

        An item without an answer counts as wrong; it is never left out.

        Raises:
            DataError: a record lacks a field that scoring needs, or a metric cannot read it.
        """
        rows = [self._checked(record, index) for index, record in enumerate(records)]
        try:
            return self._scores(rows)
        except MedmError:
            raise
        except ValueError as error:  # a metric names the item by its position
            raise DataError(f"{type(self).__name__}: {error}") from None

    def _scores(self, rows: Sequence[JsonObject]) -> Scores:
        groups: dict[str, dict[str, list[MetricResult]]] = {}
        for name in self.group_by:
            values = sorted({str(row[name]) for row in rows if row.get(name) is not None})
            if len(values) > 1:
                groups[name] = {
                    value: self.measure([row for row in rows if str(row.get(name)) == value])
                    for value in values
                }
        failures = [row[FAILED] for row in rows if row.get(FAILED) is not None]
        empty = sum(self.is_empty(row) for row in rows if row.get(FAILED) is None)
        notes = [f"{empty} of {len(rows)} items have no answer and count as wrong"] if empty else []
        if failures:
            notes.append(
                f"{len(failures)} of {len(rows)} items could not be answered because of an error "
                f"and count as wrong; the first error: {failures[0]}"
            )
        clusters = self.resampling_of(rows).clusters
        if clusters is not None:
            notes.append(
                f"intervals and tests draw whole groups by {clusters.field!r}: {clusters.count} "
                f"groups of {len(rows)} items"
            )
        results, original = self.measure(rows), self.original(rows)
        return Scores(
            results,
            original,
            groups,
            [*notes, *metric_notes([*results, *original])],
            empty,
            len(failures),
        )

    def _checked(self, record: Record, index: int) -> JsonObject:
        for name in ("id", "answer"):
            if record.get(name) is None:
                raise DataError(
                    f"a scored record needs {name!r}; found {sorted(record)}",
                    index=index,
                    field=name,
                )
        prediction = record.get("prediction") if record.get(FAILED) is None else None
        if prediction is not None and not isinstance(prediction, str):
            raise DataError(
                f"expected text, found {type(prediction).__name__}", index=index, field="prediction"
            )
        return {**record, "prediction": prediction or ""}

    def _known_split(self, split: str) -> str:
        if split not in self.splits:
            raise DataError(f"there is no split {split!r}; this task has {', '.join(self.splits)}")
        return split


def metric_notes(results: Iterable[MetricResult]) -> list[str]:
    """Return the notes of results, each once, after the names of the metrics it is about.

    At most three names are given.
    """
    names: dict[str, list[str]] = {}
    for result in results:
        if result.note is not None:
            names.setdefault(result.note, []).append(result.name)
    lines = []
    for note, listed in names.items():
        listed = list(dict.fromkeys(listed))
        more = f" and {len(listed) - 3} more" if len(listed) > 4 else ""
        lines.append(f"{', '.join(listed[:3] if more else listed)}{more}: {note}")
    return lines


def make_sample(
    text: str, /, *, id: str, tag: str, answer: str, media: Sequence[Media] = (), **extra: Any
) -> Sample:
    """A sample with one question: each image or volume on a line of its own, then the text."""
    content: list[str | Media] = []
    for item in media:
        content += [item, "\n"]
    if content:
        content[-1] = f"\n{text}"
    else:
        content = [text]
    return Sample(
        turns=(Turn("user", tuple(content)),), id=id, task=tag, answer=answer, extra=extra
    )


def question_of(sample: Sample) -> str | None:
    """Return what a sample asks, for a model without a language model; None where the answer is a
    report or a caption.

    The field `question` of a sample is the question without an instruction around it.
    """
    if sample.task == "caption":
        return None
    return str(sample.extra.get("question") or sample.turns[-1].text.strip())


def pick_template(pool: Sequence[str], rng: random.Random | None) -> str:
    """Return the first instruction, or a random one with `rng`."""
    return pool[0] if rng is None else rng.choice(pool)


def join_predictions(samples: Iterable[Sample], predictions: Mapping[str, str]) -> list[JsonObject]:
    """Scoring records from a task's samples and another program's answers by id.

    A sample without an answer stays, with an empty one. Raises `DataError` for ids that no sample
    has (another split, another benchmark) and for ids that samples share.
    """
    records: list[JsonObject] = []
    for sample in samples:
        prediction = predictions.get(sample.id or "", "")
        records.append(
            {
                **_files(sample),
                **sample.extra,
                "id": sample.id,
                "answer": sample.answer,
                "prediction": prediction,
            }
        )
    known = {record["id"] for record in records}
    if len(known) != len(records):
        raise DataError(f"{len(records) - len(known)} samples share their id with another one")
    unknown = sorted(set(predictions) - known)
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(predictions)} predictions belong to no sample of this split, "
            f"the first is {unknown[0]!r}: check task, split and folder"
        )
    return records


def _files(sample: Sample) -> dict[str, str]:
    """Return the paths of a sample by branch, which say what scan a question is about."""
    paths: dict[str, list[str]] = {}
    for media in sample.media:
        paths.setdefault(media.branch, []).append(media.path or "")
    return {branch: ", ".join(names) for branch, names in paths.items()}


def task_to_records(
    task: Task, folder: Path, split: str, *, seed: int | None = None
) -> Iterator[JsonObject]:
    """Return the samples of a split as training records.

    Records have `image` or `volume`, LLaVA conversations, and the answer as reply.

    With a `seed` instructions are drawn from the task's pool, one stream over the split. Without
    it, all samples have the same instruction.
    """
    for sample in task.samples(folder, split, rng=None if seed is None else random.Random(seed)):
        yield record_of(sample)


def record_of(sample: Sample) -> JsonObject:
    """One sample as a training record; `medm.data` reads it back as the same turns."""
    if sample.answer is None:
        raise DataError(f"sample {sample.id!r} has no answer to learn")
    record: JsonObject = {"id": sample.id, "task": sample.task}
    for media in sample.media:
        record.setdefault(media.branch, []).append(media.path)
    texts = [part for turn in sample.turns for part in turn.content if isinstance(part, str)]
    if any(name in text for text in texts for name in KIND_OF_PLACEHOLDER):
        # Text that looks like a placeholder can only be told from one where media are parts of
        # their own.
        messages: list[JsonObject] = [
            {"role": turn.role, "content": [_part(part) for part in turn.content]}
            for turn in sample.turns
        ]
        messages.append({"role": "assistant", "content": sample.answer})
        return {
            **{key: record[key] for key in ("id", "task")},
            "messages": messages,
            **sample.extra,
        }
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[turn.role], "value": turn.as_written} for turn in sample.turns]
    return {
        **record,
        "conversations": [*turns, {"from": "gpt", "value": sample.answer}],
        **sample.extra,
    }


def _part(part: TurnPart) -> JsonObject:
    if isinstance(part, Media):
        return {"type": part.branch, "path": part.path}
    return {"type": "text", "text": written(part)}


def scoped(scope: str, results: Iterable[MetricResult]) -> list[MetricResult]:
    """Results of one part of the items, named so: "open/token-f1"."""
    return [replace(result, name=f"{scope}/{result.name}") for result in results]
