"""Tables of text as annotation files: CSV and TSV, a record a row, fields by column name.

Rows are found in one streaming pass, as those of JSON files are; a million cost 16 MB.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from medm.data.record_files import Index, RecordFile, decodable, open_regular, spans, without_blank
from medm.errors import DataError

_EXPECTED = "expected a table of UTF-8 text whose first row names the columns"
_HEAD = 65536
"""Bytes in which the first row has to end."""
_DELIMITERS = ",;\t"


class TableFile(RecordFile):
    """Sequence of the rows of a table, each a dictionary of text by field. Empty cells are left
    out.

    Cells may be quoted, hold the delimiter and line breaks, and write a quote as two (RFC 4180).
    Within a cell that is not quoted, a quote is a character (`5" tube`).
    The delimiter is the one of comma, semicolon and tab that gives the most columns.

    Args:
        path: the file.
        columns: by field the column that stands for it; other columns go by their own names.
        check: called with the fields of the table; raises `DataError` where it lacks one.

    Raises:
        DataError: at opening, when it is no table, or a column is missing or named twice; at
            access, when that row has another number of cells than the header, a broken quote, or a
            carriage return that ends it within its line.
    """

    _expected = _EXPECTED

    def __init__(
        self,
        path: str | Path,
        columns: Mapping[str, str] | None = None,
        check: Callable[[Collection[str]], None] | None = None,
    ) -> None:
        super().__init__(path)
        self._fields = _renamed(self._names, columns or {}, self.path)
        if check is not None:
            try:
                check(self._fields)
            except DataError as error:
                error.reason = f"row 1: {error.reason}"
                raise error.at(file=self.path) from None

    @property
    def fields(self) -> Sequence[str]:
        """Fields of the table in the order of its columns."""
        return self._fields

    def _index(self, file: BinaryIO) -> Index:
        head, start = decodable(file.read(_HEAD), self.path, expected=_EXPECTED)
        self._delimiter, self._names = _header(head, self.path)
        starts, ends, damage = spans(file, _RowScan(start, self._delimiter), start)
        starts, ends = without_blank(file, starts, ends)
        return Index(starts[1:], ends[1:], damage)

    def _parse(self, text: bytes) -> dict[str, str]:
        cells = _cells(_decoded(text), self._delimiter)
        if len(cells) != len(self._fields):
            raise DataError(
                f"the row has {len(cells)} cells, and the header {len(self._fields)} columns; "
                "quote cells that hold the delimiter or a line break"
            )
        return {
            field: cell for field, cell in zip(self._fields, cells, strict=True) if cell.strip()
        }


def check_header(path: Path) -> None:
    """Check that a table exists and has a first row of names. Raises `DataError`."""
    with open_regular(path) as file:
        _header(decodable(file.read(_HEAD), path, expected=_EXPECTED)[0], path)


class _RowScan:
    """Spans between line ends that stand outside quoted cells, across chunks.

    A quote opens a cell only where it begins one; within an unquoted cell it is a character, such
    as an inch mark. Quotes that follow each other are one run. A run of an even number changes
    nothing; one of an odd number opens or closes a cell where it begins a cell, and ends one
    elsewhere.
    """

    def __init__(self, start: int, delimiter: str) -> None:
        self._start, self._breaks = start, [np.empty(0, np.int64)]
        self._before_cell = np.frombuffer(f"{delimiter}\r\n".encode(), np.uint8)
        self._last = ord("\n")
        self._inside = 0
        self._run, self._run_begins = 0, False  # of quotes at the end of the last chunk

    def feed(self, codes: np.ndarray, offset: int) -> None:
        if not len(codes):
            return
        ends = np.flatnonzero(codes == ord("\n"))
        at, lengths, begins = self._runs(codes)
        states = self._states(lengths, begins)
        self._breaks.append(ends[states[np.searchsorted(at, ends)] == 0] + offset)
        self._inside, self._last = int(states[-1]), int(codes[-1])

    def finish(self, size: int) -> tuple[np.ndarray, np.ndarray, str | None]:
        breaks = np.concatenate(self._breaks)
        damage = None
        if self._states(np.array([self._run]), np.array([self._run_begins]))[-1]:
            damage = (
                "a quote is opened in this row and never closed, so that later rows cannot be "
                "found; within a quoted cell, write a quote as two"
            )
        return np.concatenate([[self._start], breaks + 1]), np.append(breaks, size), damage

    def _runs(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return position, length and whether it begins a cell of each run that has ended."""
        quotes = np.flatnonzero(codes == ord('"'))
        first = np.flatnonzero(np.diff(quotes, prepend=-2) > 1)
        at = quotes[first]
        lengths = np.diff(first, append=len(quotes))
        before = np.where(at > 0, codes[at - 1], self._last)
        begins = np.isin(before, self._before_cell)
        if self._run and len(at) and at[0] == 0:
            lengths[0] += self._run
            begins[0] = self._run_begins
        elif self._run:
            at = np.concatenate([[-1], at])
            lengths = np.concatenate([[self._run], lengths])
            begins = np.concatenate([[self._run_begins], begins])
        self._run = 0
        if codes[-1] == ord('"'):
            self._run, self._run_begins = int(lengths[-1]), bool(begins[-1])
            at, lengths, begins = at[:-1], lengths[:-1], begins[:-1]
        return at, lengths, begins

    def _states(self, lengths: np.ndarray, begins: np.ndarray) -> np.ndarray:
        """Return 1 for inside of a quoted cell, 0 for outside: before the first run, and after
        each.
        """
        odd = lengths % 2 == 1
        turns = np.cumsum(np.concatenate([[self._inside], odd & begins]))
        ended = np.concatenate([[False], odd & ~begins])
        # Turns are counted from the last run that left every cell.
        last = np.maximum.accumulate(np.where(ended, np.arange(len(ended)), -1))
        states: np.ndarray = (turns - np.where(last >= 0, turns[last], 0)) % 2
        return states


