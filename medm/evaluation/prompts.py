"""Annotation records to batches of prompts, in the workers of a DataLoader. Knows no model and no device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from medm.data.dataset import ConversationDataset
from medm.data.records import Records
from medm.errors import DataError
from medm.evaluation.engine import PromptBatch, prepare
from medm.types import Example

_BYTES_PER_TOKEN = 4
"""Of English text; only the order of work depends on it."""
_BUCKET = 32
"""Prompts whose lengths differ by fewer tokens may be put in the order of their images instead."""


@dataclass(slots=True)
class Prepared:
    """Some records, ready to be answered or refused."""

    indexes: list[int]
    """Record of each row of `batch`."""
    batch: PromptBatch | None
    """None where every record is bad."""
    problems: list[tuple[int, str]]
    """Record and reason of those that cannot be answered."""


class Prompts(Dataset[Prepared]):
    """Batches of prompts. A bad record is an item of `problems`, never an exception.

    Args:
        records: opened for inference.
        processor: of the model that answers.
        batches: the records of each batch.
        context: longest prompt in tokens; None for no limit.
    """

    def __init__(
        self, records: Records, processor: Any, batches: Sequence[Sequence[int]], *, context: int | None = None
    ) -> None:
        self.examples = ConversationDataset(records, processor.encode, processor.preprocess, generation=True)
        self.batches, self.pad_id, self.context = batches, int(processor.pad_id), context

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, position: int) -> Prepared:
        indexes, examples, problems = [], [], []
        for index in self.batches[position]:
            try:
                examples.append(self._example(index))
                indexes.append(index)
            except DataError as error:
                problems.append((index, reason(error)))
        return Prepared(indexes, prepare(examples, pad_id=self.pad_id) if examples else None, problems)

    def _example(self, index: int) -> Example:
        example = self.examples[index]
        assert example is not None  # bad records raise, and no length limit is set
        if self.context is not None and len(example.input_ids) > self.context:
            raise DataError(
                f"the prompt has {len(example.input_ids)} tokens, vision tokens included; with the room for the reply "
                f"the model's context leaves {self.context}"
            )
        return example


def reason(error: DataError) -> str:
    """What is wrong with a record, without its place."""
    return f"field '{error.field}': {error.reason}" if error.field is not None else error.reason


def work_order(records: Records, tokens_per_item: dict[str, int]) -> list[int]:
    """Every record, longest prompts first, and prompts on the same image beside each other where lengths allow.

    Lengths are estimated from the text, without reading an image. The longest first shows at the start whether a
    batch fits the memory, and makes the estimate of the time left a safe one.
    """
    keys: list[tuple[int, str, int, int]] = []
    for index in range(len(records)):
        try:
            sample = records[index]
        except DataError:
            keys.append((0, "", 0, index))  # refused when its turn comes
            continue
        text = sum(len(turn.text.encode()) for turn in sample.turns) // _BYTES_PER_TOKEN
        length = text + sum(tokens_per_item.get(media.branch, 0) for media in sample.media)
        keys.append((-(length // _BUCKET), "\n".join(media.path or "" for media in sample.media), -length, index))
    return [key[-1] for key in sorted(keys)]


def deal(order: Sequence[int], *, rank: int, world: int) -> np.ndarray:
    """The records of one process: the same ones whatever has been answered already, so that none is taken twice.

    Runs of `order` are dealt, not single records: neighbours share images.
    """
    run = max(1, min(64, len(order) // (4 * world)))
    place = np.arange(len(order)) // run
    return np.asarray(order, np.int64)[place % world == rank]
