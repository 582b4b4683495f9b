"""Contract of a source of pairs, and the way from its rows to records of the pipeline `pairs`."""

from __future__ import annotations

import ast
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from medm.data.left_out import LeftOut
from medm.errors import DataError, MediaError
from medm.imaging import resolve_inside
from medm.imaging.paths import MissingFileError
from medm.tasks.benchmark_files import read_csv, read_text
from medm.types import JsonObject

MAX_LITERAL = 2**20
"""Most characters of a list written as text in a CSV field."""
_EMPTY = {"", "nan", "none"}
"""Texts that pandas and others write for a missing value."""


@dataclass(slots=True)
class Pair:
    """One row of a published annotation file."""

    file: Path
    """The annotation file."""
    index: int
    """Position of the row in it, from 0."""
    image: str = ""
    """Path of the image or volume as the row has it."""
    captions: Sequence[str] = ()
    label: str | None = None
    """The class, where captions are derived from one: pairs of one class are no negatives."""
    problem: str | None = None
    """Why the row cannot be used, where its reader knows already."""
    part: str = ""
    """Tells pairs of one row apart."""

    def fault(self, reason: str) -> DataError:
        """Return the fault of a row, and its place."""
        return DataError(reason, file=self.file, index=self.index)


@dataclass(frozen=True, kw_only=True)
class PairSource(ABC):
    """One set of images and texts as it is distributed."""

    splits: ClassVar[tuple[str, ...]] = ("train",)
    branch: ClassVar[Literal["image", "volume"]] = "image"
    source: str
    """Name of the set in the records."""
    layout: str
    """The files it expects, for the message about a missing one."""
    images: tuple[str, ...] = ("",)
    """Folders that the paths of the rows may be relative to; the first with such a file counts."""
    top: str = ""
    """Name of the set's own folder, which some copies of the rows put in front of the paths."""
    suffix: str = ""
    """Ending of the files, where the rows name them without one."""

    @abstractmethod
    def pairs(self, folder: Path, split: str) -> Iterator[Pair]:
        """The rows in the order of the files.

        Raises:
            DataError: an annotation file is missing, or has another layout.
        """

    def records(
        self,
        folder: Path,
        split: str = "train",
        *,
        left_out: LeftOut,
        exclude: Collection[str] = (),
    ) -> Iterator[JsonObject]:
        """The rows as records; those without an image file or a caption are counted and left out.

        Args:
            folder: where the set lies; paths in the records are relative to it.
            split: one of `splits`.
            left_out: counts the rows that give no record.
            exclude: files that are left out, such as the test images of a benchmark: paths as the
                rows or as the records have them.

        Raises:
            DataError: as `pairs`, for an unknown split, or if no row can be used.
        """
        if split not in self.splits:
            raise DataError(
                f"there is no split {split!r}; this source has {', '.join(self.splits)}"
            )
        used = False
        excluded = {self._plain(path) for path in exclude}
        for pair in self.pairs(folder, split):
            captions = [text for text in map(str.strip, pair.captions) if not is_empty(text)]
            if pair.problem is not None:
                left_out.add("rows that cannot be read", pair.fault(pair.problem))
                continue
            if not captions:
                left_out.add("no caption", pair.fault("the row has no caption"))
                continue
            try:
                path = self._find(folder, pair.image)
            except MissingFileError as error:
                left_out.add("no image file", pair.fault(error.reason))
                continue
            except MediaError as error:
                left_out.add("unusable path", pair.fault(error.reason))
                continue
            used = True
            if excluded and not excluded.isdisjoint((path, self._plain(pair.image))):
                left_out.add("excluded", pair.fault(f"{pair.image} is on the list"))
                continue
            name = f"{self.source}:{pair.file.stem}:{pair.index}"
            record: JsonObject = {
                "id": f"{name}:{pair.part}" if pair.part else name,
                "source": self.source,
                self.branch: path,
                "captions": captions,
            }
            if pair.label is not None:
                record["label"] = pair.label
            yield record
        if not used:
            reasons = "; ".join(left_out.lines()) or "the annotation files hold no rows"
            raise DataError(f"no row of {self.source} in {folder} gives a pair: {reasons}")

    def _find(self, folder: Path, image: str) -> str:
        """The path of a file relative to the folder.

        Raises:
            MissingFileError: there is no such file in any of the folders of images.
            MediaError: a path that leads out of the folder.
        """
        if is_empty(image.strip()):
            raise MissingFileError("the row names no image")
        image = self._plain(image) + self.suffix
        paths = [f"{place}/{image}" if place else image for place in self.images]
        # Looking for similar names lists a folder, so it is kept for names that may be written in
        # another way (backslashes, letters with accents) or are refused.
        there = next((path for path in paths if os.path.lexists(folder / path)), None)
        plain = image.isascii() and "\\" not in image and ".." not in image
        if there is None and plain:
            raise MissingFileError(f"no such file in {folder}: {' or '.join(paths)}")
        for path in paths if there is None else [there]:
            try:
                resolve_inside(folder, path)
            except MissingFileError as error:
                missing = error
                continue
            return path
        raise missing

    def _plain(self, path: str) -> str:
        """A path without the name of the set's own folder in front."""
        return path.removeprefix(f"{self.top}/") if self.top else path


def read_paths(file: Path) -> list[str]:
    """Paths of a list: one a line, or the column `Path` or `image` of a CSV.

    Raises:
        DataError: the file cannot be read, or names no path.
    """
    if file.suffix.lower() == ".csv":
        rows = list(read_csv(file, ()))
        column = next((name for name in ("Path", "image") if rows and name in rows[0]), None)
        if column is None:
            raise DataError(
                f"expected a column Path or image, found {sorted(rows[0]) if rows else 'no rows'}",
                file=file,
            )
        paths = [row[column].strip() for row in rows]
    else:
        paths = [line.strip() for line in read_text(file).splitlines()]
    paths = [path for path in paths if path]
    if not paths:
        raise DataError("the list names no file", file=file)
    return paths


def is_empty(text: str) -> bool:
    """Return True if a field of a CSV stands for a missing value."""
    return text.strip().lower() in _EMPTY


def read_list(text: str) -> list[str]:
    """The texts of a list that a CSV field holds as a Python literal (`"['a', 'b']"`).

    Raises:
        ValueError: it is no list of texts.
    """
    if len(text) > MAX_LITERAL:
        raise ValueError(f"a list of {len(text):,} characters; at most {MAX_LITERAL:,} are read")
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        value = None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"expected a list of texts, found {text[:60]!r}")
    return value
