"""NumPy files from strangers: the header is checked before anything is allocated, and no object is ever built."""

from __future__ import annotations

import math
from typing import IO

import numpy as np
from numpy.lib import format as npy

from medm.errors import MediaError
from medm.imaging.damage import DECODE_ERRORS

_MAX_HEADER = 10_000
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_npy(
    stream: IO[bytes], name: str, *, max_items: int, max_bytes: int | None = None, exact: bool = True
) -> np.ndarray:
    """One array of plain numbers from the stream of a .npy file (a file, or a member of an archive).

    Args:
        stream: placed at the start of the array; may be unable to seek.
        name: the file, for messages.
        max_items: most numbers that are read.
        max_bytes: most bytes of them; None for no further limit.
        exact: whether the stream has to end with the array.

    Raises:
        MediaError: objects or other non-numbers, a damaged or oversized header, too many numbers, too few bytes.
    """
    try:
        version = npy.read_magic(stream)
        if version not in _HEADERS:
            raise MediaError(f"{name}: NPY version {version} is not read; save it with numpy.save")
        shape, fortran, dtype = _HEADERS[version](stream, max_header_size=_MAX_HEADER)
    except MediaError:
        raise
    except DECODE_ERRORS as error:
        raise MediaError(f"{name}: the NPY header is damaged or oversized ({type(error).__name__})") from None
    if dtype.hasobject:
        raise MediaError(f"{name}: holds Python objects, which would run code when read; save a plain numeric array")
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise MediaError(f"{name}: expected an array of numbers, found {dtype}")
    items = math.prod(shape)
    if items > max_items or any(length < 0 for length in shape):
        raise MediaError(f"{name}: declares shape {shape}, more than the {max_items} numbers that are allowed")
    if max_bytes is not None and items * dtype.itemsize > max_bytes:
        raise MediaError(f"{name}: declares {shape} of {dtype}, more than the {max_bytes} bytes that are allowed")
    data = stream.read(items * dtype.itemsize + exact)
    if len(data) != items * dtype.itemsize:
        found = "more" if len(data) > items * dtype.itemsize else str(len(data))
        raise MediaError(
            f"{name}: shape {shape} of {dtype} needs {items * dtype.itemsize} bytes, found {found}; the file is damaged"
        )
    array = np.frombuffer(data, dtype=dtype)
    array = array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


def compact(array: np.ndarray) -> np.ndarray:
    """Numbers as int16 where that holds every one of them, as float32 otherwise."""
    if array.dtype.kind == "b" or (array.dtype.kind in "iu" and array.dtype.itemsize < 2):
        return array.astype(np.int16)
    whole = array.dtype.kind in "iu" and array.size > 0
    fits = whole and int(array.min()) >= -(2**15) and int(array.max()) < 2**15
    with np.errstate(over="ignore"):  # what becomes infinite is counted and refused by the caller
        return array.astype(np.int16 if fits else np.float32, copy=False)
