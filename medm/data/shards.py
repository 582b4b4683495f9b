"""WebDataset tar shards as annotation files: every sample addressed by shard and byte offset.

A manifest (`NAME.shards.json`) lists the shards with counts and checksums; an index beside it holds
where each sample begins, 12 bytes a sample. So shards are records like any others: a position is an
index, and sampler, resume and workers need to know nothing of tar files. A single `.tar` file is
indexed when it is opened. `medm.data.shard_writing` writes both.

A sample is the members in a row whose names are equal up to the first dot of the file name:
`000123.jpg` with `000123.txt` (caption), `000123.cls` (label) and `000123.json` (fields of the
record).
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import tokenize
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from pydantic import Field

from medm.config import Options, validate
from medm.data.record_files import open_regular, parse_json
from medm.errors import DataError, MediaError, RecipeError
from medm.imaging import resolve_inside
from medm.limits import MAX_RECORD_BYTES
from medm.types import JsonObject

MAX_SAMPLE_BYTES = 512 * 1024 * 1024
"""A sample of more bytes is bad: images are kilobytes or megabytes."""
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "tif", "tiff", "bmp", "dcm", "npy")
"""Names of image members behind the first dot."""
SAMPLE = np.dtype([("start", "<u8"), ("size", "<u4")])
"""Entry of the index: where the first header of a sample begins in its shard, and the bytes up to
the next sample."""

_BLOCK = tarfile.BLOCKSIZE
_BUFFER = 64 * 1024
"""Bytes that are read at a time: the whole of most images."""
_MAX_OPEN = 256
"""Shards that a process holds open."""


class ShardEntry(Options):
    """A shard of a manifest."""

    file: str
    """Path relative to the root: the folder of the manifest, or `root` of the source."""
    samples: int = Field(ge=0)
    size: int = Field(ge=0)
    """Bytes of the file."""
    sha256: str
    damage: str | None = None
    """Reason why nothing behind the last sample could be found; it counts as one bad record."""

    @property
    def records(self) -> int:
        """Samples, and one for the damage."""
        return self.samples + (self.damage is not None)


class Manifest(Options):
    """A `NAME.shards.json` file."""

    version: int = Field(default=1, ge=1, le=1)
    index: str
    """Name of the index, in the same folder."""
    index_sha256: str
    shards: list[ShardEntry] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Places of the samples of one shard."""

    samples: np.ndarray
    """(N,) of `SAMPLE`."""
    damage: str | None = None


def index_shard(path: Path) -> ShardIndex:
    """Find the samples of a shard in one pass over its headers.

    Damage ends the list of samples, and is returned.

    Raises:
        DataError: there is no such file, or it is no tar file at all.
    """
    samples: list[tuple[int, int]] = []
    damage: str | None = None
    key, start, end = "", 0, 0
    with open_regular(path) as file:
        if (head := file.read(4))[:2] == b"\x1f\x8b" or head[:3] in (b"BZh", b"\xfd7z"):
            raise DataError(
                "is a packed tar file, in which no offset can be read; unpack it to a plain .tar",
                file=path,
            )
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    cast(Any, tar).members.clear()  # it collects every member otherwise
                    if not _counts(member):
                        continue
                    if (found := _key(member.name)) != key and end:
                        samples.append((start, member.offset - start))
                    if found != key:
                        key, start = found, member.offset
                    end = _end(member)
                tail = tar.offset
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            if not samples and not end:
                raise DataError(
                    f"not a tar file ({error}); expected an uncompressed WebDataset shard",
                    file=path,
                ) from None
            damage, tail = f"damaged behind byte {end:,} ({error}); samples there are lost", end
        if damage is None:
            file.seek(tail)
            if file.read(_BLOCK) != bytes(_BLOCK):
                damage = (
                    f"no end mark at byte {tail:,}: the shard was cut off or is damaged there, and "
                    "further samples are lost"
                )
        if end and damage is not None and end > file.seek(0, os.SEEK_END):
            key = ""  # the last sample is cut
        elif end:
            samples.append((start, end - start))
    return ShardIndex(np.array(samples, SAMPLE), damage)


