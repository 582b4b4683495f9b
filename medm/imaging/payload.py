"""Bytes of voxels behind a header: length and checksum verified, expansion limited to the declared.

SimpleITK is not used for NIfTI, NRRD and MetaImage because it fills a truncated NIfTI with zeros,
replaces its NaN and impossible spacing, and skips the checksum of a MetaImage, each silently. Tests
compare the two readers.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

import numpy as np
from zlib_ng import zlib_ng  # unpacks twice as fast as Python's zlib, with the same checks

from medm.errors import MediaError
from medm.limits import check_memory

Packing = Literal["raw", "gzip", "zlib"]

_SLACK = 2**12
"""Bytes that may follow the voxels (padding)."""
_PIECE = 2**20
"""Packed bytes that are read at a time."""
_MAX_RATIO = 1032
"""Times its size that deflate can hold: 258 bytes in two bits."""


def open_binary(path: Path, name: str) -> BinaryIO:
    """Return the opened file. Raises `MediaError`."""
    try:
        return path.open("rb")
    except OSError as error:
        raise MediaError(f"{name}: cannot be opened ({error.strerror})") from None


def read_voxels(
    stream: BinaryIO, shape: tuple[int, ...], dtype: np.dtype, packing: Packing, name: str
) -> np.ndarray:
    """An array from a stream that stands at the first voxel.

    Args:
        stream: the file; for "gzip" inside the stream (NRRD) and "zlib" (MetaImage) the packed
            bytes begin here.
        shape: of the array, last axis fastest.
        dtype: as stored, with its byte order.
        packing: how the bytes are packed.
        name: the file, for messages.

    Raises:
        MediaError: too few bytes, far too many, or a checksum that does not fit.
    """
    needed = math.prod(shape) * dtype.itemsize
    data: bytes | bytearray
    try:
        if packing == "raw":
            # A header may place the voxels behind the end of the file.
            left = max(os.fstat(stream.fileno()).st_size - stream.tell(), 0)
            data, more = stream.read(min(needed, left)), left - needed
        else:
            check_ratio(os.fstat(stream.fileno()).st_size - stream.tell(), needed, name)
            data, more = _unpack(stream, needed, packing)
    except (OSError, EOFError, MemoryError, zlib_ng.error) as error:  # type: ignore[misc]  # its stub has an instance
        raise MediaError(
            f"{name}: the packed voxels are truncated or damaged ({type(error).__name__})"
        ) from None
    if len(data) < needed:
        _refuse_short(shape, dtype, needed, len(data), name)
    if more > _SLACK:
        _refuse_long(needed, name)
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def check_ratio(packed: int, needed: int, name: str) -> None:
    """Refuse a header that declares more than its deflated bytes can hold, before allocating.

    Raises:
        MediaError: the numbers of bytes do not fit.
    """
    if needed > (packed + 1) * _MAX_RATIO:
        raise MediaError(
            f"{name}: {packed} packed bytes cannot hold the {needed} bytes that its header "
            "declares; the file is truncated or its header is wrong"
        )


def check_cost(
    shape: tuple[int, ...], dtype: np.dtype, *, held: int, name: str, is_scaled: bool = False
) -> None:
    """Refuse a small file whose voxels would take much memory, before allocating.

    They are counted as stored, and once more in the type that they are converted to.

    Args:
        shape: of the array.
        dtype: as stored.
        held: bytes of the file.
        name: the file, for messages.
        is_scaled: the values are multiplied, and so become float32.

    Raises:
        MediaError: see `medm.limits.check_memory`.
    """
    kept = dtype.isnative and dtype in (np.int16, np.float32) and not is_scaled
    small = dtype.itemsize == 1 and not is_scaled
    converted = 0 if kept else 2 if small else 4
    needed = math.prod(shape) * (dtype.itemsize + converted)
    check_memory(needed, held=held, name=name, error=MediaError)


def check_length(
    stream: BinaryIO, shape: tuple[int, ...], dtype: np.dtype, packing: Packing, name: str
) -> None:
    """Check that voxels can all be there by the length of their file, without reading them.

    Args:
        stream: at the first voxel.
        shape: of the array.
        dtype: as stored.
        packing: how the bytes are packed.
        name: the file, for messages.

    Raises:
        MediaError: too few bytes; for voxels that are not packed also too many.
    """
    needed = math.prod(shape) * dtype.itemsize
    found = os.fstat(stream.fileno()).st_size - stream.tell()
    if packing != "raw":
        check_ratio(found, needed, name)
    elif found < needed:
        _refuse_short(shape, dtype, needed, found, name)
    elif found > needed + _SLACK:
        _refuse_long(needed, name)


def _refuse_short(
    shape: tuple[int, ...], dtype: np.dtype, needed: int, found: int, name: str
) -> NoReturn:
    raise MediaError(
        f"{name}: {' x '.join(map(str, shape))} voxels of {dtype.name} need {needed} bytes, found "
        f"{found}; the file is truncated or its header is wrong"
    )


def _refuse_long(needed: int, name: str) -> NoReturn:
    raise MediaError(
        f"{name}: holds more than the {needed} bytes of voxels that its header declares; one of "
        "the two is wrong"
    )


def _unpack(stream: BinaryIO, needed: int, packing: Packing) -> tuple[bytearray, int]:
    """Return up to the first `needed` bytes, and how many more follow (a lower bound if too many).

    zlib verifies the checksum at the end of what it unpacks. A gzip file may have several members,
    as bgzip writes, and zeros behind them. Python's gzip module takes 8 KiB at a time, which for a
    volume costs more than the copy here.
    """
    window = 31 if packing == "gzip" else 15
    data, total = bytearray(needed), 0
    unpacker = zlib_ng.decompressobj(window)
    packed = stream.read(_PIECE)
    while total <= needed + _SLACK:
        if unpacker.eof:
            packed = (unpacker.unused_data or stream.read(_PIECE)).lstrip(b"\0")
            if packing == "zlib" or not packed:
                break
            unpacker = zlib_ng.decompressobj(window)
        part = unpacker.decompress(packed, _PIECE * 16)
        if not packed and not part and not unpacker.eof:
            raise EOFError
        kept = min(len(part), max(needed - total, 0))
        data[total : total + kept] = part[:kept]
        total += len(part)
        packed = unpacker.unconsumed_tail or (b"" if unpacker.eof else stream.read(_PIECE))
    del data[total:]
    return data, max(total - needed, 0)


def sibling(path: Path, file: str, name: str, *, header: str) -> Path:
    """Return the data file that a detached header names: a plain name in the same folder.

    Args:
        path: the header.
        file: what it names.
        name: the header, for messages.
        header: suffix of headers of this format that may lie apart from their voxels. A file of
            another suffix is taken to be whole by whoever copies, caches or sends it.

    Raises:
        MediaError: another suffix, a name outside the folder, a missing file, or a link.
    """
    if path.suffix.lower() != header:
        raise MediaError(
            f"{name}: its voxels are in another file; only {header} headers may do that, so "
            "rename it"
        )
    if not file or "/" in file or "\\" in file or file in (".", ".."):
        raise MediaError(
            f"{name}: the header names a data file outside its folder or in several parts; refused"
        )
    target = path.parent / file
    if not target.is_file() or target.resolve().parent != path.parent.resolve():
        raise MediaError(
            f"{name}: the data file that the header names is missing from its folder, or a link "
            "out of it"
        )
    return target
