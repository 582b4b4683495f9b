"""Files of a folder as rows, with the text beside each file or the name of its class folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias

from medm.data.convert.rows import Row
from medm.data.left_out import LeftOut
from medm.errors import DataError
from medm.imaging.paths import media_below
from medm.types import Kind, Media

Answers: TypeAlias = Literal["texts", "classes", "none"]
"""What is learned of a file: the text beside it, the name of its first folder, or nothing."""

_MAX_TEXT = 2**20
"""Most bytes of a text."""


def folder_files(folder: Path, kinds: Sequence[Kind]) -> list[tuple[str, Kind]]:
    """Return the images and volumes of a folder.

    Args:
        folder: is searched at any depth.
        kinds: those that are wanted; a .npy file is an image where images are.

    Raises:
        DataError: no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise DataError("no such folder; expected one with images or volumes", file=folder)
    found = [(path, kind) for path, kind in media_below(folder, kinds) if kind in kinds]
    if not found:
        raise DataError(f"no {' or '.join(kinds)} in it", file=folder)
    return found


def answers_of(folder: Path, files: Sequence[tuple[str, Kind]]) -> Answers:
    """Return what a folder offers: texts where one file has one, else classes, else nothing."""
    if any(_text_file(folder, path).is_file() for path, _ in files):
        return "texts"
    return "classes" if class_names(files) else "none"


def class_names(files: Sequence[tuple[str, Kind]]) -> list[str]:
    """Return the first folders of the files; empty where a file lies in none."""
    tops = [PurePosixPath(path).parts for path, _ in files]
    return sorted({parts[0] for parts in tops}) if all(len(parts) > 1 for parts in tops) else []


def folder_rows(
    folder: Path, files: Sequence[tuple[str, Kind]], answers: Answers, *, left_out: LeftOut
) -> Iterator[tuple[int, Row]]:
    """Yield a row for each file, with its position among them.

    Args:
        folder: of the files.
        files: of `folder_files`.
        answers: what is learned.
        left_out: takes the files without a text.

    Raises:
        DataError: classes are wanted, and a file lies in no folder of its own.
    """
    if answers == "classes" and not class_names(files):
        raise DataError(
            "expected each file in a folder of its class; some lie at the top", file=folder
        )
    for index, (path, kind) in enumerate(files):
        media = [Media(kind, path)]
        if answers == "classes":
            name = PurePosixPath(path).parts[0]
            yield index, Row(media=media, text=name, label=name, id=path)
            continue
        if answers == "none":
            yield index, Row(media=media, id=path)
            continue
        try:
            text = _read_text(_text_file(folder, path))
        except DataError as error:
            left_out.add("no text beside the file", error.at(file=folder / path))
            continue
        yield index, Row(media=media, text=text, id=path)


def _text_file(folder: Path, path: str) -> Path:
    """Return the name of the text of a file: `a.txt` of `a.png` or of the folder `a`."""
    name = PurePosixPath(path)
    stem = name.name.removesuffix(".gz")
    return folder / name.with_name(f"{PurePosixPath(stem).stem}.txt")


def _read_text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(_MAX_TEXT + 1)
    except OSError:
        raise DataError(f"expected {file.name} beside it") from None
    if len(data) > _MAX_TEXT:
        raise DataError(f"{file.name} is longer than {_MAX_TEXT} bytes")
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{file.name} is not UTF-8 at byte {error.start}") from None
    if not text:
        raise DataError(f"{file.name} is empty")
    return text
