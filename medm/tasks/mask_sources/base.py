"""Contract of a source of grounded records, and what the readers share."""

from __future__ import annotations

import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from medm.config import Options, validate
from medm.data.left_out import LeftOut
from medm.errors import DataError, MediaError
from medm.imaging import resolve_inside
from medm.imaging.paths import MissingFileError
from medm.types import (
    KIND_OF_PLACEHOLDER,
    MASK_TOKEN,
    PHRASE_TOKENS,
    REGION_MARK,
    JsonObject,
    Kind,
)

WORDINGS = Path(__file__).parent / "wordings"

_RESERVED = (MASK_TOKEN, REGION_MARK, *PHRASE_TOKENS, *KIND_OF_PLACEHOLDER)
"""Texts that a phrase of a data set may not hold, because records give them a meaning."""


class Wordings(Options):
    """Questions and answers of a task: one file of `wordings/`. The first of each is the default.

    Placeholders such as {phrase} stand where the data set's own words go.
    """

    questions: list[str] = []
    answers: list[str] = []
    absent: list[str] = []
    """Answers where the target is not in the image, if they are others."""


@cache
def wordings(task: str) -> Wordings:
    """Return the questions and answers of a task. Raises `RecipeError` for a file with other
    keys.
    """
    import yaml

    file = WORDINGS / f"{task}.yaml"
    return validate(Wordings, yaml.safe_load(file.read_text("utf-8")), source=str(file))


class Draw:
    """Random choices of a conversion, the same for the same seed.

    Args:
        seed: of all choices. Without one, wordings are the first of their pools, and other choices
            are those of seed 0.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self._stream = random.Random(seed)

    def pick(self, pool: Sequence[str]) -> str:
        """Return a text of a pool: drawn from one stream over the split, or the first one."""
        return pool[0] if self.seed is None else self._stream.choice(pool)

    def of(self, name: str) -> random.Random:
        """Return a generator that depends on the seed and a name alone, not on the order."""
        return random.Random(f"{self.seed or 0}:{name}")


@dataclass(frozen=True, kw_only=True)
class MaskSet(ABC):
    """One published set of images and masks, as it is distributed."""

    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    source: str
    """Name of the set in the records."""
    layout: str
    """The files it expects, for the message about a missing one."""

    @abstractmethod
    def rows(
        self, folder: Path, split: str, *, draw: Draw, left_out: LeftOut
    ) -> Iterator[JsonObject]:
        """Yield the records in the order of the files.

        Args:
            folder: where the set lies; paths in the records are relative to it.
            split: one of `splits`.
            draw: chooses wordings, and what else is chosen.
            left_out: counts rows without a record, and files that no row names.

        Raises:
            DataError: an annotation file is missing, or has another layout.
        """

    def records(
        self, folder: Path, split: str = "train", *, left_out: LeftOut, seed: int | None = None
    ) -> Iterator[JsonObject]:
        """Yield the records that `medm.data` reads: turns, and `masks` or `regions`.

        Args:
            folder: where the set lies; paths in the records are relative to it.
            split: one of `splits`.
            left_out: counts the rows that give no record, and files that no row names.
            seed: draws questions and answers from their pools, one stream over the split. Without
                it all records are worded alike.

        Raises:
            DataError: as `rows`, for an unknown split, or if no row can be used.
        """
        if split not in self.splits:
            raise DataError(
                f"there is no split {split!r}; this source has {', '.join(self.splits)}"
            )
        used = False
        for record in self.rows(folder, split, draw=Draw(seed), left_out=left_out):
            used = True
            yield {"source": self.source, **record}
        if not used:
            reasons = "; ".join(left_out.lines()) or "the annotation files hold no rows"
            raise DataError(f"no row of {self.source} in {folder} gives a record: {reasons}")


@contextmanager
def noting(left_out: LeftOut, file: Path, index: int) -> Iterator[None]:
    """Count a row that raises a `DataError` as left out, with the reason."""
    try:
        yield
    except DataError as error:
        reason = "rows that cannot be used"
        if isinstance(error, MediaError):
            is_missing = isinstance(error, MissingFileError)
            reason = "a file is missing" if is_missing else "a file that cannot be used"
        left_out.add(reason, DataError(error.reason, file=file, index=index, field=error.field))


def find_file(folder: Path, name: str, places: Iterable[str] = ("",)) -> str:
    """Return the path of a file relative to the folder, in the first place that has it.

    Raises:
        MissingFileError: none has it.
        MediaError: a path that leads out of the folder.
    """
    name = name.strip().removeprefix("./")
    if not name:
        raise MissingFileError("the row names no file")
    paths = [f"{place}/{name}" if place else name for place in places]
    for path in paths:
        if os.path.lexists(folder / path) or ".." in path:
            resolve_inside(folder, path)
            return path
    raise MissingFileError(f"no such file in {folder}: {' or '.join(paths)}")


def note_unnamed(
    left_out: LeftOut, folder: Path, place: str, named: Iterable[str], *, file: Path, what: str
) -> None:
    """Count the files of a folder that no row of an annotation file names.

    Args:
        left_out: counts them.
        folder: of the set.
        place: the folder below it that is listed; a missing one holds nothing.
        named: paths relative to `folder` that rows name.
        file: the annotation file.
        what: the kind of file, for the reason.
    """
    if not (folder / place).is_dir():
        return
    known = set(named)
    for path in sorted((folder / place).rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if path.is_file() and not path.name.startswith(".") and relative not in known:
            left_out.add(
                f"{what} that no row names", DataError(f"{relative} is not used", file=file)
            )


def require_plain(text: str, field: str) -> str:
    """Return a text of a data set without spaces around it.

    Raises:
        DataError: it is empty, or holds a text that has a meaning in records.
    """
    text = text.strip()
    if not text:
        raise DataError("expected words, found empty text", field=field)
    if held := next((mark for mark in _RESERVED if mark in text), None):
        raise DataError(f"the text holds {held}, which has a meaning in records", field=field)
    return text


def conversation(
    name: str, kind: Kind, files: Sequence[str], turns: Sequence[tuple[str, str]], task: str
) -> JsonObject:
    """Return a record without masks: the files stand before the first question.

    Args:
        name: its `id`.
        kind: of the files.
        files: paths relative to the folder of the set.
        turns: questions and replies.
        task: the record's `task`.
    """
    texts = []
    for number, (question, reply) in enumerate(turns):
        shown = f"<{kind}>" * len(files) + "\n" if number == 0 else ""
        texts += [
            {"from": "human", "value": f"{shown}{question}"},
            {"from": "gpt", "value": reply},
        ]
    return {
        "id": name,
        "task": task,
        kind: files[0] if len(files) == 1 else list(files),
        "conversations": texts,
    }
