"""NIfTI-1 and NIfTI-2, .nii and .nii.gz, of either byte order."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from medm.errors import MediaError
from medm.imaging.geometry import Geometry, check_size, check_spacing, geometry_from_steps
from medm.imaging.payload import open_binary, read_voxels

_TYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"
}  # fmt: skip
_MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
_MAX_OFFSET = 2**24
"""Largest header with extensions, which are skipped: they may hold a patient's data."""


_Layout = dict[str, tuple[str, int]]
_LAYOUTS: dict[int, tuple[bytes, int, _Layout]] = {
    348: (b"n+1", 344, {
        "dim": ("8h", 40), "datatype": ("h", 70), "bitpix": ("h", 72), "pixdim": ("8f", 76), "vox_offset": ("f", 108),
        "slope": ("f", 112), "intercept": ("f", 116), "units": ("B", 123), "qform_code": ("h", 252),
        "sform_code": ("h", 254), "quaternion": ("6f", 256), "rows": ("12f", 280),
    }),
    540: (b"n+2", 4, {
        "dim": ("8q", 16), "datatype": ("h", 12), "bitpix": ("h", 14), "pixdim": ("8d", 104), "vox_offset": ("q", 168),
        "slope": ("d", 176), "intercept": ("d", 184), "units": ("i", 500), "qform_code": ("i", 344),
        "sform_code": ("i", 348), "quaternion": ("6d", 352), "rows": ("12d", 400),
    }),
}  # fmt: skip
"""By size of the header: its magic, where it stands, and format and place of the fields that are read."""


@dataclass(frozen=True, slots=True)
class _Header:
    size: int
    order: str
    """Byte order, "<" or ">"."""
    dim: tuple[int, ...]
    datatype: int
    bitpix: int
    pixdim: tuple[float, ...]
    vox_offset: float
    slope: float
    intercept: float
    units: int
    qform_code: int
    sform_code: int
    quaternion: tuple[float, ...]
    """b, c, d and the offset x, y, z."""
    rows: tuple[float, ...]
    """The 12 numbers of the sform."""

    @property
    def millimetres(self) -> float:
        """Length of one unit of the header."""
        return _MILLIMETRES.get(self.units & 7, 1.0)


def read_nifti(path: Path, name: str) -> tuple[np.ndarray, Geometry | None]:
    """Voxels (z, y, x), scaled, and their geometry; None where the header gives no orientation.

    Raises:
        MediaError: truncated, damaged, of a kind that is not read, or with impossible numbers in its header.
    """
    with open_binary(path, name) as stream:
        header, packed = _read_header(stream, name)
        shape, dtype = _check(header, name)
        start = int(header.vox_offset)
        if packed:
            # Header and voxels are one packed stream: both are unpacked, and the checksum covers both.
            stream.seek(0)
            data = read_voxels(stream, (start + math.prod(shape) * dtype.itemsize,), np.dtype("u1"), "gzip", name)
            voxels = np.frombuffer(data.data, dtype=dtype, offset=start).reshape(shape)
        else:
            stream.seek(start)
            voxels = read_voxels(stream, shape, dtype, "raw", name)
    return _scaled(voxels, header, name), _geometry(header, name)


def check_nifti(path: Path, name: str) -> None:
    """Look at the header, and at the size of a file that is not packed. Raises `MediaError`."""
    with open_binary(path, name) as stream:
        header, packed = _read_header(stream, name)
    shape, dtype = _check(header, name)
    needed, found = int(header.vox_offset) + math.prod(shape) * dtype.itemsize, path.stat().st_size
    if not packed and found < needed:
        raise MediaError(f"{name}: {found} bytes, but its header declares {needed}; the file is truncated")


def _read_header(stream: BinaryIO, name: str) -> tuple[_Header, bool]:
    """The header, and whether the file is packed."""
    packed = stream.read(2) == b"\x1f\x8b"
    stream.seek(0)
    return _parse(_first_bytes(stream, packed, name), name), packed


