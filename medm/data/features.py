"""Feature cache on disk: the output of a frozen encoder, computed once for each file.

A store belongs to one encoder (its weights, its config, its precision) and one preprocessing:
`name` says which. An item is found by the content of its file or folder, so it may move, and one
that changed is simply not found. Items are written in shards, atomically; several processes may
fill one store, and an interruption keeps the items of complete batches. The index of a shard holds
the key and the checksum of each item, and the placement of the pixels that the encoder saw. A
damaged shard is removed, and its items are computed again. Indices of earlier versions of medm hold
the keys alone, or no checksums.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
import tokenize
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from medm.data.content import content_hash, identity
from medm.errors import MediaError, MedmError
from medm.files import LockedError, atomic_file, atomic_write_text, lock
from medm.imaging.placement import Placement

logger = logging.getLogger(__name__)

_SLACK = 1.05
"""Required free space, as a multiple of the size of all items."""
_DAMAGE = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, tokenize.TokenError,
)  # fmt: skip
"""What reading a damaged shard or index raises; the last by numpy for the header of an array."""
_SHARD_BYTES, _SHARD_SECONDS = 2**28, 300.0
"""Size and age at which a shard is finished: a kill loses no more than that."""
_SETTLED, _ABANDONED = 60.0, 3600.0
"""Seconds after which an unlocked temporary file, and any other one, is left over from a kill."""


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """Items to be written to a store."""

    keys: Sequence[str]
    placements: Sequence[Placement]
    """Of the pixels that the encoder saw, one per key."""
    features: np.ndarray
    """(n, *shape)."""
    rows: Sequence[int] | None = None
    """Of each key the number of rows of `features`, its tiles; None: one, which stands alone."""


@dataclass(slots=True)
class FeatureStore:
    """Arrays of one shape and type by the content of the file that they come from.

    Memory-mapped: any number of workers read the same pages, and memory does not grow with the
    data.
    """

    folder: Path
    """A store; `open_store` creates it."""
    _rows: dict[str, tuple[np.ndarray, int | slice]] = field(default_factory=dict)
    _placements: dict[str, Placement] = field(default_factory=dict)
    _checksums: dict[str, int] = field(default_factory=dict)
    _shards: dict[str, list[str]] = field(default_factory=dict)
    """Keys by the name of an index."""
    _keys: dict[str, str] = field(default_factory=dict)

    def refresh(self) -> None:
        """Add the shards that were finished since the last call, and leave removed ones out.

        A shard that is cut, or whose index is damaged, is removed with a warning.
        """
        present = {index.name: index for index in sorted(self.folder.glob("*.json"))}
        for name in self._shards.keys() - present.keys():
            self._forget(name)
        for name in present.keys() - self._shards.keys():
            try:
                self._open_shard(present[name])
            except _DAMAGE as error:
                self._discard(name, str(error) or type(error).__name__)

    def _open_shard(self, index: Path) -> None:
        """Map one shard. Raises `ValueError` and others for anything but a whole one."""
        listed = json.loads(index.read_text(encoding="utf-8"))
        array = np.load(index.with_suffix(".npy"), mmap_mode="r")
        keys = listed if isinstance(listed, list) else listed["keys"]
        rows = _row_indices(len(keys), None if keys is listed else listed.get("rows"))
        last = rows[-1] if keys else 0
        if (last.stop if isinstance(last, slice) else last + 1) > len(array) and keys:
            raise ValueError(f"the index lists more items than the {len(array)} that are there")
        if keys is not listed:
            placements = list(map(Placement.from_dict, listed["placements"]))
            checksums = listed.get("checksums", [])
            if len(placements) != len(keys) or len(checksums) not in (0, len(keys)):
                raise ValueError("keys, placements and checksums differ in number")
            self._placements |= zip(keys, placements, strict=True)
            self._checksums |= zip(keys, checksums, strict=False)
        self._rows |= {key: (array, row) for key, row in zip(keys, rows, strict=True)}
        self._shards[index.name] = list(keys)

    def _forget(self, name: str) -> None:
        for key in self._shards.pop(name, []):
            for table in (self._rows, self._placements, self._checksums):
                table.pop(key, None)

    def _discard(self, name: str, reason: str) -> None:
        """Remove a damaged shard, so that its items are computed again."""
        self._forget(name)
        index = self.folder / name
        logger.warning("%s: a damaged shard of features is computed again (%s)", index, reason)
        for file in (index, index.with_suffix(".npy")):
            with suppress(OSError):  # another process was faster, or the folder is read-only
                file.unlink()

    def verify(self, keys: Iterable[str]) -> None:
        """Compare stored items with their checksums; a shard with a wrong one is removed.

        Items of earlier versions of medm have no checksum.
        """
        owners = {key: name for name, held in self._shards.items() for key in held}
        for key in keys:
            if key in self._rows and key in self._checksums:
                array, row = self._rows[key]
                if zlib.crc32(np.ascontiguousarray(array[row]).data) != self._checksums[key]:
                    self._discard(owners[key], "a checksum does not fit")

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def get(self, file: Path) -> np.ndarray | None:
        """Return the features of a file, mapped from disk; None if they are not stored.

        They are (*shape), and (T, *shape) of an image that is cut into T tiles.
        """
        found = self._rows.get(self.key(file))
        return None if found is None else found[0][found[1]]

    def placement(self, file: Path) -> Placement | None:
        """Return where the pixels that the encoder saw lie in a file.

        None if its features are not stored, or were stored by an earlier version of medm.
        """
        return self._placements.get(self.key(file))

    def key(self, file: Path) -> str:
        """Return the key of the content of a file, of a header and its data file, or of a folder.

        A folder of slices may name a series ("folder#3").

        Read again only when a name, size or time in it changed.

        Raises:
            MediaError: it is missing, or not a file that medm reads.
        """
        state = identity(file)
        if state not in self._keys:
            self._keys[state] = content_hash(file)
        return self._keys[state]

    def add(
        self, batches: Iterable[FeatureBatch], *, most: int, shape: tuple[int, ...], dtype: np.dtype
    ) -> None:
        """Write items in shards, and add them to the store.

        An error or a stop signal in `batches` keeps what was written before.

        Args:
            batches: the items.
            most: maximum number of rows.
            shape: of one item.
            dtype: of the items.

        Raises:
            MedmError: the disk has no room for them.
            OSError: they cannot be written; with the name of the shard.
            ValueError: there are more than `most` rows, or keys, placements and arrays differ in
                number.
        """
        needed = _SLACK * most * np.prod(shape, dtype=np.int64) * dtype.itemsize
        status = os.statvfs(self.folder)
        if status.f_bavail * status.f_frsize < needed:
            raise MedmError(
                f"{self.folder}: features of {most} files need {needed / 1e9:.2f} GB, and "
                f"{status.f_bavail * status.f_frsize / 1e9:.2f} GB are free; make room or set "
                "data.cache_features: null"
            )
        left = most
        remaining = iter(batches)
        while (written := self._add_shard(remaining, left, shape, dtype)) is not None:
            left -= written
        self.refresh()

    def _add_shard(
        self, batches: Iterator[FeatureBatch], most: int, shape: tuple[int, ...], dtype: np.dtype
    ) -> int | None:
        """Write the next batches as one shard. Return its rows; None if there are no batches."""
        first = next(batches, None)
        if first is None:
            return None
        name, shard = uuid.uuid4().hex, _Shard(shape, dtype, most)
        interrupted: BaseException | None = None
        with (
            atomic_file(self.folder / f"{name}.npy") as temporary,
            temporary.open("xb") as stream,
        ):
            with suppress(LockedError, OSError):  # some file systems cannot lock
                lock(stream)
            shard.write_header(stream)
            started = time.monotonic()
            try:
                for batch in itertools.chain([first], batches):
                    shard.append(stream, batch)
                    age = time.monotonic() - started
                    if stream.tell() >= _SHARD_BYTES or age >= _SHARD_SECONDS:
                        break
            except BaseException as error:
                if isinstance(error, OSError) or not shard.filled:
                    raise
                interrupted = error  # raised when the shard is finished
            shard.write_header(stream)
            stream.flush()
            os.fsync(stream.fileno())
        # The index comes last: a shard without one is not seen.
        atomic_write_text(self.folder / f"{name}.json", json.dumps(shard.index()))
        if interrupted is not None:
            self.refresh()
            raise interrupted
        return shard.filled


@dataclass(slots=True)
class _Shard:
    """One shard while it is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    most: int
    filled: int = 0
    """Rows so far."""
    keys: list[str] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)

    def write_header(self, stream: BinaryIO) -> None:
        """Write the header of the rows so far; NumPy leaves room for any number of rows."""
        stream.seek(0)
        described = {
            "descr": npy.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.filled, *self.shape),
        }
        npy.write_array_header_1_0(stream, described)
        stream.seek(0, os.SEEK_END)

    def append(self, stream: BinaryIO, batch: FeatureBatch) -> None:
        """Write one batch. Raises `ValueError` for numbers that do not fit."""
        count = len(batch.keys)
        rows = [1] * count if batch.rows is None else list(batch.rows)
        total = sum(rows)
        if (
            {count} != {len(rows), len(batch.placements)}
            or total != len(batch.features)
            or self.filled + total > self.most
        ):
            raise ValueError(
                f"expected {count} items in {total} rows, at most {self.most} rows in all, "
                f"found {len(batch.features)} arrays and {len(batch.placements)} placements"
            )
        features = np.ascontiguousarray(batch.features, dtype=self.dtype)
        if features.shape[1:] != self.shape:
            raise ValueError(f"expected items of shape {self.shape}, found {features.shape[1:]}")
        # A full disk is an error of this call, and not a signal as in a memory map.
        stream.write(features.data)
        ends = list(itertools.accumulate(rows, initial=0))
        parts = [features[start:end] for start, end in itertools.pairwise(ends)]
        self.checksums += [zlib.crc32(part.data) for part in parts]
        self.filled += total
        self.counts += [] if batch.rows is None else rows
        self.keys += batch.keys
        self.placements += batch.placements

    def index(self) -> dict[str, object]:
        """Return the index of the shard."""
        index: dict[str, object] = {
            "keys": self.keys,
            "placements": [placement.to_dict() for placement in self.placements],
            "checksums": self.checksums,
        }
        return index | ({"rows": self.counts} if self.counts else {})


