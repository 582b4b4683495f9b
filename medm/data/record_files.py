"""Lazily read annotation files: byte offsets of the records, found in one streaming pass.

Knows JSON and JSONL, not what a record means. Nothing is cached on disk; a million records cost 16
MB.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, Protocol

import numpy as np

from medm.errors import DataError, InputLostError
from medm.limits import MAX_RECORD_BYTES

_CHUNK = 1024 * 1024
_HEAD = 4096
"""Bytes at the beginning of a file that show its format."""
EXPECTED = "expected a JSON array or one JSON object per line"
_BOM = b"\xef\xbb\xbf"
_QUOTE, _BACKSLASH, _COMMA, _OPENING, _CLOSING = range(1, 6)
_KIND = np.zeros(256, np.uint8)
"""Role of a byte in the structure of JSON; 0 for most."""
for _kind, _bytes in (
    (_QUOTE, b'"'),
    (_BACKSLASH, b"\\"),
    (_COMMA, b","),
    (_OPENING, b"[{"),
    (_CLOSING, b"]}"),
):
    _KIND[list(_bytes)] = _kind


class RecordSource(Protocol):
    """The records of one source, read one at a time."""

    @property
    def path(self) -> Path:
        """The file that a recipe names."""
        ...

    @property
    def groups(self) -> tuple[int, ...]:
        """Records that lie together on the disk, in order: those of each shard."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> object:
        """Return a record as JSON gives it. Raises `DataError`."""
        ...

    def place(self, index: int) -> str:
        """Return more about the place of a record than its position, for messages; or nothing."""
        ...

    def open_media(self, index: int, name: str) -> BinaryIO | None:
        """Return a file of a record that lies in the source itself; None where files lie under a
        root.
        """
        ...


class RecordFile:
    """Sequence of the parsed records of a JSON array or JSONL file, read one at a time.

    Opening makes one pass over the file. Reads are at absolute offsets, so that forked workers can
    use the same handle. It is not pickled; other processes open their own.

    Raises:
        DataError: at opening, when there is no such file, or it is empty or of neither format; at
            access, when that record is not valid JSON, with its index and line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open_regular(self.path) as file:
            try:
                status = os.fstat(file.fileno())
                index = self._index(file)
            except OSError as error:
                raise DataError(
                    f"cannot be read ({error.strerror or error})", file=self.path
                ) from None
        self._handle: BinaryIO | None = None
        self._starts, self._ends, self._damage = index.starts, index.ends, index.damage
        self._stamp = (status.st_size, status.st_mtime_ns)
        if len(self) == 0:
            raise DataError(f"the file holds no records; {self._expected}", file=self.path)

    _expected = EXPECTED
    """The forms that are read, for messages."""

    def _index(self, file: BinaryIO) -> Index:
        """Find the records. Raises `DataError` for a file of another form."""
        return _index(file, self.path)

    def _parse(self, text: bytes) -> object:
        """Parse the bytes of one record. Raises `DataError` without a place."""
        return parse_json(text)

    def __len__(self) -> int:
        return len(self._starts)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handle": None}

    def __iter__(self) -> Iterator[object]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> object:
        """Return record `index`, parsed. Raises `DataError` with file, index and line."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path}: record {index} of {len(self)}")
        index %= len(self)
        try:
            if self._damage is not None and index == len(self) - 1:
                raise DataError(self._damage)
            return self._parse(self._read(index))
        except DataError as error:
            error.reason = f"line {self.line(index)}: {error.reason}"
            raise error.at(file=self.path, index=index) from None

    @property
    def groups(self) -> tuple[int, ...]:
        """All records: the whole file is at hand."""
        return (len(self),)

    def place(self, index: int) -> str:
        """Nothing: a message that needs the line names it."""
        return ""

    def open_media(self, index: int, name: str) -> BinaryIO | None:
        """None: files lie under the root."""
        return None

    def line(self, index: int) -> int:
        """Return the line, from 1, on which a record begins, for messages.

        Counts the lines of the file up to the record.
        """
        with open_regular(self.path) as file:
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
            raise DataError(
                f"a record of {end - start:,} bytes; at most {MAX_RECORD_BYTES:,} are read"
            )
        try:
            if self._handle is None:
                self._handle = open_regular(self.path)
                weakref.finalize(self, self._handle.close)
            status = os.fstat(self._handle.fileno())
            if (status.st_size, status.st_mtime_ns) != self._stamp:
                raise InputLostError(
                    f"{self.path}: the file changed after it was opened; start again, so that all "
                    "records agree"
                )
            return os.pread(self._handle.fileno(), end - start, start)
        except OSError as error:  # it was readable when it was opened, so no record is at fault
            raise InputLostError(
                f"{self.path}: cannot be read any more ({error.strerror or error}); make the file "
                "available again"
            ) from error