def _first_bytes(stream: BinaryIO, packed: bool, name: str) -> bytes:
    try:
        data = (gzip.GzipFile(fileobj=stream) if packed else stream).read(540)
    except (OSError, EOFError, zlib.error) as error:
        raise MediaError(f"{name}: the packed file is truncated or damaged ({type(error).__name__})") from None
    if len(data) < 348:
        raise MediaError(f"{name}: {len(data)} bytes are too few for a NIfTI header; the file is empty or truncated")
    return data.ljust(540, b"\0")


def _parse(data: bytes, name: str) -> _Header:
    for order in "<>":
        (size,) = struct.unpack_from(order + "i", data)
        magic, at, layout = _LAYOUTS.get(size, (b"", 0, {}))
        if magic and data[at : at + 3] == magic:
            fields = {key: struct.unpack_from(order + form, data, place) for key, (form, place) in layout.items()}
            values: dict[str, Any] = {key: value if len(value) > 1 else value[0] for key, value in fields.items()}
            return _Header(size=size, order=order, **values)
    if data[344:347] == b"ni1":
        raise MediaError(f"{name}: a NIfTI header without voxels (.hdr/.img pair); convert it to one .nii file")
    raise MediaError(f"{name}: not a NIfTI file: no header of 348 or 540 bytes with its magic")


def _check(header: _Header, name: str) -> tuple[tuple[int, int, int], np.dtype]:
    """Shape (z, y, x) and type, once every number in the header is believable."""
    count = header.dim[0]
    if not 1 <= count <= 7:
        raise MediaError(f"{name}: declares {count} dimensions; expected 3")
    lengths = list(header.dim[1 : count + 1])
    while len(lengths) > 3 and lengths[-1] == 1:
        lengths.pop()
    if header.datatype not in _TYPES:
        raise MediaError(f"{name}: NIfTI datatype {header.datatype} (colour or complex numbers) is not read")
    dtype = np.dtype(header.order + _TYPES[header.datatype])
    if header.bitpix != dtype.itemsize * 8:
        raise MediaError(f"{name}: the header declares {header.bitpix} bits for {dtype.name}; it is damaged")
    check_size(lengths[::-1], dtype.itemsize, name)
    if not (math.isfinite(header.vox_offset) and header.size <= header.vox_offset <= _MAX_OFFSET):
        raise MediaError(f"{name}: voxels begin at byte {header.vox_offset:g} by the header; it is damaged")
    check_spacing([abs(value) * header.millimetres for value in header.pixdim[1:4]], name)
    return (lengths[2], lengths[1], lengths[0]), dtype


def _scaled(voxels: np.ndarray, header: _Header, name: str) -> np.ndarray:
    slope, intercept = header.slope, header.intercept
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise MediaError(f"{name}: scl_slope {slope:g} and scl_inter {intercept:g}: expected finite numbers")
    if slope == 0 or (slope, intercept) == (1, 0):  # a slope of 0 means "not scaled"
        return voxels
    return voxels.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _geometry(header: _Header, name: str) -> Geometry | None:
    unit = header.millimetres
    to_lps = np.diag([-1.0, -1.0, 1.0])
    found = []
    if header.sform_code > 0:
        rows = np.asarray(header.rows, dtype=np.float64).reshape(3, 4)
        found.append((rows[:, :3], rows[:, 3]))
    if header.qform_code > 0:
        found.append((_rotation(header, name) * np.abs(header.pixdim[1:4]), np.asarray(header.quaternion[3:])))
    geometries = [geometry_from_steps(to_lps @ steps * unit, to_lps @ offset * unit, name) for steps, offset in found]
    if len(geometries) == 2 and geometries[0].axes != geometries[1].axes:
        raise MediaError(
            f"{name}: sform says the axes are {geometries[0].axes}, qform {geometries[1].axes}: left and right cannot "
            "be known; mend the header"
        )
    return geometries[0] if geometries else None


def _rotation(header: _Header, name: str) -> np.ndarray:
    b, c, d = header.quaternion[:3]
    rest = 1 - (b * b + c * c + d * d)
    if not math.isfinite(rest) or rest < -1e-3:
        raise MediaError(f"{name}: the quaternion of the header is not a rotation")
    a = math.sqrt(max(rest, 0.0))
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    if header.pixdim[0] < 0:
        rotation[:, 2] *= -1
    return rotation