class ShardFile:
    """Sequence of the records of tar shards, read one at a time.

    A record has `id` (the key), `image` (the name of its image member), `caption` (`.txt`), `label`
    (`.cls`), and the fields of its `.json` member, which come first.

    Args:
        path: a manifest, or one shard.
        root: folder of the shards; that of the manifest without it.

    Raises:
        DataError: at opening, when manifest or index are missing or do not belong together; at
            access, when the shard or the sample is missing or damaged.
    """

    def __init__(self, path: str | Path, root: str | Path | None = None) -> None:
        self.path = Path(path)
        self.root = Path(root) if root is not None else self.path.parent
        if self.path.name.lower().endswith(".tar"):
            found = index_shard(self.path)
            size = self.path.stat().st_size
            self.root = self.path.parent
            self.shards = [
                ShardEntry(
                    file=self.path.name,
                    samples=len(found.samples),
                    size=size,
                    sha256="",
                    damage=found.damage,
                )
            ]
            self._samples = found.samples
        else:
            manifest = read_manifest(self.path)
            self.shards = manifest.shards
            self._samples = _read_index(self.path, manifest)
        self.groups = tuple(shard.records for shard in self.shards)
        """Records of each shard."""
        self._ends = list(accumulate(self.groups))
        self._first = [0, *accumulate(shard.samples for shard in self.shards)]
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._last: tuple[int, list[_Member]] | None = None
        if len(self) == 0:
            raise DataError("the shards hold no samples", file=self.path)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_last": None}

    def __iter__(self) -> Iterator[JsonObject]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> JsonObject:
        """Return record `index`. Raises `DataError`, whose reason does not name the shard."""
        members = self._members(index)
        record: JsonObject = {}
        images = [member for member in members if member.suffix in IMAGE_SUFFIXES]
        by_suffix = {member.suffix: member for member in members}
        if len(by_suffix) < len(members):
            names = ", ".join(member.name for member in members)
            raise DataError(f"expected files of different kinds in a sample, found {names}")
        if "json" in by_suffix:
            fields = parse_json(self._bytes(by_suffix["json"]))
            if not isinstance(fields, dict):
                raise DataError(
                    f"expected an object in the .json member, found {type(fields).__name__}"
                )
            record = dict(fields)
        if len(images) > 1:
            names = ", ".join(member.name for member in images)
            raise DataError(f"expected one image in a sample, found {names}", field="image")
        record.pop("image", None)
        if images:
            record["image"] = images[0].name
        if "txt" in by_suffix and "caption" not in record and "captions" not in record:
            record["caption"] = self._text(by_suffix["txt"], "caption")
        if "cls" in by_suffix and "label" not in record:
            label = self._text(by_suffix["cls"], "label").strip()
            record["label"] = int(label) if label.isdecimal() else label
        record.setdefault("id", _key(members[0].name))
        return record

    def open_media(self, index: int, name: str) -> BinaryIO:
        """Return a stream of a member of record `index`. Raises `DataError`."""
        member = next((one for one in self._members(index) if one.name == name), None)
        if member is None:
            raise MediaError(f"{name}: no such member in the sample")
        return member.stream()

    def place(self, index: int) -> str:
        """Return shard, sample and offset of record `index`, for messages."""
        shard, number = self._locate(index)
        entry = self.shards[shard]
        if number >= entry.samples:
            return entry.file
        start = int(self._samples[self._first[shard] + number]["start"])
        name = ""
        if self._last is not None and self._last[0] == index:
            name = f" {_key(self._last[1][0].name)!r}"
        return f"{entry.file}, sample{name} at byte {start}"

    def verify(self) -> Iterator[DataError]:
        """Yield an error for each shard whose content is not that of the manifest."""
        for entry in self.shards:
            try:
                with open_regular(resolve_inside(self.root, entry.file)) as file:
                    found = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
            except DataError as error:
                yield DataError(f"{entry.file}: {error.reason}", file=self.path)
            except OSError as error:
                yield DataError(
                    f"{entry.file}: cannot be read ({error.strerror or error})", file=self.path
                )
            else:
                if entry.sha256 and found != entry.sha256:
                    yield DataError(
                        f"{entry.file}: its sha256 is not that of the manifest: it changed or was "
                        "damaged on the way; copy it again, or write the manifest again",
                        file=self.path,
                    )

    def _locate(self, index: int) -> tuple[int, int]:
        """Return shard and position in it of record `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: record {index} of {len(self)}")
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _members(self, index: int) -> list[_Member]:
        """Return the members of a record; those of the last one are kept."""
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        shard, number = self._locate(index)
        entry = self.shards[shard]
        if number >= entry.samples:
            raise DataError(entry.damage or "the shard is damaged; its manifest does not say how")
        start, size = self._samples[self._first[shard] + number].tolist()
        if size > MAX_SAMPLE_BYTES:
            raise DataError(f"a sample of {size:,} bytes; at most {MAX_SAMPLE_BYTES:,} are read")
        try:
            members = _members_of(self._opened(shard), start, size)
        except OSError as error:  # the machine may be at fault, which the cause says
            raise DataError(f"the shard cannot be read ({error.strerror or error})") from error
        self._last = (index, members)
        return members

    def _opened(self, number: int) -> _OpenShard:
        """Return a shard, opened. The ones that were not used for longest are closed."""
        if number not in self._open:
            entry = self.shards[number]
            shard = _OpenShard(resolve_inside(self.root, entry.file))
            if shard.size != entry.size:
                raise DataError(
                    f"the shard has {shard.size:,} bytes, and the manifest says {entry.size:,}: it "
                    "was cut off or changed; copy it again, or write the manifest again"
                )
            self._open[number] = shard
            if len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def _bytes(self, member: _Member) -> bytes:
        if member.size > MAX_RECORD_BYTES:
            raise DataError(
                f"{member.name} has {member.size:,} bytes; at most {MAX_RECORD_BYTES:,} are read"
            )
        return member.stream().read()

    def _text(self, member: _Member, field: str) -> str:
        try:
            return self._bytes(member).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{member.name} is not valid UTF-8 at byte {error.start}", field=field
            ) from None


def read_manifest(path: Path) -> Manifest:
    """Read a `NAME.shards.json` file. Raises `DataError`."""
    with open_regular(path) as file:
        text = file.read()
    try:
        content = parse_json(text)
        if not isinstance(content, dict):
            raise DataError(f"expected an object, found {type(content).__name__}")
        return validate(Manifest, content, source=str(path))
    except RecipeError as error:
        raise DataError(f"no manifest of shards: {error}", file=path) from None
    except DataError as error:
        raise DataError(f"no manifest of shards: {error.reason}", file=path) from None


def check_shards(path: Path) -> None:
    """Check that a manifest or a shard exists. Raises `DataError`."""
    if path.name.lower().endswith(".tar"):
        open_regular(path).close()
    else:
        read_manifest(path)


def _read_index(path: Path, manifest: Manifest) -> np.ndarray:
    """Return the index of a manifest, memory-mapped. Raises `DataError`."""
    again = "write the manifest again with 'medm data shards'"
    name = Path(manifest.index).name
    if not name or "\0" in name:
        raise DataError(
            f"no name of an index, {manifest.index[:40]!a}, in the field index; {again}",
            file=path,
        )
    file = path.with_name(name)
    try:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != manifest.index_sha256:  # before numpy parses what anything may have written
            raise DataError(f"its index {file} belongs to another manifest; {again}", file=path)
        samples = np.load(file, mmap_mode="r", allow_pickle=False)
    except DataError:
        raise
    except (OSError, ValueError, tokenize.TokenError) as error:
        raise DataError(f"its index {file} cannot be read ({error}); {again}", file=path) from None
    expected = sum(shard.samples for shard in manifest.shards)
    if samples.dtype != SAMPLE or samples.shape != (expected,):
        raise DataError(f"its index {file} belongs to another manifest; {again}", file=path)
    return samples


def _key(name: str) -> str:
    """Return the part of a member's name that the members of a sample share."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0] or file}"