def open_regular(path: Path) -> BinaryIO:
    """Open an annotation file.

    Raises `DataError` for anything but a regular file: reading a pipe might never end.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise DataError("no such file", file=path) from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot be read ({getattr(error, 'strerror', None) or error})", file=path
        ) from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        shards = any(path.glob("*.tar"))
        hint = "; for the tar shards in it, write a manifest with 'medm data shards'"
        raise DataError(
            f"is a folder; name the annotation file in it: {EXPECTED}{hint if shards else ''}",
            file=path,
        )
    raise DataError(
        f"is a device or pipe; write its records to a file first: {EXPECTED}", file=path
    )


def check_beginning(path: Path) -> None:
    """Check that an annotation file exists and is of a supported format, by its first bytes.

    Raises:
        DataError: as opening a `RecordFile`.
    """
    with open_regular(path) as file:
        _start(file.read(_HEAD), path)


def parse_json(text: bytes) -> object:
    """Parse strict JSON: UTF-8, unique keys, whole surrogate pairs, finite numbers.

    Raises `DataError` without a place.
    """
    try:
        record = _DECODER.decode(text.decode("utf-8"))
        if _SURROGATE.search(text):
            _require_unicode(record, "")
        return record
    except UnicodeDecodeError as error:
        raise DataError(
            f"not valid UTF-8 at byte {error.start} of the record; save the file as UTF-8"
        ) from None
    except RecursionError:
        raise DataError("nested too deeply to be an annotation record") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"not valid JSON: {error.msg} at character {error.pos} of the record"
        ) from None
    except ValueError as error:  # an integer of more digits than Python converts
        if isinstance(error, DataError):
            raise
        raise DataError(f"not valid JSON: {error}") from None


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DataError(
                    "the key is written twice in one object; keep one of the two",
                    field=_printable(key),
                )
            seen.add(key)
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise DataError(f"{name} is not JSON; write null, or leave the field out")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise DataError(
            f"the number {digits[:40]} is too large; write null, or leave the field out"
        )
    return value


def _require_unicode(value: object, place: str) -> None:
    """Raise `DataError` for half a surrogate pair in a key or text.

    It could not be written to any result.
    """
    if isinstance(value, str) and _printable(value) != value:
        position = next(at for at, letter in enumerate(value) if "\ud800" <= letter <= "\udfff")
        raise DataError(
            f"half of a surrogate pair at character {position}; save the file as UTF-8",
            field=place or None,
        )
    if isinstance(value, dict):
        for key, entry in value.items():
            inner = f"{place}.{_printable(key)}" if place else _printable(key)
            _require_unicode(key, inner)
            _require_unicode(entry, inner)
    elif isinstance(value, list):
        for position, entry in enumerate(value):
            _require_unicode(entry, f"{place}.{position}" if place else str(position))


def _printable(key: str) -> str:
    """Return a key for a message, with half surrogates as escapes."""
    return key.encode("utf-8", "backslashreplace").decode("utf-8")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite
)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""An escape that is half of a pair; two of them are a whole letter."""


