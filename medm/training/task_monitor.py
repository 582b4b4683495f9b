"""Scores of a task during training, beside the evaluation loss and on all ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from torch import nn
from transformers import TrainerCallback

from medm.data.check import blank_pixels
from medm.data.regions import REGION_FIELD
from medm.distributed import all_gather_objects, rank, world_size
from medm.errors import DataError, MedmError, RecipeError
from medm.imaging import load_pixels, resolve_inside
from medm.models.base import ModelKind
from medm.tasks import TASKS
from medm.tasks.base import FAILED, Scores, Task, join_predictions, question_of
from medm.tasks.study_labels import unknown_labels
from medm.training.options import MonitorOptions
from medm.training.sample_table import SampleTable
from medm.types import (
    Answerer,
    AnswerItem,
    JsonObject,
    PredictionField,
    Processor,
    Sample,
)

logger = logging.getLogger(__name__)


class TaskMonitor:
    """Scores of one task after each evaluation.

    Each rank answers its shard of the items, and every rank has the scores. All ranks make the same
    number of calls of the model, as ZeRO-3 needs it.

    Args:
        options: of the task.
        kind: of the model; it answers items, or scores texts.
        processor: of the model.
        gives: what the kind of model gives during the training; None where it scores texts.

    Raises:
        DataError: the folder is incomplete, or an item is not for this model.
        MediaError: a file is missing.
        RecipeError: the kind of model does not give what the task scores, or the task has no
            validation split.
    """

    _table: SampleTable | None = None

    def __init__(
        self,
        options: MonitorOptions,
        kind: ModelKind,
        processor: Processor,
        *,
        gives: frozenset[PredictionField] | None = None,
    ) -> None:
        task = TASKS.get(options.task.name)(**options.task.model_dump(exclude={"name"}))
        if gives is not None and (unknown := sorted(task.needs - gives)):
            raise RecipeError(
                f"monitors: {options.task.label} needs {' and '.join(unknown)}; this model gives "
                f"{' and '.join(sorted(gives))} during the training"
            )
        self.options, self.kind, self.processor = options, kind, processor
        self.task = task.without_models()  # intervals are those of `medm eval`
        self.root = Path(options.data)
        self.samples = list(islice(self.task.samples(self.root, self._split(task)), options.limit))
        if not self.samples:
            raise DataError(f"split {self._split(task)!r} holds no items", file=self.root)
        lacking = unknown_labels(self.task.labels(), getattr(processor, "labels", ()))
        if lacking:
            raise RecipeError(
                f"monitors: {options.task.label} scores {', '.join(lacking)}, which model.labels "
                "does not name"
            )
        for sample in self.samples:
            for media in sample.media:
                resolve_inside(self.root, media.path or "")
            self._check(sample)
        self.metrics = self._tried()
        """Metrics that the task scores on these items."""

    def _tried(self) -> frozenset[str]:
        """Score the items on trial, without predictions; return the names of the metrics.

        Raises:
            DataError: what would stop the scoring: two items with one id, a field that is missing.
            RecipeError: no metric is left without a model or a program of its own.
        """
        scores = self._score(join_predictions(self.samples, {}))
        names = frozenset(result.name for result in scores.results)
        if not names:
            raise RecipeError(
                f"monitors: {self.options.task.label} has no metric that can be computed during "
                "the training; those that need a model or a program of their own are for medm eval"
            )
        return names

    def _check(self, sample: Sample) -> None:
        """Refuse an item that could not be answered, before the run begins."""
        if sample.regions or REGION_FIELD in sample.extra:
            raise RecipeError(
                f"monitors: {self.options.task.label} asks about regions, which are not drawn "
                "during the training; score it with medm eval"
            )
        place = f"monitors: {self.options.task.label}, item {sample.id}"
        views = self.processor.preprocess
        if foreign := sorted({media.branch for media in sample.media} - set(views)):
            raise RecipeError(
                f"{place} has {' and '.join(foreign)}s; the model reads {', '.join(views)}"
            )
        blank = [blank_pixels(views[media.branch]) for media in sample.media]
        try:
            self.kind.check_item(self.processor, AnswerItem(sample, blank, question_of(sample)))
        except DataError as error:
            raise DataError(f"{place}: {error}") from None

    def _split(self, task: Task) -> str:
        """Return the split that is scored: by default one for validation."""
        split = self.options.split
        if split is None and "val" not in task.splits:
            raise RecipeError(
                f"monitors: {self.options.task.label} has no split 'val'; it has "
                f"{', '.join(task.splits)}. Set split"
            )
        return split or "val"

    def show_samples(self, folder: Path, trackers: Sequence[TrainerCallback]) -> None:
        """Show the first items after each evaluation, if the recipe asks for it.

        Args:
            folder: output folder of the run.
            trackers: callbacks of the trainer.
        """
        if self.options.samples:
            self._table = SampleTable(self.options.task.label, folder, trackers)

    def open(self, model: nn.Module) -> Answerer:
        """Return the access to answers of the model, which is in eval mode."""
        return self.kind.answerer(
            model,
            self.processor,
            self.task.needs,
            batch_size=self.options.batch_size,
            max_new_tokens=self.options.max_new_tokens,
        )

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Return the scores of a model in eval mode, by their keys in the log: `eval_TASK_METRIC`.

        All ranks call it at the same time.
        """
        records = self.answers(self.open(model))
        found = self.scores(records)
        if rank() == 0:
            text = ", ".join(
                f"{key.rpartition('_')[2]} {value:.3f}" for key, value in found.items()
            )
            logger.info("step %d: %s: %s", step, self.options.task.label, text)
            if self._table is not None:
                self._table.write(self._shown(records), step)
        return found

    def answers(self, answerer: Answerer) -> list[JsonObject]:
        """Return the items with their predictions, of all ranks and on every rank."""
        shard: dict[str, JsonObject] = {}
        for indexes in self._batches():
            items, errors = self._read(indexes, answerer.max_files)
            lines = answerer.answer(items)
            for line, error, item, index in zip(lines, errors, items, indexes, strict=True):
                if index < len(self.samples):
                    shard[str(item.sample.id)] = line if error is None else {FAILED: error}
        answers = {name: one for part in all_gather_objects(shard) for name, one in part.items()}
        records = join_predictions(self.samples, {})
        for record in records:
            line = answers[str(record["id"])]
            record |= {name: line[name] for name in _FIELDS if name in line}
            record["prediction"] = str(line.get("reply", ""))
        return records

    def scores(self, records: Sequence[JsonObject]) -> dict[str, float]:
        """Return the scores of predictions, by their keys in the log."""
        scores = self._score(records)
        if scores.failed and rank() == 0:
            failed = next(record[FAILED] for record in records if FAILED in record)
            logger.warning(
                "%s: %d of %d files could not be read and count as wrong; the first error: %s",
                self.options.task.label, scores.failed, len(records), failed,
            )  # fmt: skip
        label = self.options.task.label
        return {
            f"eval_{label}_{result.name}": result.value
            for result in scores.results
            if "[" not in result.name and not math.isnan(result.value)
        }

    def _score(self, records: Sequence[JsonObject]) -> Scores:
        task = self.task
        return task.score([task.measure_item(record, None, self.root) for record in records])

    def _shown(self, records: Sequence[JsonObject]) -> list[JsonObject]:
        """Return the first items as rows of the table of samples."""
        rows: list[JsonObject] = []
        for record, sample in zip(records[: self.options.samples], self.samples, strict=False):
            row: JsonObject = {
                "id": record["id"],
                "question": question_of(sample) or "",
                "reply": record["prediction"],
                "answer": str(sample.answer),
            }
            rows.append(row | {name: record[name] for name in (FAILED,) if name in record})
        return rows

    def _batches(self) -> list[list[int]]:
        """Indices of this rank by batch, as many on every rank; those beyond the samples stand for
        samples that another rank scores.
        """
        count = -(-len(self.samples) // world_size())
        own = [rank() + place * world_size() for place in range(count)]
        size = self.options.batch_size
        return [own[start : start + size] for start in range(0, len(own), size)]

    def _read(
        self, indexes: Sequence[int], max_files: int | None
    ) -> tuple[list[AnswerItem], list[str | None]]:
        """Return items, blank where a file cannot be read, and why it cannot."""
        items: list[AnswerItem] = []
        errors: list[str | None] = []
        for index in indexes:
            sample = self.samples[index % len(self.samples)]
            media = sample.media[:max_files]
            error: str | None = None
            try:
                arrays = [
                    load_pixels(
                        resolve_inside(self.root, one.path or ""),
                        self.processor.preprocess[one.branch],
                    )
                    for one in media
                ]
            except (MedmError, OSError) as fault:
                arrays = [blank_pixels(self.processor.preprocess[one.branch]) for one in media]
                error = str(fault)
            items.append(AnswerItem(sample, arrays, question_of(sample)))
            errors.append(error)
        return items, errors


_FIELDS = ("scores", "embedding", "text_embeddings", FAILED)
"""Fields of an answer that are scored beside its text."""
