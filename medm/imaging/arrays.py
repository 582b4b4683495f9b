"""Reading of untrusted NumPy files: headers are checked before memory is allocated."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.lib import format as npy

from medm.errors import MediaError
from medm.imaging.damage import DECODE_ERRORS
from medm.imaging.payload import check_cost, check_ratio

_MAX_HEADER = 10_000
_MAX_PREFIX = 12 + _MAX_HEADER
"""Most bytes of an NPY file before its numbers."""
_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Compression methods that numpy.savez and numpy.savez_compressed write.

bzip2 and LZMA expand up to a million times, and Python's zipfile expands them in pieces of any
length.
"""
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_npy(
    stream: IO[bytes],
    name: str,
    *,
    max_items: int,
    max_bytes: int | None = None,
    exact: bool = True,
    length: int | None = None,
) -> np.ndarray:
    """Return one array of plain numbers from the stream of a .npy file or of an archive member.

    Args:
        stream: placed at the start of the array; may be unable to seek.
        name: the file, for messages.
        max_items: most numbers that are read.
        max_bytes: most bytes of them; None for no further limit.
        exact: whether the stream has to end with the array.
        length: bytes of the whole stream where they are known: another number than the header
            declares is refused before anything is read.

    Raises:
        MediaError: objects or other non-numbers, a damaged or oversized header, too many numbers,
            too few bytes.
    """
    shape, fortran, dtype = _read_header(
        stream, name, max_items=max_items, max_bytes=max_bytes, length=length, exact=exact
    )
    needed = math.prod(shape) * dtype.itemsize
    data = stream.read(needed + exact)
    if len(data) != needed:
        raise MediaError(
            _wrong_length(
                name, shape, dtype, needed, "more" if len(data) > needed else str(len(data))
            )
        )
    array = np.frombuffer(data, dtype=dtype)
    array = array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


def check_npy(
    stream: IO[bytes], name: str, *, max_items: int, length: int, max_bytes: int | None = None
) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape and dtype of an array from its header; no number is read.

    The header is checked against the length of the file.

    Raises:
        MediaError: as `read_npy`.
    """
    shape, _, dtype = _read_header(
        stream, name, max_items=max_items, max_bytes=max_bytes, length=length, exact=True
    )
    return shape, dtype


def _read_header(
    stream: IO[bytes],
    name: str,
    *,
    max_items: int,
    max_bytes: int | None,
    length: int | None,
    exact: bool,
) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the first axis is fastest, and type; all plausible."""
    counted = _Counted(stream)
    header = cast(IO[bytes], counted)  # only `read` is used
    try:
        version = npy.read_magic(header)
        if version not in _HEADERS:
            raise MediaError(f"{name}: NPY version {version} is not read; save it with numpy.save")
        shape, fortran, dtype = _HEADERS[version](header, max_header_size=_MAX_HEADER)
    except MediaError:
        raise
    except DECODE_ERRORS as error:
        raise MediaError(
            f"{name}: the NPY header is damaged or oversized ({type(error).__name__})"
        ) from None
    if dtype.hasobject:
        raise MediaError(
            f"{name}: holds Python objects, which would run code when read; save a plain numeric "
            "array"
        )
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise MediaError(f"{name}: expected an array of numbers, found {dtype}")
    if not all(
        type(side) is int and side >= 0 for side in shape
    ):  # True is an int to NumPy's reader
        raise MediaError(
            f"{name}: declares the shape {_text(shape)}; expected whole numbers from 0 on"
        )
    items = math.prod(shape)
    needed = items * dtype.itemsize
    if items > max_items:
        raise MediaError(
            f"{name}: declares shape {_text(shape)}, more than the {max_items} numbers that are "
            "allowed"
        )
    if max_bytes is not None and needed > max_bytes:
        raise MediaError(
            f"{name}: declares {_text(shape)} of {dtype}, more than the {max_bytes} bytes that "
            "are allowed"
        )
    left = None if length is None else length - counted.count
    if left is not None and (left < needed or (exact and left > needed)):
        raise MediaError(_wrong_length(name, shape, dtype, needed, str(left)))
    return shape, fortran, dtype


def read_npz(path: Path, name: str, *, max_items: int, max_bytes: int) -> np.ndarray:
    """Return the one array of an archive that numpy.savez or numpy.savez_compressed wrote.

    Raises:
        MediaError: several members, or as `read_npz_member`.
    """
    with _open_npz(path, name) as (archive, member):
        return read_npz_member(archive, member, name, max_items=max_items, max_bytes=max_bytes)