@dataclass(frozen=True, slots=True)
class Index:
    """Byte offsets of the records of a file."""

    starts: np.ndarray
    ends: np.ndarray
    damage: str | None
    """Error from the last record on, when the array as a whole is broken."""


def _index(file: BinaryIO, path: Path) -> Index:
    text, start = _start(file.read(_HEAD), path)
    scan: _ArrayScan | _LineScan = (
        _ArrayScan(start) if text.lstrip().startswith(b"[") else _LineScan(start)
    )
    starts, ends, damage = spans(file, scan, start)
    if (
        isinstance(scan, _LineScan) or len(starts) == 1
    ):  # a blank between two commas of an array is a bad record
        starts, ends = without_blank(file, starts, ends)
    return Index(starts, ends, damage)


class Scan(Protocol):
    """Finds the borders between records in a stream of bytes."""

    def feed(self, codes: np.ndarray, offset: int) -> None:
        """Take the next bytes, which begin at an offset of the file."""
        ...

    def finish(self, size: int) -> tuple[np.ndarray, np.ndarray, str | None]:
        """Return where records begin and end, and an error from the last one on."""
        ...


def spans(file: BinaryIO, scan: Scan, start: int) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Pass a file through a scan, from an offset in its first chunk on."""
    file.seek(0)
    offset = 0
    while chunk := file.read(_CHUNK):
        codes = np.frombuffer(chunk, np.uint8)
        scan.feed(codes[start:] if offset == 0 else codes, offset + (start if offset == 0 else 0))
        offset += len(chunk)
    return scan.finish(offset)


def _start(head: bytes, path: Path) -> tuple[bytes, int]:
    """Return the first bytes without a byte order mark, and their offset.

    Raises `DataError` for unsupported file formats.
    """
    text, start = decodable(head, path, expected=EXPECTED)
    _refuse_other_formats(text, path)
    return text, start


def decodable(head: bytes, path: Path, *, expected: str) -> tuple[bytes, int]:
    """Return the first bytes without a byte order mark, and their offset.

    Raises:
        DataError: there is nothing, or no text of UTF-8.
    """
    if not head.strip():
        raise DataError(f"the file is empty; {expected}", file=path)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("the file is UTF-16; save it as UTF-8", file=path)
    text = head.removeprefix(_BOM)
    for magic, what in _MAGIC.items():
        if text.startswith(magic):
            table = _TO_JSON if what.startswith(("a Parquet", "an Excel")) else ""
            raise DataError(f"looks like {what}{table}; {expected}", file=path)
    if text.startswith(b"PK\x03\x04"):
        excel = (
            path.suffix.lower().startswith(".xls")
            or b"xl/" in text
            or b"[Content_Types].xml" in text
        )
        what = f"an Excel file{_TO_JSON}" if excel else "a zip archive: unpack it"
        raise DataError(f"looks like {what}; {expected}", file=path)
    return text, len(head) - len(text)


_MAGIC: dict[bytes, str] = {
    b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file",
    b"\xd0\xcf\x11\xe0": "an Excel file (.xls)",
    b"\x1f\x8b": "packed with gzip", b"BZh": "packed with bzip2", b"\xfd7zXZ": "packed with xz",
    b"\x28\xb5\x2f\xfd": "packed with zstd", b"\x89HDF": "an HDF5 file",
    b"SQLite format 3": "an SQLite file",
    b"\x80\x02": "a pickle", b"\x80\x03": "a pickle", b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\x93NUMPY": "a NumPy array", b"%PDF": "a PDF", b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
}  # fmt: skip
"""First bytes of other files that users name as annotation files."""

_TO_JSON = "; docs/data-format.md shows how to turn a table into records"


def _refuse_other_formats(head: bytes, path: Path) -> None:
    """Raise `DataError` once for a file that holds no records at all, instead of once per line.

    A file in which a record is visible is never refused here: one damaged line is one bad record.
    """
    lines = [line.strip() for line in head.splitlines() if line.strip()]
    if not lines or lines[0].startswith(b"["):
        return
    whole_line = len(head) < _HEAD or b"\n" in head.strip()
    if lines[0].startswith(b"{"):
        if whole_line and len(lines) > 1 and not lines[1].startswith(b"{") and _is_cut(lines[0]):
            known = _known_object(head, path)
            raise DataError(
                f"the file is one JSON object over several lines{known}; {EXPECTED}", file=path
            )
        return
    if any(line.startswith(b"{") for line in lines):
        return
    if lines[0].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataError(
            f"looks like a web page or XML, perhaps a failed download; {EXPECTED}", file=path
        )
    if lines[0].startswith(b"version https://git-lfs"):
        raise DataError(
            "is a Git LFS pointer: fetch the file itself with 'git lfs pull'", file=path
        )
    name = _table_name(lines[0], path, whole_line=whole_line)
    if name is not None:
        raise DataError(f"looks like {name}{_TO_JSON}; {EXPECTED}", file=path)
    if lines[0] == b"---" or path.suffix.lower() in (".yaml", ".yml"):
        raise DataError(f"looks like YAML; {EXPECTED}", file=path)


def _is_cut(line: bytes) -> bool:
    """Return whether a line of JSON is valid so far and continues in the next one."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.decode("utf-8", "replace")) - 1
    except ValueError:
        return False
    return False


