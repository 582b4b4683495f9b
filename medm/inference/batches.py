"""Batches of prompts from annotation records, in the workers of a DataLoader.

Knows no model and no device.

A file that cannot be read is not always the fault of the record: network shares vanish for a
second, descriptors run out. Such files are tried again before a record is refused.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from medm.data.dataset import ExampleDataset
from medm.data.records import Records
from medm.errors import DataError, InputLostError, RecipeError, machine_fault
from medm.imaging.paths import MissingFileError
from medm.inference.generator import PromptBatch, prepare
from medm.inference.predictions import RecordName
from medm.inference.volume_modes import SlicedVolumes
from medm.os_errors import explain
from medm.types import BaseSample, Example, Processor, Sample

_BYTES_PER_TOKEN = 4
"""Bytes of English text per token; only the order of work depends on it."""
_BUCKET = 32
"""Prompts whose lengths differ by fewer tokens may be put in the order of their images instead."""
WAITS = (0.1, 0.4, 1.0, 2.0, 4.0)
"""Seconds before each new try to read a file that is temporarily unavailable."""
_FRUITLESS = 3
"""Records for which waiting did not help, after which files are not waited for."""
_OWN_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Error codes of a limit of this process, which do not concern a folder."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A record that cannot be answered."""

    named: RecordName
    reason: str
    retry: bool = False
    """A file was missing or unavailable. The record is tried once more at the end of the run."""
    unavailable: bool = False
    """The machine is at fault, not the record: a disk, a share, memory, descriptors."""


@dataclass(slots=True)
class Prepared:
    """Several records, ready to be answered or refused."""

    named: list[RecordName]
    """Name of the record of each row of `batch`."""
    batch: Any
    """Result of `Prompts.make`; None if every record is bad."""
    problems: list[Problem]
    lost: str | None = None
    """Reason why no record can be read any more; the run has to stop."""

    @property
    def read_files(self) -> bool:
        """True if an image or a volume could be read."""
        return self.batch is not None and bool(self.batch.pixels)


def make_prompts(examples: Sequence[Any], samples: Sequence[BaseSample]) -> PromptBatch:
    """Return the prompts of examples as one batch."""
    return prepare(examples)


class Prompts(Dataset[Prepared]):
    """Batches of prompts. A bad record is an item of `problems`, never an exception.

    Args:
        records: opened for inference.
        processor: of the model that answers.
        batches: the records of each batch.
        context: longest prompt in tokens; None for no limit.
        make: makes a batch of examples and their samples.
        sliced: shows volumes as slices to models without a branch for volumes.
    """

    def __init__(
        self,
        records: Records[Any, Any],
        processor: Processor,
        batches: Sequence[Sequence[int]],
        *,
        context: int | None = None,
        make: Callable[[Sequence[Any], Sequence[BaseSample]], Any] = make_prompts,
        sliced: SlicedVolumes | None = None,
    ) -> None:
        self.examples = ExampleDataset(records.with_processor(processor))
        self.records = records
        self.batches, self.context, self.make = batches, context, make
        self.sliced = sliced
        self._patience = _FRUITLESS

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, position: int) -> Prepared:
        named, examples, samples, problems = [], [], [], []
        for index in self.batches[position]:
            try:
                examples.append(self._example_with_retries(index))
                named.append(self._named(index))
                samples.append(self.records[index])
            except InputLostError as error:
                return Prepared([], None, [], lost=str(error))
            except (DataError, RecipeError, OSError) as error:
                problems.append(self._problem(index, error))
        return Prepared(named, self.make(examples, samples) if examples else None, problems)

    def _example_with_retries(self, index: int) -> Example:
        """Return the example; a file that is temporarily unavailable is tried several times.

        Raises:
            InputLostError: the data root itself is gone, and does not come back.
        """
        waits = list(WAITS if self._patience else ())
        waited = False
        while True:
            try:
                example = self._example(index)
            except (DataError, OSError) as error:
                if machine_fault(error) is None and not self._is_away(index, error):
                    raise
                if not waits:
                    self._patience = max(0, self._patience - 1)
                    self._require_root(index)
                    raise
                time.sleep(waits.pop(0))
                waited = True
            else:
                if waited:
                    self._patience = _FRUITLESS
                return example

    def _is_away(self, index: int, error: Exception) -> bool:
        """Return True if a file is missing with its whole folder, as on an unmounted share."""
        if not _is_missing(error):
            return False
        root = self.records.root(index)
        folders = {
            (root / media.path).parent
            for media in self.records[index].media
            if media.path is not None
        }
        return _is_gone(root) or any(map(_is_gone, folders))

    def _require_root(self, index: int) -> None:
        root = self.records.root(index)
        if _is_gone(root):
            raise InputLostError(
                f"{root}: the folder of images and volumes is gone or empty, as when a share is "
                "not mounted; make it available again and run the same command again, which "
                "resumes where it stopped"
            )

    def _example(self, index: int) -> Example:
        example = self._read(index)
        if self.context is not None and len(example.input_ids) > self.context:
            raise DataError(
                f"the prompt has {len(example.input_ids)} tokens, vision tokens included; "
                f"the model's context leaves {self.context} beside the reply"
            )
        return example

    def _read(self, index: int) -> Example:
        sample = self.records[index]
        if self.sliced is None or not isinstance(sample, Sample) or not self.sliced.needed(sample):
            return self.examples.read_once(index)
        with self.records.placed(index):
            sources = [self.records.media_source(index, media) for media in sample.media]
            return self.sliced.example(sample, sources)

    def _named(self, index: int) -> RecordName:
        sample = self.records[index]
        named = RecordName(index=index)
        if sample.id is not None:
            named["id"] = sample.id
        if sample.task is not None:
            named["task"] = sample.task
        answer = getattr(sample, "answer", None)  # of a conversation
        if answer is not None:
            named["answer"] = answer
        return named

    def _problem(self, index: int, error: Exception) -> Problem:
        named = RecordName(index=index)
        with suppress(DataError, InputLostError, OSError):  # invalid JSON has no name
            source, position = self.records.locate(index)
            named = _named_unchecked(index, self.records.files[source][position])
        text = reason(error) if isinstance(error, DataError) else explain(error) or str(error)
        unavailable = machine_fault(error) is not None
        return Problem(
            named, text, retry=unavailable or _is_missing(error), unavailable=unavailable
        )


