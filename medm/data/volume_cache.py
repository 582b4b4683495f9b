"""Prepared images and volumes on disk: read and resampled once, then mapped into memory.

An entry is named by what is in the file and how it is prepared, so that moved, copied and changed files are all right.
It holds the prepared numbers and their shape, nothing of a header. Any number of processes may share a folder: entries
are written aside and renamed, and none waits for another. A half-written or damaged entry is noticed and made again.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import struct
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from medm.errors import MediaError
from medm.imaging import Preprocess, fingerprint, load_pixels

logger = logging.getLogger(__name__)

_FOOTER = struct.Struct("<8sI")
_MARK = b"medm-v1\0"
_ABANDONED = 3600.0
"""Seconds after which a file that was written aside is taken to be left over from a killed process."""
_FRESH = 60.0
"""Seconds within which an entry is not marked as used again."""
_DETACHED = (".mhd", ".nhdr")


class MediaCache:
    """Prepared arrays by content.

    When the folder is full, entries that nobody used since this object was made (those of other data or of an older
    description) give way; if there are none, further arrays are simply not stored. Entries are not exchanged within a
    run, because an epoch visits everything once, and would find nothing of what it pushed out.

    Args:
        folder: where entries lie; made when the first one is written.
        max_bytes: most bytes of entries.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._started = time.time()
        self._verified: set[str] = set()
        self._used: int | None = None
        self._full = self._unwritable = False

    def load(self, path: Path, preprocess: Preprocess) -> np.ndarray:
        """The same numbers as `load_pixels(path, preprocess)`, (C, *spatial) float32.

        From the cache they come as a private map: writing to the array changes neither the entry nor another process.

        Raises:
            MediaError: as `load_pixels`.
        """
        path = Path(path)
        before = _identity(path)
        content = None if before is None else self._content(path, before)
        if content is None:
            return load_pixels(path, preprocess)
        key = f"{content}-{fingerprint(preprocess)}"
        entry = self.folder / "arrays" / key[:2] / f"{key}.npy"
        stored = self._open(entry)
        if stored is not None:
            return stored
        pixels = load_pixels(path, preprocess)
        if _identity(path) == before:
            self._store(entry, pixels)
        return pixels

    def size(self) -> tuple[int, int]:
        """How many entries there are, and their bytes."""
        sizes = [stat.st_size for _, stat in self._entries()]
        return len(sizes), sum(sizes)

    def _content(self, path: Path, identity: str) -> str | None:
        """The hash of what the file holds, looked up by name, size and time so that it is read for it only once.

        None where it is not known and could not be noted.
        """
        index = self.folder / "index" / identity[:2] / identity
        try:
            known = index.read_bytes()
        except OSError:
            known = b""
        if len(known) == 64:
            return known.decode("ascii", errors="replace")
        if self._unwritable:
            return None
        content = _hash(path)
        self._write(index, [content.encode("ascii")])
        return content

    def _open(self, entry: Path) -> np.ndarray | None:
        """The stored array, or None where there is none or it is damaged."""
        try:
            with entry.open("rb") as stream:
                array = self._map(stream, entry.name)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("a damaged cache entry is made again (%s)", error)
            with suppress(OSError):
                entry.unlink()
            return None
        with suppress(OSError):
            if time.time() - entry.stat().st_mtime > _FRESH:
                os.utime(entry)  # in use: a full cache lets go of others first
        return array

    def _map(self, stream: BinaryIO, name: str) -> np.ndarray:
        """Raises `ValueError` where the entry is not whole; its checksum is verified on first use in each process."""
        if npy.read_magic(stream) != (1, 0):
            raise ValueError("it is of another version")
        shape, _, dtype = npy.read_array_header_1_0(stream)
        offset, size = stream.tell(), math.prod(shape) * dtype.itemsize
        if dtype != np.float32 or os.fstat(stream.fileno()).st_size != offset + size + _FOOTER.size:
            raise ValueError("it is not of the declared size")
        array = np.memmap(stream, dtype=dtype, mode="c", offset=offset, shape=shape)
        if name not in self._verified:
            stream.seek(offset + size)
            mark, checksum = _FOOTER.unpack(stream.read(_FOOTER.size))
            if mark != _MARK or zlib.crc32(array.data) != checksum:
                raise ValueError("its checksum does not fit")
            self._verified.add(name)
        return np.asarray(array)

    def _store(self, entry: Path, pixels: np.ndarray) -> None:
        pixels = np.ascontiguousarray(pixels, dtype=np.float32)
        if self._full or self._unwritable or not self._make_room(pixels.nbytes):
            return
        footer = _FOOTER.pack(_MARK, zlib.crc32(pixels.data))
        if self._write(entry, [_header(pixels), pixels.data, footer]):
            self._used = (self._used or 0) + pixels.nbytes
            self._verified.add(entry.name)

    def _write(self, target: Path, parts: list[bytes | memoryview]) -> bool:
        """Aside, then renamed. A disk that is full or read-only is said once and does not stop the run."""
        aside = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("xb") as stream:
                for part in parts:
                    stream.write(part)
            aside.replace(target)
        except OSError as error:
            with suppress(OSError):
                aside.unlink()
            if not self._unwritable:
                logger.warning("%s: nothing more is cached in this run (%s)", self.folder, error.strerror)
            self._unwritable = True
            return False
        return True

    def _make_room(self, needed: int) -> bool:
        """Whether another entry fits, once what this run does not use has gone."""
        if self._used is None:
            self._used = self.size()[1]
        if self._used + needed <= self.max_bytes:
            return True
        # Other processes write too: look again before anything is removed.
        entries = sorted(self._entries(), key=lambda pair: pair[1].st_mtime)
        self._used = sum(stat.st_size for _, stat in entries)
        for entry, stat in entries:
            if self._used + needed <= self.max_bytes or stat.st_mtime >= self._started - _FRESH:
                break
            with suppress(OSError):
                entry.unlink()
            self._used -= stat.st_size
        fits = self._used + needed <= self.max_bytes
        if not fits:
            logger.warning(
                "%s: full with %.1f GB of the %.1f GB that are allowed; further files are prepared anew each time",
                self.folder, self._used / 1e9, self.max_bytes / 1e9,
            )  # fmt: skip
            self._full = True
        return fits

    def _entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.glob("arrays/*/*"):
            with suppress(OSError):
                stat = path.stat()
                if not path.name.startswith("."):
                    yield path, stat
                elif time.time() - stat.st_mtime > _ABANDONED:
                    path.unlink()


