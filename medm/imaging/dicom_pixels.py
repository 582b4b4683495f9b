"""Decoding of the pixels of a DICOM file with a checked header.

Uncompressed gray pixels, which most CT and MR are, are read directly; everything else is decoded by
GDCM in another process.
"""

from __future__ import annotations

import math
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medm.errors import MediaError
from medm.imaging.dicom import NATIVE, Header
from medm.imaging.isolated import DECODER

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_MULTI_FRAME = {8: "1.2.840.10008.5.1.4.1.1.7.2", 16: "1.2.840.10008.5.1.4.1.1.7.3"}
"""UIDs of secondary capture classes: single-frame, and multi-frame gray of 8 and 16 bits."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """Values of one file."""

    values: np.ndarray
    """(frames, rows, columns) after the modality transform; color is (..., 3) of uint8."""
    padding: np.ndarray | None
    """(frames, rows, columns), true for pixels outside the image; None if the file marks none."""


def read_pixels(header: Header) -> Pixels:
    """Decode the pixels of a file and apply its modality transform.

    Raises:
        MediaError: damaged, or of an encoding that cannot be decoded.
    """
    stored = _stored(header) if header.direct else _decoded(header)
    if header.samples == 3:
        return Pixels(stored, None)
    padding = None
    if header.padding is not None:
        outside = (stored >= header.padding[0]) & (stored <= header.padding[1])
        padding = outside if outside.any() and not outside.all() else None
    if header.table is not None:
        return Pixels(header.table.apply(stored), padding)
    if header.frame_rescale:
        pairs = zip(stored, header.frame_rescale, strict=True)
        return Pixels(
            np.stack([_rescaled(frame, rescale).astype(np.float32) for frame, rescale in pairs]),
            padding,
        )
    return Pixels(_rescaled(stored, header.rescale), padding)


def _decoded(header: Header) -> np.ndarray:
    """Stored numbers, or colors, decoded by GDCM."""
    expected = (header.frames, header.rows, header.columns) + ((3,) if header.samples == 3 else ())
    with _for_decoder(header) as path:
        pixels = DECODER.decode(path, header.name, max_items=math.prod(expected))
    if pixels.shape != expected:
        raise MediaError(
            f"{header.name}: the DICOM header declares pixels {expected}, decoded were "
            f"{pixels.shape}"
        )
    if header.samples == 3 and pixels.dtype != np.uint8:
        raise MediaError(
            f"{header.name}: DICOM color of {pixels.dtype} is not read; expected uint8"
        )
    if pixels.dtype.kind not in "iu":
        raise MediaError(
            f"{header.name}: decoding the DICOM pixels gave {pixels.dtype}, expected whole numbers"
        )
    return pixels


@contextmanager
def _for_decoder(header: Header) -> Iterator[Path]:
    """Write a file for GDCM: color as it is, gray with a minimal header for decoding.

    GDCM would apply slope and intercept of some places and classes, and invert MONOCHROME1; the
    copy has neither. Names and dates of the patient are not copied.
    """
    if header.samples == 3 and not header.bare:
        yield header.path
        return
    data = header.path.read_bytes()
    if header.samples == 3 or header.syntax in NATIVE:
        meta = data if data[:2] == b"\2\0" else _meta(header) + data
        data = data if not header.bare else bytes(128) + b"DICM" + meta
    else:
        data = (
            bytes(128)
            + b"DICM"
            + _meta(header)
            + _least_header(header)
            + data[header.pixels_at - 12 :]
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.dcm"
        path.write_bytes(data)
        yield path


def _meta(header: Header) -> bytes:
    """Meta information with the transfer syntax alone."""
    syntax = _element(0x00020010, b"UI", header.syntax)
    return _element(0x00020000, b"UL", struct.pack("<I", len(syntax))) + syntax


def _least_header(header: Header) -> bytes:
    """Return the elements before the pixels in explicit VR little endian, for compressed data."""
    storage = _SECONDARY_CAPTURE if header.frames == 1 else _MULTI_FRAME[header.bits_allocated]
    numbers = (
        (0x00280010, header.rows), (0x00280011, header.columns),
        (0x00280100, header.bits_allocated),
        (0x00280101, header.bits_stored), (0x00280102, header.high_bit),
        (0x00280103, int(header.signed)),
    )  # fmt: skip
    return b"".join(
        [
            _element(0x00080016, b"UI", storage),
            _element(0x00080018, b"UI", "2.25.1"),
            _element(0x00280002, b"US", struct.pack("<H", 1)),
            _element(0x00280004, b"CS", "MONOCHROME2"),
            _element(0x00280008, b"IS", str(header.frames)),
            *(_element(tag, b"US", struct.pack("<H", number)) for tag, number in numbers),
        ]
    )


def _element(tag: int, vr: bytes, value: str | bytes) -> bytes:
    data = value.encode("ascii") if isinstance(value, str) else value
    data += (b"\0" if vr == b"UI" else b" ") * (len(data) % 2)
    return struct.pack("<2H2sH", tag >> 16, tag & 0xFFFF, vr, len(data)) + data


def _stored(header: Header) -> np.ndarray:
    """Return the stored numbers, without what may stand in unused bits."""
    dtype = np.dtype(header.byte_order + ("u1" if header.bits_allocated == 8 else "u2"))
    shape = (header.frames, header.rows, header.columns)
    count = math.prod(shape)
    # Bytes in big-endian words (PS3.5 annex A.3): two pixels change places.
    swapped = header.in_words and dtype == np.uint8 and header.byte_order == ">"
    size = count * dtype.itemsize + (count % 2 if swapped else 0)
    with header.path.open("rb") as stream:
        stream.seek(header.pixels_at)
        data = stream.read(size)
    if len(data) < size:
        raise MediaError(f"{header.name}: the DICOM pixels were cut off while they were read")
    if swapped:
        data = np.frombuffer(data, dtype=">u2").astype("<u2").tobytes()[:count]
    values = np.frombuffer(data, dtype=dtype).astype(dtype.newbyteorder("=")).reshape(shape)
    unused = header.bits_allocated - header.bits_stored
    if header.signed:
        shifted: np.ndarray = (values << unused).view(
            np.int8 if header.bits_allocated == 8 else np.int16
        )
        return np.right_shift(shifted, unused)
    return values & (2**header.bits_stored - 1) if unused else values


def _rescaled(values: np.ndarray, rescale: tuple[float, float] | None) -> np.ndarray:
    if rescale is None or rescale == (1.0, 0.0):
        return values
    slope, intercept = rescale
    if (
        slope == int(slope)
        and intercept == int(intercept)
        and max(abs(slope), abs(intercept)) < 2**14
    ):
        return values.astype(np.int32) * int(slope) + int(intercept)
    return values.astype(np.float32) * np.float32(slope) + np.float32(intercept)