def _named_unchecked(index: int, record: object) -> RecordName:
    """Return the name of a record that may be bad."""
    named = RecordName(index=index)
    if not isinstance(record, dict):
        return named
    if isinstance(record.get("id"), (str, int)) and not isinstance(record["id"], bool):
        named["id"] = str(record["id"])
    if isinstance(record.get("task"), str):
        named["task"] = record["task"]
    return named


def _is_missing(error: BaseException | None) -> bool:
    """Return True if an error means that a file was missing or could not be opened."""
    while error is not None:
        if isinstance(
            error, (MissingFileError, FileNotFoundError, NotADirectoryError, PermissionError)
        ):
            return True
        error = error.__context__  # also behind `from None`
    return False


def _is_gone(folder: Path) -> bool:
    """Return True if a folder is missing, does not respond or is empty.

    An unmounted share leaves such a folder.
    """
    try:
        return next(folder.iterdir(), None) is None
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError as error:
        return machine_fault(error) is not None and error.errno not in _OWN_LIMITS


def reason(error: DataError) -> str:
    """Return the reason of an error, without the place of the record."""
    return f"field '{error.field}': {error.reason}" if error.field is not None else error.reason


def order_by_length(records: Records, tokens_per_item: Mapping[str, int]) -> list[int]:
    """Return the indices of all records, longest prompts first.

    Prompts on the same image are neighbors if their lengths are similar.

    Lengths are estimated from the text, without reading an image: one that is cut into tiles counts
    with the most tiles that it can have, which `tokens_per_item` says. The longest first shows at
    the start whether a batch fits the memory, and makes the estimate of the time left a safe one.
    """
    keys: list[tuple[int, str, int, int]] = []
    for index in range(len(records)):
        try:
            sample = records[index]
        except DataError:
            keys.append((0, "", 0, index))  # refused when it is read
            continue
        text = sum(len(turn.text.encode()) for turn in sample.turns) // _BYTES_PER_TOKEN
        length = text + sum(tokens_per_item.get(media.branch, 0) for media in sample.media)
        keys.append(
            (
                -(length // _BUCKET),
                "\n".join(media.path or "" for media in sample.media),
                -length,
                index,
            )
        )
    return [key[-1] for key in sorted(keys)]


def shard_indices(order: Sequence[int], *, rank: int, world: int) -> np.ndarray:
    """Return the shard of one rank.

    It does not depend on the records that have a reply already, so that none is answered twice.
    Runs of `order` are assigned, not single records: neighbors have images in common.
    """
    run = max(1, min(64, len(order) // (4 * world)))
    place = np.arange(len(order)) // run
    return np.asarray(order, np.int64)[place % world == rank]
