"""Reading of a benchmark's files. Missing or damaged files are named; no code in them runs."""

from __future__ import annotations

import csv
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from medm.data.record_files import parse_json
from medm.errors import DataError, MediaError
from medm.imaging import resolve_inside
from medm.imaging.arrays import read_npy, read_npz_member
from medm.types import Config

Value = TypeVar("Value")

MAX_NUMBERS = 4 * 10**9
"""Most numbers in one array: the largest here, DermaMNIST at 224 pixels, has 1.1e9."""
_MAX_FIELD = 16 * 2**20
"""Longest CSV field in characters; Python's own limit of 131,072 is below some reports."""


def require(folder: Path, *names: str, layout: str) -> Path:
    """Return the first of these files or folders that exists.

    Raises `DataError`, which names it and what belongs beside it.
    """
    for name in names:
        path = folder / name
        if path.exists():
            return path
    wanted = " or ".join(repr(name) for name in names)
    there = (
        ""
        if folder.is_dir()
        else ", which is not a folder"
        if folder.exists()
        else ", which does not exist"
    )
    raise DataError(
        f"{wanted} is missing in {folder}{there}; expected {layout}", file=folder / names[0]
    )


def read_json(path: Path) -> object:
    """One strict JSON file. Raises `DataError` with the file."""
    try:
        return parse_json(_bytes(path))
    except DataError as error:
        raise error.at(file=path) from None


def read_json_list(path: Path) -> list[Config]:
    """A JSON array of objects."""
    value = read_json(path)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError("expected a list of objects", file=path)
    return value


def read_json_map(path: Path) -> Config:
    """A JSON object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"expected an object, found {type(value).__name__}", file=path)
    return value


def read_jsonl(path: Path) -> Iterator[Config]:
    """One JSON object per line; empty lines are skipped."""
    for index, line in enumerate(_bytes(path).splitlines()):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except DataError as error:
            raise error.at(file=path, index=index) from None
        if not isinstance(value, dict):
            raise DataError("expected an object", file=path, index=index)
        yield value


def read_csv(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Rows of a CSV with a header. Raises `DataError` where one of `columns` is missing."""
    csv.field_size_limit(_MAX_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = sorted(set(columns) - set(reader.fieldnames or ()))
            if missing:
                raise DataError(
                    f"column(s) {missing} are missing; found {reader.fieldnames}", file=path
                )
            for row in reader:
                yield {key: value or "" for key, value in row.items() if key is not None}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot be read as CSV in UTF-8 ({error})", file=path) from None


def read_text(path: Path) -> str:
    """A text file in UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read as text in UTF-8 ({error})", file=path) from None


def read_array(path: Path) -> np.ndarray:
    """A .npy of numbers; never an object."""
    try:
        with path.open("rb") as stream:
            return read_npy(stream, str(path), max_items=MAX_NUMBERS)
    except OSError as error:
        raise MediaError(f"cannot be read ({error.strerror or error})", file=path) from None


class NumberArchive:
    """The arrays of an .npz by name, each read on access; never an object."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self.names = {
                    name.removesuffix(".npy")
                    for name in archive.namelist()
                    if name.endswith(".npy")
                }
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"cannot be read as an NPZ archive ({error})", file=path) from None

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.names:
            raise DataError(
                f"there is no array {name!r}; found {sorted(self.names)}", file=self.path
            )
        try:
            with zipfile.ZipFile(self.path) as archive:
                return read_npz_member(
                    archive,
                    archive.getinfo(f"{name}.npy"),
                    f"{self.path}:{name}",
                    max_items=MAX_NUMBERS,
                    max_bytes=8 * MAX_NUMBERS,
                )
        except (OSError, zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise DataError(f"array {name!r} is damaged ({error})", file=self.path) from None


def image_size(folder: Path, relative: str) -> tuple[int, int]:
    """Return width and height in pixels, from the header.

    Raises `MediaError` for a missing or unreadable file.
    """
    from PIL import Image, UnidentifiedImageError

    path = resolve_inside(folder, relative)
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise MediaError(f"cannot be read as an image ({error})", file=path) from None


def field_of(
    row: object, name: str, kind: type[Value] | tuple[type[Value], ...], *, file: Path, index: int
) -> Value:
    """A field of a record, checked for its type. Raises `DataError` with the place."""
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind):
        found = "nothing" if value is None else type(value).__name__
        expected = (
            kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
        )
        raise DataError(f"expected {expected}, found {found}", file=file, index=index, field=name)
    return value


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", file=path) from None