def check_npz(
    path: Path, name: str, *, max_items: int, max_bytes: int
) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape and dtype of the one array of an archive; only its header is decompressed.

    Raises as `read_npz`.
    """
    with _open_npz(path, name) as (archive, member):
        _check_member(member, name, max_bytes=max_bytes)
        return _check_header(archive, member, name, max_items=max_items, max_bytes=max_bytes)


@contextmanager
def _open_npz(path: Path, name: str) -> Iterator[tuple[zipfile.ZipFile, zipfile.ZipInfo]]:
    """Open an archive with one member; errors of damaged files become a `MediaError`."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) != 1 or not members[0].filename.endswith(".npy"):
                raise MediaError(
                    f"{name}: expected an archive with one array, found {len(members)} members"
                )
            yield archive, members[0]
    except MediaError:
        raise
    except (zipfile.BadZipFile, *DECODE_ERRORS) as error:
        raise MediaError(
            f"{name}: the NPZ archive is truncated or damaged ({type(error).__name__})"
        ) from None


def read_npz_member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, *, max_items: int, max_bytes: int
) -> np.ndarray:
    """Return one array of an archive.

    Lengths are compared before memory is allocated: the length in the archive's directory with the
    allowed bytes and with what the compressed bytes can expand to, and the length in the array's
    header with the directory's.

    Raises:
        MediaError: a compression other than stored or deflated, encryption, or as `read_npy`.
        zipfile.BadZipFile: a checksum that does not fit, or a damaged archive.
    """
    _check_member(member, name, max_bytes=max_bytes)
    _check_header(archive, member, name, max_items=max_items, max_bytes=max_bytes)
    with archive.open(member) as stream:
        return read_npy(
            stream, name, max_items=max_items, max_bytes=max_bytes, length=member.file_size
        )


def _check_header(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, *, max_items: int, max_bytes: int
) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape and dtype of one array, whose memory is bounded by its packed bytes."""
    with archive.open(member) as stream:
        shape, dtype = check_npy(
            stream, name, max_items=max_items, max_bytes=max_bytes, length=member.file_size
        )
    check_cost(shape, dtype, held=member.compress_size, name=name)
    return shape, dtype


def _check_member(member: zipfile.ZipInfo, name: str, *, max_bytes: int) -> None:
    if member.flag_bits & 1:
        raise MediaError(
            f"{name}: the NPZ archive is encrypted; save it with numpy.savez_compressed"
        )
    if member.compress_type not in _PACKINGS:
        raise MediaError(
            f"{name}: the array is packed by method {member.compress_type} of ZIP; expected 0 "
            "(stored) or 8 (deflated), as numpy.savez and numpy.savez_compressed write it"
        )
    if member.file_size > max_bytes + _MAX_PREFIX:
        raise MediaError(
            f"{name}: the NPZ archive declares {member.file_size} bytes, more than the "
            f"{max_bytes} that are allowed"
        )
    check_ratio(member.compress_size, member.file_size, name)


class _Counted:
    """A stream that counts the bytes read from it; an archive member cannot always tell."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.count = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.count += len(data)
        return data


def _wrong_length(
    name: str, shape: tuple[int, ...], dtype: np.dtype, needed: int, found: str
) -> str:
    return (
        f"{name}: shape {_text(shape)} of {dtype} needs {needed} bytes, found {found}; the file "
        "is damaged"
    )


def _text(shape: tuple[int, ...]) -> str:
    """Return a shape for a message, shortened: it may have thousands of digits."""
    text = str(shape)
    return text if len(text) <= 100 else f"{text[:100]}..."


def compact(array: np.ndarray) -> np.ndarray:
    """Numbers as int16 if it can represent all of them, as float32 otherwise."""
    if array.dtype.kind == "b" or (array.dtype.kind in "iu" and array.dtype.itemsize < 2):
        return array.astype(np.int16)
    whole = array.dtype.kind in "iu" and array.size > 0
    fits = whole and int(array.min()) >= -(2**15) and int(array.max()) < 2**15
    with np.errstate(over="ignore"):  # what becomes infinite is counted and refused by the caller
        return array.astype(np.int16 if fits else np.float32, copy=False)
