"""Prepared images and volumes on disk: read and resampled once, then mapped into memory.

The name of an entry is a hash of the content of the file and of its preprocessing, so that files
may be moved, copied and changed. It holds the prepared numbers, their shape and their placement in
the file's grid (sizes and geometry), nothing else of a header. Any number of processes may share a
folder: each reserves bytes in one ledger before it writes, and writes are atomic. A half-written or
damaged entry is detected and written again.

An entry is a .npy file (version 1.0) with the placement as JSON after the array, and a footer
with a checksum of both. Entries of earlier versions of medm have no placement: their pixels are
used, and they are replaced when the placement is asked for.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import struct
import time
import tokenize
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from medm.data.content import content_hash, identity
from medm.errors import MediaError
from medm.files import atomic_file, wait_for_lock
from medm.imaging import Preprocess, fingerprint, prepare
from medm.imaging.constant import looks_constant
from medm.imaging.placement import Placement, Prepared

logger = logging.getLogger(__name__)

_FOOTER = struct.Struct("<8sI")
_MARK = b"medm-v2\0"
_MARK_WITHOUT_PLACEMENT = b"medm-v1\0"
_MAX_PLACEMENT = 2**16
"""Maximum bytes of the placement in an entry; it takes less than a thousand."""
_ABANDONED = 3600.0
"""Seconds after which a temporary file is taken to be left over from a killed process."""
_CONTENT = re.compile(rb"[0-9a-f]{64}")
_FRESH = 60.0
"""Seconds within which an entry is not marked as used again."""


class _FullError(Exception):
    """The folder has no room for an entry."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A stored array and the JSON text of its placement, empty in entries of earlier versions."""

    pixels: np.ndarray
    placement: bytes