def _row_indices(count: int, rows: Sequence[int] | None) -> Sequence[int | slice]:
    """Return the place of each item in a shard: a row, or as many rows as it has tiles."""
    if rows is None:
        return range(count)
    ends = list(itertools.accumulate(rows, initial=0))
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def open_store(root: Path, name: str) -> FeatureStore:
    """Open the feature store of one encoder and one preprocessing in a cache folder.

    The store knows every item that it holds.
    """
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    store = FeatureStore(folder)
    store.refresh()
    if old := len(store._rows.keys() - store._placements.keys()):
        logger.info(
            "%s: %d features of an earlier medm have no placement, which masks need; they are "
            "used as they are. Delete the folder to have them computed again",
            folder,
            old,
        )
    return store


def _sweep(folder: Path) -> None:
    """Remove what killed processes left: temporary files, and shards without an index."""
    for file in [*folder.glob(".*.tmp"), *folder.glob("*.npy")]:
        with suppress(OSError):
            age = time.time() - file.stat().st_mtime
            has_index = file.suffix == ".npy" and file.with_suffix(".json").exists()
            if not has_index and age > _SETTLED and (age > _ABANDONED or _is_unlocked(file)):
                file.unlink()


def _is_unlocked(file: Path) -> bool:
    """Return whether no process writes a file; False where the file system cannot tell."""
    with file.open("rb") as stream:
        try:
            lock(stream)
        except (LockedError, OSError):
            return False
        return True


def missing(store: FeatureStore, files: Iterable[Path]) -> tuple[list[tuple[str, Path]], list[str]]:
    """Return (key, file) of each content that a store lacks, and errors of unreadable files.

    What it holds is compared with its checksums: a damaged shard is removed, and so lacks.
    """
    known: dict[str, Path] = {}
    bad = []
    for file in files:
        try:
            key = store.key(file)
        except MediaError as error:
            bad.append(str(error))
            continue
        known.setdefault(key, file)
    store.verify(known)
    return [(key, file) for key, file in known.items() if key not in store], bad