def _known_object(head: bytes, path: Path) -> str:
    """Return the probable kind of a single JSON object, for the message."""
    if path.name == "dataset_info.json" or (b'"file_name"' in head and b'"formatting"' in head):
        return ", LLaMA-Factory's list of data sets: name the annotation files that it lists"
    if (b'"images"' in head and b'"annotations"' in head) or b'"categories"' in head:
        return " in COCO's format, whose annotations are no conversations"
    return ": if it holds the list of records under a key, save that list alone"


def _table_name(line: bytes, path: Path, *, whole_line: bool) -> str | None:
    """Return the kind of table with this first line, or None."""
    suffix = path.suffix.lower()
    if suffix == ".tsv" or (whole_line and b"\t" in line):
        return "a table with tabs (TSV)"
    if suffix == ".csv" or (whole_line and (b"," in line or b";" in line)):
        return "CSV"
    return None


def without_blank(
    file: BinaryIO, starts: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Drop the spans of empty lines and of an empty array, which are no records."""
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
    """Spans between the commas of the outermost array.

    Strings, escapes and nesting may cross the chunks.
    """

    def __init__(self, start: int) -> None:
        self._bounds: list[np.ndarray] = []
        """Offsets of the opening bracket, of each comma on its level, and of the closing
        bracket."""
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
        bound = (
            (is_comma & (after == 1)) | (is_opening & (before == 0)) | (is_closing & (after == 0))
        )
        closing = np.flatnonzero(is_closing & (after == 0))
        if len(closing):
            bound[closing[0] + 1 :] = False
            self._closed = True
            end = int(outside[closing[0]])
            if codes[end] != ord("]"):
                self._damage = (
                    "a '}' without its '{': the array is broken here, and later records cannot "
                    "be found"
                )
            self._note_rest(codes[end + 1 :])
        self._bounds.append(outside[bound] + offset)

    def _structure(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of brackets and commas outside strings, and their kinds."""
        kinds = _KIND[codes]
        places = np.flatnonzero(kinds)
        kinds = kinds[places]
        is_quote = kinds == _QUOTE
        is_quote[
            np.isin(
                places, self._escaped(places[kinds == _BACKSLASH], len(codes)), assume_unique=True
            )
        ] = False
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
            self._damage = (
                "there is text after the array's closing ']': the array is broken at or before "
                "this record"
            )

    def finish(self, size: int) -> tuple[np.ndarray, np.ndarray, str | None]:
        bounds = np.concatenate(self._bounds)
        if not self._closed:
            self._damage = (
                "the file ends inside the array (no closing ']'): it was cut off, or a quote or "
                "bracket is missing here, and later records cannot be found"
            )
            bounds = np.append(bounds, size)
        return bounds[:-1] + 1, bounds[1:], self._damage
