"""A conversation of several turns with one model. Knows no terminal and no network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medm.data.base import missing_branch
from medm.errors import DataError
from medm.imaging import load_pixels
from medm.inference.generator import Engine, Request
from medm.inference.options import GenerationOptions
from medm.types import Media, Sample, Turn

if TYPE_CHECKING:
    from medm.models.lvlm.processing import LVLMProcessor


class Conversation:
    """A conversation with one model: its turns, and the images and volumes that were shown.

    Args:
        engine: answers.
        processor: of the engine's model.
        system: a system turn before everything.
        task: kind of task, for connectors that choose experts by it.
        options: settings of replies; the engine's without them.

    Raises:
        DataError: the model knows tasks, and this one is unknown.
    """

    def __init__(
        self,
        engine: Engine,
        processor: LVLMProcessor,
        *,
        system: str | None = None,
        task: str | None = None,
        options: GenerationOptions | None = None,
    ) -> None:
        if task is not None and processor.tasks and task not in processor.tasks:
            raise DataError(
                f"task {task!r}: expected one of {', '.join(processor.tasks)}", field="task"
            )
        self.engine, self.processor, self.system, self.task = engine, processor, system, task
        self.options = options
        self.reset()

    def reset(self) -> None:
        """Forget all turns, images and volumes."""
        self.turns: list[Turn] = [Turn("system", (self.system,))] if self.system else []
        self.pixels: dict[str, list[np.ndarray]] = {}
        self._shown: list[Media] = []

    def show(self, branch: str, item: object) -> None:
        """Put an image or volume before the next question.

        Args:
            branch: "image" or "volume".
            item: a file, or any other source that `medm.imaging.load_pixels` takes.

        Raises:
            DataError: the model has no such branch, or the file cannot be read.
        """
        if branch not in self.processor.preprocess:
            raise DataError(missing_branch(branch, self.processor.preprocess))
        array = load_pixels(item, self.processor.preprocess[branch])
        self.pixels.setdefault(branch, []).append(array)
        self._shown.append(Media(branch, str(item) if isinstance(item, (str, Path)) else None))

    def ask(self, question: str) -> Iterator[str]:
        """Yield the reply in pieces as they come. The turns are kept once it is complete.

        Raises:
            DataError: the conversation no longer fits the model's context, or the template refuses
                it.
        """
        content: list[str | Media] = []
        for media in self._shown:
            content += [media, "\n"]
        turn = Turn("user", (*content, question))
        example = self.processor.encode(
            Sample((*self.turns, turn), task=self.task), self.pixels, generation=True
        )
        longest = self.engine.max_tokens
        if longest is not None and len(example.input_ids) >= longest:
            raise DataError(
                f"the conversation has {len(example.input_ids)} tokens, but the context is "
                f"{longest}; start a new one"
            )
        pieces: list[str] = []
        for piece in self.engine.stream(Request.of(example), self.options):
            pieces.append(piece)
            yield piece
        self.turns += [turn, Turn("assistant", ("".join(pieces),))]
        self._shown = []
