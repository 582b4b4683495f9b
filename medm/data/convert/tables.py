"""Rows of a CSV or TSV table, by the names of its columns.

Cells are data of patients: a message names row and column, and never quotes a cell.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from medm.config import Options
from medm.data.convert.rows import Row
from medm.data.left_out import LeftOut
from medm.data.tables import TableFile
from medm.errors import DataError, MediaError, RecipeError, suggest
from medm.imaging import resolve_inside
from medm.imaging.paths import MissingFileError
from medm.imaging.pseudonyms import Pseudonyms
from medm.types import JsonObject, Kind, Media

_PRESENT = {"1", "1.0", "true", "yes", "y", "present", "positive"}
_ABSENT = {"0", "0.0", "false", "no", "n", "absent", "negative"}
_UNKNOWN = {"", "-1", "-1.0", "nan", "none", "null", "unknown", "uncertain", "na", "n/a"}
"""Cells of a finding, in small letters; CheXpert writes -1 for uncertain."""


class TableColumns(Options):
    """Names of the columns of a table."""

    image: list[str] = []
    """Paths of images; several columns hold several images of one row."""
    volume: list[str] = []
    """Paths of volumes."""
    text: str | None = None
    """Report, caption or description."""
    question: str | None = None
    answer: str | None = None
    labels: list[str] = []
    """Findings, a column each: 1, 0, or blank for unknown. For pairs one column, the class."""
    id: str | None = None
    patient: str | None = None
    """Identifies the patient; written as a pseudonym."""

    def names(self) -> list[str]:
        """Return the columns that the table must have."""
        single = (self.text, self.question, self.answer, self.id, self.patient)
        named = [name for name in single if name is not None]
        return [*self.image, *self.volume, *named, *self.labels]

    def check(self, table: TableFile, *, pairs: bool) -> None:
        """Refuse columns that do not go together, or that the table lacks.

        Raises:
            RecipeError: they do not go together.
            DataError: the table has no such column.
        """
        if not self.image and not self.volume:
            raise RecipeError("no column of images or volumes is named; expected one at least")
        if self.text is not None and (self.question or self.answer):
            raise RecipeError("a text column stands for question and answer; name one or the other")
        if self.question is None and self.answer is not None and pairs:
            raise RecipeError("pairs have a text and no answer; name the column as text")
        if pairs and len(self.labels) > 1:
            raise RecipeError("a pair has one label; name one label column")
        for name in self.names():
            if name not in table.fields:
                raise DataError(f"no column {name!r}{suggest(name, table.fields)}", file=table.path)


def table_rows(
    table: TableFile,
    columns: TableColumns,
    *,
    root: Path,
    pseudonyms: Pseudonyms,
    left_out: LeftOut,
    pairs: bool = False,
) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a table with their positions; those that cannot be used are counted.

    Args:
        table: the table.
        columns: of it.
        root: folder that its paths are relative to; an absolute path in it is written relative.
        pseudonyms: name the patients.
        left_out: takes the rows without a file or a text.
        pairs: the label column is a class, not a finding.

    Raises:
        RecipeError: the columns do not go together.
        DataError: the table lacks a column.
    """
    columns.check(table, pairs=pairs)
    expects_text = columns.text is not None or columns.answer is not None
    for index in range(len(table)):
        try:
            cells = table[index]
            assert isinstance(cells, dict)
            media = [
                *_media(cells, columns.image, "image", root),
                *_media(cells, columns.volume, "volume", root),
            ]
            if not media:
                raise _UnusableRowError("no file", "the cells of its files are blank")
            row = _row(cells, columns, media, pseudonyms, pairs=pairs)
        except _UnusableRowError as error:
            left_out.add(error.kind, DataError(error.reason, file=table.path, index=index))
            continue
        except DataError as error:
            left_out.add("the row cannot be read", error.at(file=table.path, index=index))
            continue
        if expects_text and row.text is None:
            name = columns.text or columns.answer
            reason = DataError(f"column {name!r} is blank", file=table.path, index=index)
            left_out.add("no text", reason)
            continue
        yield index, row


class _UnusableRowError(Exception):
    """A row that gives no record."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def _row(
    cells: dict[str, str],
    columns: TableColumns,
    media: Sequence[Media],
    pseudonyms: Pseudonyms,
    *,
    pairs: bool,
) -> Row:
    def cell(name: str | None) -> str | None:
        return None if name is None else (cells.get(name, "").strip() or None)

    patient = cell(columns.patient)
    extra: JsonObject = {}
    if patient is not None:
        extra["patient"] = pseudonyms.name(patient, "patient")
    if columns.question is not None and cell(columns.question) is None:
        raise _UnusableRowError("no question", f"column {columns.question!r} is blank")
    return Row(
        media=media,
        text=cell(columns.text) or cell(columns.answer),
        question=cell(columns.question),
        label=cell(columns.labels[0]) if pairs and columns.labels else None,
        labels=None if pairs or not columns.labels else _labels(cells, columns.labels),
        id=cell(columns.id),
        extra=extra,
    )


def _labels(cells: dict[str, str], names: Sequence[str]) -> dict[str, int | None]:
    labels: dict[str, int | None] = {}
    for name in names:
        cell = cells.get(name, "").strip().lower()
        if cell not in _PRESENT | _ABSENT | _UNKNOWN:
            raise _UnusableRowError(
                "a label that is none",
                f"column {name!r}: expected 1, 0, or a blank cell for unknown",
            )
        labels[name] = None if cell in _UNKNOWN else int(cell in _PRESENT)
    return labels


def _media(cells: dict[str, str], names: Sequence[str], kind: Kind, root: Path) -> Iterator[Media]:
    """Yield the files of a row's cells, each a path or a JSON list of paths."""
    for name in names:
        cell = cells.get(name, "").strip()
        if not cell:
            continue
        paths = _listed(cell, name) if cell.startswith("[") else [cell]
        for path in paths:
            try:
                yield Media(kind, inside(root, path))
            except MissingFileError:
                raise _UnusableRowError(
                    "a file is missing", f"column {name!r}: no such file under {root}"
                ) from None
            except MediaError:
                raise _UnusableRowError(
                    "a path that is refused", f"column {name!r}: the path leads out of {root}"
                ) from None


def inside(root: Path, path: str) -> str:
    """Return a path relative to a root that holds the file; an absolute one is rewritten.

    Raises:
        MissingFileError: no such file.
        MediaError: the path leads out of the root.
    """
    written = Path(path)
    if written.is_absolute() and written.is_relative_to(root.resolve()):
        path = written.relative_to(root.resolve()).as_posix()
    elif written.is_absolute() and written.is_relative_to(root):
        path = written.relative_to(root).as_posix()
    resolve_inside(root, path)
    return path


def _listed(cell: str, name: str) -> list[str]:
    try:
        paths = json.loads(cell)
    except ValueError:
        paths = None
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise _UnusableRowError(
            "a list that is none", f"column {name!r}: expected a JSON list of paths"
        )
    return paths
