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
from medm.inference.segmenter import Answered, Grounded, Segmenter, Shown
from medm.inference.volume_modes import needs_slices, slice_pixels
from medm.types import ControlToken, Media, Sample, Turn, TurnPart

if TYPE_CHECKING:
    from medm.models.lvlm.processing import LVLMProcessor
    from medm.models.lvlm.processing import Reply as DecodedReply


class Conversation:
    """A conversation with one model: its turns, and the images and volumes that were shown.

    Args:
        engine: answers.
        processor: of the engine's model.
        system: a system turn before everything.
        task: kind of task, for connectors that choose experts by it.
        options: settings of replies; the engine's without them.
        segmenter: makes the masks of replies, for models with a mask head; they are in `grounded`.

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
        segmenter: Segmenter | None = None,
    ) -> None:
        if task is not None and processor.tasks and task not in processor.tasks:
            raise DataError(
                f"task {task!r}: expected one of {', '.join(processor.tasks)}", field="task"
            )
        self.engine, self.processor, self.system, self.task = engine, processor, system, task
        self.options, self.segmenter = options, segmenter
        self.replies = 0
        """Replies so far, those before a `reset` included."""
        self.reset()

    def reset(self) -> None:
        """Forget all turns, images and volumes."""
        self.turns: list[Turn] = [Turn("system", (self.system,))] if self.system else []
        self.pixels: dict[str, list[np.ndarray]] = {}
        self._shown: list[Media] = []
        self.sources: list[Shown] = []
        """Every image and volume, in order."""
        self.grounded: Grounded | None = None
        """The last reply with its masks, of a model with a mask head."""

    def show(self, branch: str, item: object) -> None:
        """Put an image or volume before the next question.

        Args:
            branch: "image" or "volume".
            item: a file, or any other source that `medm.imaging.load_pixels` takes.

        Raises:
            DataError: the model has no such branch, or the file cannot be read.
        """
        path = str(item) if isinstance(item, (str, Path)) else None
        if self.segmenter is not None and needs_slices(self.processor, branch):
            arrays = slice_pixels(self.processor, item, self.segmenter.options)
            self.pixels.setdefault("image", []).extend(arrays)
            self._shown += [Media("image", path)] * len(arrays)
        elif branch not in self.processor.branches:
            raise DataError(missing_branch(branch, self.processor.branches))
        else:
            array = load_pixels(item, self.processor.preprocess[branch])
            self.pixels.setdefault(branch, []).append(array)
            self._shown.append(Media(branch, path))
        self.sources.append(Shown("volume" if branch == "volume" else "image", item))

    def ask(self, question: str) -> Iterator[str]:
        """Yield the reply in pieces as they come. The turns are kept once it is complete.

        Raises:
            DataError: the conversation no longer fits the model's context, or the template refuses
                it.
        """
        content: list[TurnPart] = []
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
        request = Request.of(example)
        reply = yield from self.engine.stream(request, self.options)
        if reply is None:  # cancelled
            return
        parts: tuple[TurnPart, ...] = (reply.text,)
        if self.segmenter is not None:
            parts = with_tokens(self.processor.decode_with_control_tokens(reply.ids))
        self.turns += [turn, Turn("assistant", parts)]
        self._shown = []
        self.replies += 1
        if self.segmenter is not None:
            self.grounded = None
            (self.grounded,) = self.segmenter.segment([Answered(request, reply.ids, self.sources)])


def with_tokens(reply: DecodedReply) -> tuple[TurnPart, ...]:
    """Return a reply as parts of a turn: the next prompt holds its control tokens as tokens."""
    parts: list[TurnPart] = []
    place = 0
    for token in reply.tokens:
        parts += [reply.text[place : token.start], ControlToken(token.token)]
        place = token.start + len(token.token)
    return tuple(part for part in (*parts, reply.text[place:]) if part != "")
