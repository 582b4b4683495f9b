"""Zero-shot scores during training: the scores of the texts of classes, by a model of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from medm.models.class_scores import ClassScores
from medm.tasks.base import Task
from medm.training.task_monitor import TaskMonitor
from medm.types import Answerer, AnswerItem, Embedder, JsonObject


class ZeroShotMonitor(TaskMonitor):
    """Scores of class-labelled sets after each evaluation, of one set or a suite.

    The kind of model scores texts. The default split is the one that the sets are scored on.
    """

    def _split(self, task: Task) -> str:
        return self.options.split or task.eval_split

    def open(self, model: nn.Module) -> Answerer:
        size = self.options.batch_size
        embedder = self.kind.embedder(model, self.processor, batch_size=size)
        return _ClassAnswerer(embedder, self.task.class_texts())


class _ClassAnswerer:
    """Scores of the classes of the set of an item, whose one file is read."""

    max_files = 1

    def __init__(
        self, embedder: Embedder, texts: Mapping[str, Mapping[str, Sequence[str]]]
    ) -> None:
        self.embedder = embedder
        self.scores = ClassScores(embedder, texts)

    def answer(self, items: Sequence[AnswerItem]) -> list[JsonObject]:
        pixels = np.stack([array for item in items for array in item.pixels])
        vectors = self.embedder.pixels(torch.from_numpy(pixels))
        return [
            {"scores": self.scores.of(vector, str(item.sample.extra["set"]))}
            for vector, item in zip(vectors, items, strict=True)
        ]