class MediaCache:
    """Prepared arrays by content.

    When the folder is full, entries that nobody used since this object was made (those of other
    data or of an older description) are evicted; without such entries, further arrays are not
    stored. No entry of the present run is evicted: an epoch visits every file once, and each
    eviction would cost a later hit.

    Args:
        folder: of the entries; created with the first entry.
        max_bytes: maximum bytes of all files in it, by any writer.
        device: of the preparation of volumes that are not stored.
        evict: False keeps every entry, also of earlier runs, and stores no more when it is full.
    """

    def __init__(
        self, folder: str | Path, max_bytes: int, *, device: str = "cpu", evict: bool = True
    ) -> None:
        self.folder, self.max_bytes, self.device = Path(folder), max_bytes, device
        self.evict = evict
        self._started = time.time()
        self._verified: set[str] = set()
        self._blank: set[str] = set()
        """Verified entries that look constant."""
        self._blank_files: set[Path] = set()
        """Files of such entries that this process prepared itself."""
        self._full = self._unwritable = self._reported_old = False

    def load(self, path: Path, preprocess: Preprocess) -> np.ndarray:
        """Return the same numbers as `load_pixels(path, preprocess)`, (C, *spatial) float32.

        From the cache they come as a private map: writing to the array changes neither the entry
        nor another process.

        Raises:
            MediaError: as `load_pixels`.
        """
        return self._find(path, preprocess, with_placement=False).pixels

    def prepare(self, path: Path, preprocess: Preprocess) -> Prepared:
        """Return the same pixels and placement as `medm.imaging.prepare(path, preprocess)`.

        An entry that an earlier version of medm wrote without a placement is replaced.

        Raises:
            MediaError: as `medm.imaging.prepare`.
        """
        found = self._find(path, preprocess, with_placement=True)
        if isinstance(found, Prepared):
            return found
        return Prepared(found.pixels, Placement.from_dict(json.loads(found.placement)))

    def _find(
        self, path: Path, preprocess: Preprocess, *, with_placement: bool
    ) -> Prepared | _Entry:
        """Return the entry of a file.

        A file that is not in the cache is prepared, and stored if possible.
        """
        path = Path(path)
        try:
            before = identity(path)
        except MediaError:
            return self._prepare(path, preprocess)  # the reader says what is wrong, if anything is
        content = self._content(path, before)
        if content is None:
            return self._prepare(path, preprocess)
        entry = self._entry(content, preprocess)
        stored = self._open(entry)
        if stored is not None and with_placement and not stored.placement:
            self._report_old()
            stored = None
        if stored is not None:
            if entry.name in self._blank and path not in self._blank_files:
                # Once in each process, so that the file is refused, or its warning given, as
                # without a cache.
                self._prepare(path, preprocess)
                self._blank_files.add(path)
            return stored
        prepared = self._prepare(path, preprocess)
        with suppress(MediaError):  # a file that went meanwhile
            if identity(path) == before:
                self._store(entry, prepared)
        if entry.name in self._blank:
            self._blank_files.add(path)
        return prepared

    def entry_file(self, path: Path, preprocess: Preprocess) -> Path | None:
        """Return the entry of a file that was prepared before; None if it is not stored.

        Raises:
            MediaError: the file is missing.
        """
        content = self._content(path, identity(path))
        entry = None if content is None else self._entry(content, preprocess)
        return entry if entry is not None and entry.exists() else None

    def _entry(self, content: str, preprocess: Preprocess) -> Path:
        key = f"{content}-{fingerprint(preprocess)}"
        return self.folder / "arrays" / key[:2] / f"{key}.npy"

    def _prepare(self, path: Path, preprocess: Preprocess) -> Prepared:
        return prepare(path, preprocess, device=self.device)

    def _report_old(self) -> None:
        """Log once that entries of an earlier version are replaced."""
        if not self._reported_old:
            logger.info(
                "%s: holds entries of an earlier medm without the placement of their pixels, "
                "which masks need; each is prepared and stored again when it is read",
                self.folder,
            )
        self._reported_old = True

    def size(self) -> tuple[int, int]:
        """Return the number of entries, and the bytes of entries and index together."""
        files = list(self._files())
        return sum(path.suffix == ".npy" for path, _ in files), sum(
            stat.st_size for _, stat in files
        )

    def _content(self, path: Path, state: str) -> str | None:
        """Return the content hash of a file.

        It is looked up by name, size and time, so that hashing reads the file only once. None if
        it is unknown and cannot be stored.
        """
        index = self.folder / "index" / state[:2] / state
        try:
            known = index.read_bytes()
        except OSError:
            known = b""
        if _CONTENT.fullmatch(
            known
        ):  # anything else, such as the zeros after a power failure, is written anew
            _mark_used(index)
            return known.decode("ascii")
        if self._full or self._unwritable:
            return None
        content = content_hash(path)
        self._write(index, [content.encode("ascii")])
        return content

    def _open(self, entry: Path) -> _Entry | None:
        """Return the stored array and placement; None if the entry is missing or damaged."""
        try:
            with entry.open("rb") as stream:
                stored = self._map(stream, entry.name)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("a damaged cache entry is written again (%s)", error)
            with suppress(OSError):
                entry.unlink()
            return None
        _mark_used(entry)
        return stored

    def _map(self, stream: BinaryIO, name: str) -> _Entry:
        """Map an entry into memory. Raises `ValueError` if it is incomplete.

        Its checksum is verified on first use in each process.
        """
        if npy.read_magic(stream) != (1, 0):
            raise ValueError("it is of another version")
        try:
            shape, _, dtype = npy.read_array_header_1_0(stream)
        except tokenize.TokenError:  # numpy's, for a bracket that is not closed
            raise ValueError("its header is damaged") from None
        offset, size = stream.tell(), math.prod(shape) * dtype.itemsize
        behind = os.fstat(stream.fileno()).st_size - offset - size - _FOOTER.size
        if dtype != np.float32 or not 0 <= behind <= _MAX_PLACEMENT:
            raise ValueError("it is not of the declared size")
        array = np.memmap(stream, dtype=dtype, mode="c", offset=offset, shape=shape)
        stream.seek(offset + size)
        placement, footer = stream.read(behind), stream.read(_FOOTER.size)
        if name not in self._verified:
            mark, checksum = _FOOTER.unpack(footer)
            if mark != (_MARK if placement else _MARK_WITHOUT_PLACEMENT) or checksum != zlib.crc32(
                placement, zlib.crc32(array.data)
            ):
                raise ValueError("its checksum does not fit")
            self._verify(name, array)
        return _Entry(np.asarray(array), placement)

    def _verify(self, name: str, array: np.ndarray) -> None:
        self._verified.add(name)
        if looks_constant(array):
            self._blank.add(name)

    def _store(self, entry: Path, prepared: Prepared) -> None:
        pixels = np.ascontiguousarray(prepared.pixels, dtype=np.float32)
        if self._full or self._unwritable:
            return
        placement = json.dumps(prepared.placement.to_dict()).encode("ascii")
        footer = _FOOTER.pack(_MARK, zlib.crc32(placement, zlib.crc32(pixels.data)))
        if self._write(entry, [_header(pixels), pixels.data, placement, footer]):
            self._verify(entry.name, pixels)

    def _write(self, target: Path, parts: list[bytes | memoryview]) -> bool:
        """Write a file atomically. Return whether it was written.

        A disk that is full or read-only gives one warning and does not stop the run.
        """
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(target) as temporary:
                self._reserve(temporary, sum(memoryview(part).nbytes for part in parts))
                with temporary.open("r+b") as stream:
                    for part in parts:
                        stream.write(part)
        except _FullError:
            return False
        except OSError as error:
            if not self._unwritable:
                logger.warning(
                    "%s: nothing more is cached in this run (%s)", self.folder, error.strerror
                )
            self._unwritable = True
            return False
        return True

    def _reserve(self, temporary: Path, size: int) -> None:
        """Make a file of its final size, if the folder has room for it or can make some.

        The ledger holds the bytes in use. It may exceed the true size (an entry written twice, a
        failed write, removed files) but is never below it, and is recounted before an entry is
        refused.

        Raises:
            _FullError: there is no room and none can be made.
        """
        with (self.folder / "ledger").open("a+b") as ledger:
            wait_for_lock(ledger)
            ledger.seek(0)
            text = ledger.read(32)
            used = int(text) if text.isdigit() else self.size()[1]
            if used + size > self.max_bytes:
                used = self._evict(size) if self.evict else self.size()[1]
            fits = used + size <= self.max_bytes
            if fits:
                with temporary.open("xb") as stream:
                    stream.truncate(size)  # counts from now on, also for other processes
                used += size
            ledger.truncate(0)
            ledger.write(b"%d" % used)
        if not fits and not self._full:
            logger.warning(
                "%s: full with %.1f GB of the %.1f GB that are allowed; further files are "
                "prepared each time",
                self.folder,
                used / 1e9,
                self.max_bytes / 1e9,
            )
            self._full = True
        if not fits:
            raise _FullError

    def _evict(self, needed: int) -> int:
        """Evict the oldest unused files until there is room. Return the bytes still in use.

        Unused are those that nobody read since this object was made.
        """
        files = sorted(self._files(), key=lambda pair: pair[1].st_mtime)
        used = sum(stat.st_size for _, stat in files)
        for path, stat in files:
            if used + needed <= self.max_bytes or stat.st_mtime >= self._started - _FRESH:
                break
            if not path.name.startswith("."):  # a temporary file belongs to its writer
                with suppress(OSError):
                    path.unlink()
                used -= stat.st_size
        return used

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Yield entries, index and temporary files; remove those of killed processes."""
        for pattern in ("arrays/*/*", "index/*/*"):
            for path in self.folder.glob(pattern):
                with suppress(OSError):
                    stat = path.stat()
                    if path.name.startswith(".") and time.time() - stat.st_mtime > _ABANDONED:
                        path.unlink()
                    else:
                        yield path, stat


def _mark_used(file: Path) -> None:
    """Mark an entry as used: a full cache evicts others first."""
    with suppress(OSError):
        if time.time() - file.stat().st_mtime > _FRESH:
            os.utime(file)


def _header(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    npy.write_array_header_1_0(
        buffer, {"descr": "<f4", "fortran_order": False, "shape": pixels.shape}
    )
    return buffer.getvalue()
