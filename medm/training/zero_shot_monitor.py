"""Zero-shot scores during training, beside the evaluation loss and on all ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from medm.data.check import blank_pixels
from medm.distributed import all_gather_objects, rank, world_size
from medm.errors import MedmError
from medm.imaging import load_pixels, resolve_inside
from medm.models.base import ModelKind
from medm.models.class_scores import ClassScores
from medm.tasks import TASKS
from medm.tasks.base import FAILED, Prediction, join_predictions
from medm.tasks.zero_shot import ZeroShot
from medm.training.options import MonitorOptions
from medm.types import Embedder, Processor, Sample

logger = logging.getLogger(__name__)


class ZeroShotMonitor(TrainerCallback):
    """Scores of class-labelled sets after each evaluation.

    Each rank encodes its shard of the files, and every rank has the scores. All ranks make the same
    calls of the model, as ZeRO-3 needs it.

    Args:
        options: of one set, or a suite.
        kind: of the model; it scores texts.
        processor: of the model.

    Raises:
        DataError: the folder is incomplete.
        MediaError: a file is missing.
    """

    def __init__(self, options: MonitorOptions, kind: ModelKind, processor: Processor) -> None:
        task = TASKS.get(options.task.name)(**options.task.model_dump(exclude={"name"}))
        assert isinstance(task, ZeroShot)
        self.options, self.kind, self.task = options, kind, task
        self.processor = processor
        (self.preprocess,) = processor.preprocess.values()
        task.resampling = task.without_models().resampling  # intervals are those of `medm eval`
        self.root = Path(options.data)
        split = options.split or task.eval_split
        self.samples = list(islice(task.samples(self.root, split), options.limit))
        for sample in self.samples:
            resolve_inside(self.root, _file(sample))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        metrics: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        assert model is not None
        assert metrics is not None
        model.eval()
        size = self.options.batch_size
        found = self.measure(self.kind.embedder(model, self.processor, batch_size=size))
        metrics.update(found)  # for the choice of the best evaluation
        entry = next((one for one in reversed(state.log_history) if "eval_loss" in one), None)
        if entry is not None:
            entry.update(found)
        if state.is_world_process_zero:
            text = ", ".join(
                f"{key.rpartition('_')[2]} {value:.3f}" for key, value in found.items()
            )
            logger.info("step %d: %s: %s", state.global_step, self.options.task.label, text)

    def measure(self, embedder: Embedder) -> dict[str, float]:
        """Return the scores by their keys in the log: `eval_zero-shot-CARD_accuracy`."""
        task = self.task
        scores_of = ClassScores(embedder, task.class_texts())
        shard: dict[str, Prediction] = {}
        for indexes in self._batches():
            arrays, errors = self._read(indexes)
            vectors = embedder.pixels(torch.from_numpy(arrays))
            for vector, error, index in zip(vectors, errors, indexes, strict=True):
                sample = self.samples[index % len(self.samples)]
                by_class = scores_of.of(vector, str(sample.extra["set"]))
                if index < len(self.samples):
                    shard[str(sample.id)] = Prediction("", scores=by_class, error=error)
        predictions = {
            name: one for part in all_gather_objects(shard) for name, one in part.items()
        }
        records = join_predictions(self.samples, {})
        for record in records:
            prediction = predictions[str(record["id"])]
            if prediction.error is not None:
                record[FAILED] = prediction.error
            else:
                record["scores"] = prediction.scores
        scores = task.score([task.measure_item(record, None, self.root) for record in records])
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

    def _batches(self) -> list[list[int]]:
        """Indices of this rank by batch, as many on every rank; those beyond the samples stand for
        samples that another rank scores.
        """
        count = -(-len(self.samples) // world_size())
        own = [rank() + place * world_size() for place in range(count)]
        size = self.options.batch_size
        return [own[start : start + size] for start in range(0, len(own), size)]

    def _read(self, indexes: Sequence[int]) -> tuple[np.ndarray, list[str | None]]:
        """Pixels (N, C, *spatial), blank where a file cannot be read, and why it cannot."""
        arrays: list[np.ndarray | None] = []
        errors: list[str | None] = []
        for index in indexes:
            sample = self.samples[index % len(self.samples)]
            try:
                path = resolve_inside(self.root, _file(sample))
                arrays.append(load_pixels(path, self.preprocess))
                errors.append(None)
            except (MedmError, OSError) as error:
                arrays.append(None)
                errors.append(str(error))
        blank = blank_pixels(self.preprocess)
        return np.stack([blank if array is None else array for array in arrays]), errors


def _file(sample: Sample) -> str:
    (media,) = sample.media
    return media.path or ""
