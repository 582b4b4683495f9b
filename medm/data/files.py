"""Annotation files opened lazily: byte offsets of the records, found by one streaming pass.

Knows JSON and JSONL, not what a record means. Nothing is cached on disk; a million records cost 16 MB.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from medm.errors import DataError

MAX_RECORD_BYTES = 16 * 1024 * 1024
"""A record of more bytes is bad: conversations are kilobytes, and one runaway line must not fill the memory."""

_CHUNK = 1024 * 1024
_EXPECTED = "expected a JSON array or one JSON object a line"
_BOM = b"\xef\xbb\xbf"
_QUOTE, _BACKSLASH, _COMMA, _OPENING, _CLOSING = range(1, 6)
_KIND = np.zeros(256, np.uint8)
"""What a byte means to the structure of JSON; 0 for most."""
for _kind, _bytes in ((_QUOTE, b'"'), (_BACKSLASH, b"\\"), (_COMMA, b","), (_OPENING, b"[{"), (_CLOSING, b"]}")):
    _KIND[list(_bytes)] = _kind


class RecordFile:
    """A JSON array or JSONL file as a sequence of parsed records, read one at a time.

    Opening makes one pass over the file. Reads are at absolute offsets, so that workers forked later can share the
    handle; it is not sent along to others, who open their own.

    Raises:
        DataError: at opening, when there is no such file, or it is empty or neither of the two forms; at
            access, when that record is not valid JSON, with its index and line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                index = _index(file, self.path)
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror or error})", file=self.path) from None
        self._handle: BinaryIO | None = None
        self._starts, self._ends, self._damage = index.starts, index.ends, index.damage
        self._stamp = (status.st_size, status.st_mtime_ns)
        if len(self) == 0:
            raise DataError(f"the file holds no records; {_EXPECTED}", file=self.path)

    def __len__(self) -> int:
        return len(self._starts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Any:
        """Record `index`, parsed. Raises `DataError` with file, index and line."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path}: record {index} of {len(self)}")
        index %= len(self)
        try:
            if self._damage is not None and index == len(self) - 1:
                raise DataError(self._damage)
            return parse_json(self._read(index))
        except DataError as error:
            error.reason = f"line {self.line(index)}: {error.reason}"
            raise error.at(file=self.path, index=index) from None

    def line(self, index: int) -> int:
        """The line, from 1, on which a record begins. Counts through the file: for messages only."""
        with self.path.open("rb") as file:
            left = int(self._starts[index]) + self._leading_blank(file, index)
            file.seek(0)
            lines = 1
            while left > 0 and (chunk := file.read(min(_CHUNK, left))):
                lines += chunk.count(b"\n")
                left -= len(chunk)
        return lines

    def _leading_blank(self, file: BinaryIO, index: int) -> int:
        file.seek(int(self._starts[index]))
        head = file.read(min(4096, int(self._ends[index] - self._starts[index])))
        return len(head) - len(head.lstrip())

    def _read(self, index: int) -> bytes:
        start, end = int(self._starts[index]), int(self._ends[index])
        if end - start > MAX_RECORD_BYTES:
            raise DataError(f"a record of {end - start:,} bytes; at most {MAX_RECORD_BYTES:,} are read")
        try:
            if self._handle is None:
                self._handle = self.path.open("rb", buffering=0)
                weakref.finalize(self, self._handle.close)
            status = os.fstat(self._handle.fileno())
            if (status.st_size, status.st_mtime_ns) != self._stamp:
                raise DataError("the file changed after it was opened; start again, so that all records agree")
            return os.pread(self._handle.fileno(), end - start, start)
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror or error})") from None


def parse_json(text: bytes) -> Any:
    """Strict JSON: UTF-8, no key twice, no NaN or Infinity. Raises `DataError` without a place."""
    try:
        return _DECODER.decode(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not valid UTF-8 at byte {error.start} of the record; save the file as UTF-8") from None
    except RecursionError:
        raise DataError("nested too deeply to be an annotation record") from None
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON: {error.msg} at character {error.pos} of the record") from None
    except ValueError as error:  # an integer of more digits than Python converts
        if isinstance(error, DataError):
            raise
        raise DataError(f"not valid JSON: {error}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError("the key is written twice in one object; keep one of the two", field=twice)
    return record


def _refuse_constant(name: str) -> Any:
    raise DataError(f"{name} is not JSON; write null, or leave the field out")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)


@dataclass(frozen=True, slots=True)
class _Index:
    starts: np.ndarray
    ends: np.ndarray
    damage: str | None
    """What is wrong from the last record on, where the array as a whole is broken."""


def _index(file: BinaryIO, path: Path) -> _Index:
    head = file.read(4096)
    if not head.strip():
        raise DataError(f"the file is empty; {_EXPECTED}", file=path)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("the file is UTF-16; save it as UTF-8", file=path)
    text = head.removeprefix(_BOM)
    start = len(head) - len(text)
    if text.lstrip().startswith(b"{") and text.lstrip().split(b"\n", 1)[0].strip() == b"{":
        raise DataError(
            f"the file is one JSON object over several lines; {_EXPECTED}",
            file=path,
        )
    file.seek(0)
    scan: _ArrayScan | _LineScan = _ArrayScan(start) if text.lstrip().startswith(b"[") else _LineScan(start)
    offset = 0
    while chunk := file.read(_CHUNK):
        codes = np.frombuffer(chunk, np.uint8)
        scan.feed(codes[start:] if offset == 0 else codes, offset + (start if offset == 0 else 0))
        offset += len(chunk)
    starts, ends, damage = scan.finish(offset)
    if isinstance(scan, _LineScan) or len(starts) == 1:  # a blank between two commas of an array is a bad record
        starts, ends = _without_blank(file, starts, ends)
    return _Index(starts, ends, damage)


def _without_blank(file: BinaryIO, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Empty lines, and the nothing between the brackets of `[]`, are no records."""
    keep = np.ones(len(starts), bool)
    for index in np.flatnonzero(ends - starts <= 64):
        file.seek(int(starts[index]))
        keep[index] = bool(file.read(int(ends[index] - starts[index])).strip())
    return starts[keep], ends[keep]


class _LineScan:
    """Spans between line ends."""

    def __init__(self, start: int) -> None:
        self._start, self._breaks = start, [np.empty(0, np.int64)]

    def feed(self, codes: np.ndarray, offset: int) -> None:
        self._breaks.append(np.flatnonzero(codes == ord("\n")) + offset)

    def finish(self, size: int) -> tuple[np.ndarray, np.ndarray, str | None]:
        breaks = np.concatenate(self._breaks)
        return np.concatenate([[self._start], breaks + 1]), np.concatenate([breaks, [size]]), None


class _ArrayScan:
    """Spans between the commas of the outermost array. Strings, escapes and nesting are followed across chunks."""

    def __init__(self, start: int) -> None:
        self._bounds: list[np.ndarray] = []
        """Offsets of the opening bracket, of each comma on its level, and of what closes it."""
        self._depth, self._in_string, self._escaping = 0, False, False
        self._closed, self._damage = False, None

    _damage: str | None

    def feed(self, codes: np.ndarray, offset: int) -> None:
        outside, kinds = self._structure(codes)
        is_opening, is_closing, is_comma = kinds == _OPENING, kinds == _CLOSING, kinds == _COMMA
        steps = is_opening.astype(np.int64) - is_closing
        after = self._depth + np.cumsum(steps)
        before = after - steps
        self._depth = int(after[-1]) if len(after) else self._depth
        if self._closed:
            self._note_rest(codes)
            return
        bound = (is_comma & (after == 1)) | (is_opening & (before == 0)) | (is_closing & (after == 0))
        closing = np.flatnonzero(is_closing & (after == 0))
        if len(closing):
            bound[closing[0] + 1 :] = False
            self._closed = True
            end = int(outside[closing[0]])
            if codes[end] != ord("]"):
                self._damage = "a '}' without its '{': the array is broken here, and later records cannot be found"
            self._note_rest(codes[end + 1 :])
        self._bounds.append(outside[bound] + offset)

    def _structure(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of brackets and commas outside strings, and what each is."""
        kinds = _KIND[codes]
        places = np.flatnonzero(kinds)
        kinds = kinds[places]
        is_quote = kinds == _QUOTE
        is_quote[np.isin(places, self._escaped(places[kinds == _BACKSLASH], len(codes)), assume_unique=True)] = False
        quotes_before = np.cumsum(is_quote) + self._in_string
        self._in_string = bool(quotes_before[-1] % 2) if len(places) else self._in_string
        outside = (kinds >= _COMMA) & (quotes_before % 2 == 0)
        return places[outside], kinds[outside]

    def _escaped(self, slashes: np.ndarray, size: int) -> np.ndarray:
        """Positions that follow an odd run of backslashes; a run may begin in the chunk before."""
        escaped = np.zeros(0, np.int64)
        if self._escaping and size:
            escaped = np.zeros(1, np.int64)
            slashes = slashes[slashes != 0]
        self._escaping = False
        if len(slashes):
            first = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)
            last = np.append(first[1:], len(slashes)) - 1
            odd = slashes[last[(last - first) % 2 == 0]]
            self._escaping = bool(len(odd) and odd[-1] == size - 1)
            escaped = np.concatenate([escaped, odd + 1])
        return escaped

    def _note_rest(self, codes: np.ndarray) -> None:
        if self._damage is None and codes.tobytes().strip():
            self._damage = "there is text after the array's closing ']': the array is broken at or before this record"

    def finish(self, size: int) -> tuple[np.ndarray, np.ndarray, str | None]:
        bounds = np.concatenate(self._bounds)
        if not self._closed:
            self._damage = (
                "the file ends inside the array (no closing ']'): it was cut off, or a quote or bracket is missing "
                "here, and later records cannot be found"
            )
            bounds = np.append(bounds, size)
        return bounds[:-1] + 1, bounds[1:], self._damage