def _counts(member: tarfile.TarInfo) -> bool:
    """Return whether a member is a file of a sample; hidden ones are notes of a file system."""
    return member.isfile() and not member.name.rpartition("/")[2].startswith(".")


def _end(member: tarfile.TarInfo) -> int:
    """Return the offset behind a member and its padding."""
    return member.offset_data + -(-member.size // _BLOCK) * _BLOCK


class _OpenShard:
    """An open shard. Reads are at absolute offsets, so that forked workers may share it.

    Raises:
        MissingFileError, DataError: at opening.
    """

    def __init__(self, path: Path) -> None:
        with open_regular(path) as file:
            self.size = os.fstat(file.fileno()).st_size
            self.descriptor = os.dup(file.fileno())

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@dataclass(frozen=True, slots=True)
class _Member:
    """A file in a shard."""

    name: str
    shard: _OpenShard
    offset: int
    size: int

    @property
    def suffix(self) -> str:
        """Part of the name behind the first dot, in lower case."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()

    def stream(self) -> BinaryIO:
        """Return its content as a seekable stream, read when asked for."""
        return io.BufferedReader(_Span(self.shard, self.offset, self.size), _BUFFER)


def _members_of(shard: _OpenShard, start: int, size: int) -> list[_Member]:
    """Return the files of a sample. Raises `DataError` where the bytes are no headers."""
    members: list[_Member] = []
    try:
        with tarfile.open(fileobj=_Member("", shard, start, size).stream(), mode="r:") as tar:
            while (member := tar.next()) is not None:
                if _counts(member):
                    offset = start + member.offset_data
                    members.append(_Member(member.name, shard, offset, member.size))
            end = tar.offset
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(f"the sample is damaged: {error}") from None
    if end != size or not members:
        raise DataError(f"the sample is damaged: no header at byte {start + end:,} of the shard")
    return members


class _Span(io.RawIOBase):
    """A stretch of a shard as a file of its own."""

    def __init__(self, shard: _OpenShard, offset: int, size: int) -> None:
        self._shard, self._offset, self._size, self._place = shard, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}")
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        most = max(0, min(len(buffer), self._size - self._place))
        content = os.pread(self._shard.descriptor, most, self._offset + self._place)
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)
