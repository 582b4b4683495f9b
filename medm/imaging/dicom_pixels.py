"""The pixels behind a checked DICOM header.

Uncompressed grey pixels, which most CT and MR are, are read directly; everything else is decoded by GDCM in another
process.
"""

from __future__ import annotations

import math
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from medm.errors import MediaError
from medm.imaging.dicom import Header
from medm.imaging.isolated import DECODER


def read_pixels(header: Header) -> np.ndarray:
    """(frames, rows, columns) after rescale, or (frames, rows, columns, 3) of uint8 in colour.

    Raises:
        MediaError: damaged, or of an encoding that cannot be decoded.
    """
    if header.direct:
        return _rescaled(_stored(header), header)
    expected = (header.frames, header.rows, header.columns) + ((3,) if header.samples == 3 else ())
    with _with_file_header(header) as path:
        pixels = DECODER.decode(path, header.name, max_items=math.prod(expected))
    if pixels.shape != expected:
        raise MediaError(f"{header.name}: the DICOM header declares pixels {expected}, decoded were {pixels.shape}")
    if header.samples == 3:
        if pixels.dtype != np.uint8:
            raise MediaError(f"{header.name}: DICOM colour of {pixels.dtype} is not read; expected uint8")
        return pixels
    if header.inverted:
        # ITK turns MONOCHROME1 over within the stored range; windows are about the values as they were.
        slope, intercept = header.rescale or (1.0, 0.0)
        pixels = slope * sum(header.stored_range) + 2 * intercept - pixels.astype(np.float64)
    return _whole(pixels)


@contextmanager
def _with_file_header(header: Header) -> Iterator[Path]:
    """The file; where it lacks its DICOM file header, a copy that has one."""
    if not header.bare:
        yield header.path
        return
    data = header.path.read_bytes()
    meta = b""
    if data[:2] != b"\2\0":  # no meta information either
        value = header.syntax.encode() + b"\0" * (len(header.syntax) % 2)
        element = struct.pack("<2H2sH", 2, 0x10, b"UI", len(value)) + value
        meta = struct.pack("<2H2sHI", 2, 0, b"UL", 4, len(element)) + element
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.dcm"
        path.write_bytes(bytes(128) + b"DICM" + meta + data)
        yield path


def _stored(header: Header) -> np.ndarray:
    """The stored numbers, without what may stand in unused bits."""
    dtype = np.dtype(header.byte_order + ("u1" if header.bits_allocated == 8 else "u2"))
    shape = (header.frames, header.rows, header.columns)
    count = math.prod(shape)
    with header.path.open("rb") as stream:
        stream.seek(header.pixels_at)
        data = stream.read(count * dtype.itemsize)
    if len(data) < count * dtype.itemsize:
        raise MediaError(f"{header.name}: the DICOM pixels were cut off while they were read")
    values = np.frombuffer(data, dtype=dtype).astype(dtype.newbyteorder("=")).reshape(shape)
    unused = header.bits_allocated - header.bits_stored
    if header.signed:
        shifted: np.ndarray = (values << unused).view(np.int8 if header.bits_allocated == 8 else np.int16)
        return np.right_shift(shifted, unused)
    return values & (2**header.bits_stored - 1) if unused else values


def _rescaled(values: np.ndarray, header: Header) -> np.ndarray:
    if header.rescale in (None, (1.0, 0.0)):
        return values
    slope, intercept = header.rescale
    if slope == int(slope) and intercept == int(intercept) and max(abs(slope), abs(intercept)) < 2**14:
        return values.astype(np.int32) * int(slope) + int(intercept)
    return values.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _whole(pixels: np.ndarray) -> np.ndarray:
    """Whole numbers that GDCM computed as floating point, as whole numbers again."""
    if pixels.dtype.kind == "f" and (pixels == np.round(pixels)).all() and np.abs(pixels).max() < 2**31:
        return pixels.astype(np.int32)
    return pixels.astype(np.float32) if pixels.dtype.kind == "f" else pixels