def _header(head: bytes, path: Path) -> tuple[str, list[str]]:
    """Return the delimiter and the names of the columns."""
    rows: dict[str, list[str]] = {}
    reason = ""
    for delimiter in _DELIMITERS:
        text = _decoded(_first_row(head, delimiter), path=path)
        try:
            rows[delimiter] = _cells(text.strip(), delimiter)
        except DataError as error:  # such as a quote that ends where another delimiter stands
            reason = error.reason
    if not rows:
        raise DataError(f"row 1: {reason}; {_EXPECTED}", file=path)
    delimiter = max(rows, key=lambda one: len(rows[one]))
    names = [name.strip() for name in rows[delimiter]]
    if "" in names:
        raise DataError(
            f"row 1: column {names.index('') + 1} of {len(names)} has no name; {_EXPECTED}",
            file=path,
        )
    _require_unique(names, path)
    return delimiter, names


def _first_row(head: bytes, delimiter: str) -> bytes:
    """Return the first row that is not blank."""
    scan = _RowScan(0, delimiter)
    scan.feed(np.frombuffer(head, np.uint8), 0)
    starts, ends, _ = scan.finish(len(head))
    rows = (head[start:end] for start, end in zip(starts, ends, strict=True))
    return next((row for row in rows if row.strip()), b"")


def _renamed(names: list[str], columns: Mapping[str, str], path: Path) -> list[str]:
    """Return the fields that the columns stand for, in order."""
    for field, column in columns.items():
        if column not in names:
            raise DataError(
                f"row 1: no column {column!r}, which `columns` of the source names for {field!r}; "
                f"the table has {', '.join(names)}",
                file=path,
            )
    fields = {column: field for field, column in columns.items()}
    if len(fields) != len(columns):
        raise DataError("`columns` of the source names one column for two fields", file=path)
    renamed = [fields.get(name, name) for name in names]
    _require_unique(renamed, path)
    return renamed


def _require_unique(names: list[str], path: Path) -> None:
    twice = [name for position, name in enumerate(names) if name in names[:position]]
    if twice:
        raise DataError(
            f"row 1: two columns stand for {twice[0]!r}; rename one, or name the other by "
            "`columns` of the source",
            file=path,
        )


def _decoded(text: bytes, *, path: Path | None = None) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not valid UTF-8 at byte {error.start} of the row; save the table as UTF-8", file=path
        ) from None


def _cells(row: str, delimiter: str) -> list[str]:
    try:
        rows = list(csv.reader(io.StringIO(row, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise DataError(
            f"a broken quote ({error}); within a quoted cell, write a quote as two"
        ) from None
    if len(rows) > 1:
        raise DataError(
            f"{len(rows)} rows where one is expected; a carriage return alone ends a row: save the "
            "table with line feeds, or quote the cell that holds it"
        )
    return rows[0] if rows else []