def _header(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    npy.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": pixels.shape})
    return buffer.getvalue()


def _parts(path: Path) -> tuple[list[Path], str]:
    """The files that a path stands for (all of a folder), and the series that it names."""
    series = ""
    if "#" in path.name and not path.exists():
        name, _, series = path.name.rpartition("#")
        path = path.with_name(name)
    if not path.is_dir():
        return [path], series
    return sorted(Path(place) / file for place, _, files in os.walk(path) for file in files), series


def _identity(path: Path) -> str | None:
    """Name, size and time of everything that is read, hashed; None where reading may depend on more than that."""
    files, series = _parts(path)
    if not files or path.name.lower().endswith(_DETACHED):
        return None
    digest = hashlib.sha256(f"{path.resolve()}\0{series}".encode())
    for file in files:
        try:
            stat = file.stat()
        except OSError:
            return None  # the reader says what is wrong
        digest.update(f"\0{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _hash(path: Path) -> str:
    files, series = _parts(path)
    digest = hashlib.sha256(series.encode())
    for file in files:
        try:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise MediaError(f"{file}: cannot be read ({error.strerror})") from None
        # Slices are put in order by their names, and a format is recognised by its suffix.
        digest.update(file.name.encode() if len(files) > 1 else "".join(file.suffixes).lower().encode())
    return digest.hexdigest()
