"""NIfTI-1 and NIfTI-2, .nii and .nii.gz, of either byte order."""

from __future__ import annotations

import gzip
import logging
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from medm.errors import MediaError
from medm.files import atomic_file
from medm.imaging.constant import refuse_lost_values
from medm.imaging.geometry import (
    Geometry,
    check_size,
    check_spacing,
    geometry_from_steps,
    join_numbers,
    largest_turn,
    spacings_differ,
)
from medm.imaging.notices import warn_of_file
from medm.imaging.payload import check_cost, open_binary, read_voxels

logger = logging.getLogger(__name__)

_TYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8",
    1280: "u8"
}  # fmt: skip
_UNITS = {0: ("mm", 1.0), 1: ("m", 1000.0), 2: ("mm", 1.0), 3: ("um", 0.001)}
"""Name and length in mm by the spatial part of `xyzt_units`; 0 is unknown, taken to be mm."""
_TURN_DEGREES = 1.0
"""Between sform and qform; less is the rounding of quaternions in single precision."""
_MAX_OFFSET = 2**24
"""Largest header with extensions, which are skipped: they may hold a patient's data."""


_Layout = dict[str, tuple[str, int]]
_LAYOUTS: dict[int, tuple[bytes, int, _Layout]] = {
    348: (b"n+1", 344, {
        "dim": ("8h", 40), "datatype": ("h", 70), "bitpix": ("h", 72), "pixdim": ("8f", 76),
            "vox_offset": ("f", 108),
        "slope": ("f", 112), "intercept": ("f", 116), "units": ("B", 123), "qform_code": ("h", 252),
        "sform_code": ("h", 254), "quaternion": ("6f", 256), "rows": ("12f", 280),
    }),
    540: (b"n+2", 4, {
        "dim": ("8q", 16), "datatype": ("h", 12), "bitpix": ("h", 14), "pixdim": ("8d", 104),
            "vox_offset": ("q", 168),
        "slope": ("d", 176), "intercept": ("d", 184), "units": ("i", 500), "qform_code": ("i", 344),
        "sform_code": ("i", 348), "quaternion": ("6d", 352), "rows": ("12d", 400),
    }),
}  # fmt: skip
"""By size of the header: its magic and the magic's offset, format and offset of the fields."""


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
    def unit(self) -> tuple[str, float]:
        """Name and length in mm of the unit of the header; mm where its code is not defined."""
        return _UNITS.get(self.units & 7, ("mm", 1.0))

    @property
    def spacing(self) -> list[float]:
        """Voxel sizes along x, y, z in mm. Their sign has no meaning in the standard."""
        return [abs(value) * self.unit[1] for value in self.pixdim[1:4]]


def read_nifti(path: Path, name: str) -> tuple[np.ndarray, Geometry | None]:
    """Voxels (z, y, x), scaled, and their geometry; None where the header gives no orientation.

    Raises:
        MediaError: truncated, damaged, of a kind that is not read, or with impossible numbers in
            its header.
    """
    with open_binary(path, name) as stream:
        header, packed = _read_header(stream, name)
        shape, dtype = _check(header, name)
        _check_cost(stream, header, shape, dtype, name)
        voxels = _voxels(stream, header, packed, shape, dtype, name)
    return _scaled(voxels, header, name), _geometry(header, name)


def read_nifti_geometry(path: Path, name: str) -> tuple[tuple[int, ...], Geometry | None]:
    """Return shape (z, y, x) and geometry by the header alone. Raises `MediaError`."""
    with open_binary(path, name) as stream:
        header, _ = _read_header(stream, name)
    shape, _ = _check(header, name)
    return shape, _geometry(header, name)


def read_nifti_stack(path: Path, name: str) -> np.ndarray:
    """Return the volumes of a file of four axes, the first of which numbers them: (N, z, y, x).

    Its affine says nothing about the volumes, as their axes are the second to the fourth. A file of
    three axes is a single volume.

    Raises:
        MediaError: truncated, damaged, of another number of axes, or with scaled values.
    """
    with open_binary(path, name) as stream:
        header, packed = _read_header(stream, name)
        count = header.dim[0]
        lengths = list(header.dim[1 : count + 1]) if 1 <= count <= 7 else []
        while len(lengths) > 4 and lengths[-1] == 1:
            lengths.pop()
        if len(lengths) not in (3, 4):
            raise MediaError(f"{name}: declares {count} dimensions; expected 4, the volumes first")
        volumes, *sides = [1, *lengths] if len(lengths) == 3 else lengths
        dtype = _type_of(header, name)
        check_size(sides[::-1], dtype.itemsize * max(volumes, 1), name)
        if volumes < 1:
            raise MediaError(f"{name}: declares {volumes} volumes; expected at least one")
        _check_offset(header, name)
        if _scaling(header, name) is not None:
            raise MediaError(f"{name}: scaled values; expected label maps")
        shape = (*sides[::-1], volumes)  # the first axis of NIfTI is the fastest
        _check_cost(stream, header, shape, dtype, name)
        voxels = _voxels(stream, header, packed, shape, dtype, name)
    return np.moveaxis(voxels, -1, 0)


def check_nifti(path: Path, name: str) -> tuple[int, int, int]:
    """Check the whole header, and the size of an uncompressed file. Return the size (D, H, W).

    Raises `MediaError`.
    """
    with open_binary(path, name) as stream:
        header, packed = _read_header(stream, name)
        shape, dtype = _check(header, name)
        _check_cost(stream, header, shape, dtype, name)
    _geometry(header, name)
    needed, found = int(header.vox_offset) + math.prod(shape) * dtype.itemsize, path.stat().st_size
    if not packed and found < needed:
        raise MediaError(
            f"{name}: {found} bytes, but its header declares {needed}; the file is truncated"
        )
    return shape


def write_nifti(path: Path, voxels: np.ndarray, geometry: Geometry | None) -> None:
    """Write voxels (z, y, x) and their geometry as NIfTI-1, atomically and without any other field.

    Args:
        path: ends with .nii or .nii.gz, which is compressed.
        voxels: of a type that NIfTI has.
        geometry: becomes the sform; without it neither sform nor qform is set, as in a file without
            orientation.

    Raises:
        MediaError: another suffix, type or size than NIfTI-1 has.
        OSError: the file cannot be written.
    """
    name, lower = str(path), path.name.lower()
    if not lower.endswith((".nii", ".nii.gz")):
        raise MediaError(f"{name}: expected a name that ends with .nii or .nii.gz")
    code = next((code for code, kind in _TYPES.items() if np.dtype(kind) == voxels.dtype), None)
    if code is None or voxels.ndim != 3 or max(voxels.shape) >= 2**15:
        raise MediaError(
            f"{name}: NIfTI-1 holds three axes of less than 32768 numbers each; found "
            f"{voxels.shape} of {voxels.dtype}"
        )
    spacing = (1.0,) * 3 if geometry is None else tuple(geometry.spacing[::-1])
    rows = np.zeros((3, 4))
    if geometry is not None:
        rows = np.diag([-1.0, -1.0, 1.0]) @ np.column_stack(
            [geometry.steps[:, ::-1], geometry.origin]
        )
    values: dict[str, tuple[float, ...]] = {
        "dim": (3, *voxels.shape[::-1], 1, 1, 1, 1), "datatype": (code,),
            "bitpix": (voxels.dtype.itemsize * 8,),
        "pixdim": (1.0, *spacing, 0.0, 0.0, 0.0, 0.0), "vox_offset": (352,), "slope": (1.0,),
            "intercept": (0.0,),
        "units": (2,), "qform_code": (0,), "sform_code": (0 if geometry is None else 1,),
            "quaternion": (0.0,) * 6,
        "rows": tuple(rows.ravel()),
    }  # fmt: skip
    magic, at, layout = _LAYOUTS[348]
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    header[at : at + 3] = magic
    for key, (form, place) in layout.items():
        struct.pack_into(f"<{form}", header, place, *values[key])
    data = bytes(header) + voxels.astype(voxels.dtype.newbyteorder("<")).tobytes()
    with atomic_file(path) as temporary:
        temporary.write_bytes(gzip.compress(data, mtime=0) if lower.endswith(".gz") else data)


def _read_header(stream: BinaryIO, name: str) -> tuple[_Header, bool]:
    """Return the header, and whether the file is packed."""
    packed = stream.read(2) == b"\x1f\x8b"
    stream.seek(0)
    return _parse(_first_bytes(stream, packed, name), name), packed


def _first_bytes(stream: BinaryIO, packed: bool, name: str) -> bytes:
    try:
        data = (gzip.GzipFile(fileobj=stream) if packed else stream).read(540)
    except (OSError, EOFError, zlib.error) as error:
        raise MediaError(
            f"{name}: the packed file is truncated or damaged ({type(error).__name__})"
        ) from None
    if len(data) < 348:
        raise MediaError(
            f"{name}: {len(data)} bytes are too few for a NIfTI header; the file is empty or "
            "truncated"
        )
    return data.ljust(540, b"\0")


def _parse(data: bytes, name: str) -> _Header:
    for order in "<>":
        (size,) = struct.unpack_from(order + "i", data)
        magic, at, layout = _LAYOUTS.get(size, (b"", 0, {}))
        if magic and data[at : at + 3] == magic:
            fields = {
                key: struct.unpack_from(order + form, data, place)
                for key, (form, place) in layout.items()
            }
            values: dict[str, Any] = {
                key: value if len(value) > 1 else value[0] for key, value in fields.items()
            }
            return _Header(size=size, order=order, **values)
    if data[344:347] == b"ni1":
        raise MediaError(
            f"{name}: a NIfTI header without voxels (.hdr/.img pair); convert it to one .nii file"
        )
    raise MediaError(f"{name}: not a NIfTI file: no header of 348 or 540 bytes with its magic")


def _voxels(
    stream: BinaryIO,
    header: _Header,
    packed: bool,
    shape: tuple[int, ...],
    dtype: np.dtype,
    name: str,
) -> np.ndarray:
    """Return the stored numbers, not scaled."""
    start = int(header.vox_offset)
    if not packed:
        stream.seek(start)
        return read_voxels(stream, shape, dtype, "raw", name)
    # Header and voxels are one packed stream: both are unpacked, and the checksum covers both.
    stream.seek(0)
    data = read_voxels(
        stream, (start + math.prod(shape) * dtype.itemsize,), np.dtype("u1"), "gzip", name
    )
    return np.frombuffer(data.data, dtype=dtype, offset=start).reshape(shape)


def _type_of(header: _Header, name: str) -> np.dtype:
    if header.datatype not in _TYPES:
        raise MediaError(
            f"{name}: NIfTI datatype {header.datatype} (color or complex numbers) is not read"
        )
    dtype = np.dtype(header.order + _TYPES[header.datatype])
    if header.bitpix != dtype.itemsize * 8:
        raise MediaError(
            f"{name}: datatype {header.datatype} ({dtype.name}) has {dtype.itemsize * 8} bits, "
            f"but bitpix declares {header.bitpix}; the header is damaged"
        )
    return dtype


def _check_offset(header: _Header, name: str) -> None:
    offset = header.vox_offset
    if not (
        math.isfinite(offset) and header.size <= offset <= _MAX_OFFSET and offset == int(offset)
    ):
        raise MediaError(f"{name}: voxels begin at byte {offset:g} by the header; it is damaged")


def _check(header: _Header, name: str) -> tuple[tuple[int, int, int], np.dtype]:
    """Shape (z, y, x) and type, after every number in the header is checked."""
    count = header.dim[0]
    if not 1 <= count <= 7:
        raise MediaError(f"{name}: declares {count} dimensions; expected 3")
    lengths = list(header.dim[1 : count + 1])
    while len(lengths) > 3 and lengths[-1] == 1:
        lengths.pop()
    dtype = _type_of(header, name)
    check_size(lengths[::-1], dtype.itemsize, name)
    _check_offset(header, name)
    check_spacing(
        header.spacing,
        name,
        source=f" (pixdim {join_numbers(header.pixdim[1:4])} in {header.unit[0]})",
    )
    if header.units & 7 not in _UNITS:
        warn_of_file(
            logger,
            kind="NIfTI units",
            file=name,
            message=f"{name}: the unit {header.units & 7} of xyzt_units is not defined (1 m, 2 mm, "
            f"3 um); mm are taken: voxels of {join_numbers(header.spacing)} mm",
        )
    return (lengths[2], lengths[1], lengths[0]), dtype


def _check_cost(
    stream: BinaryIO, header: _Header, shape: tuple[int, ...], dtype: np.dtype, name: str
) -> None:
    is_scaled = _scaling(header, name) is not None
    held = os.fstat(stream.fileno()).st_size
    check_cost(shape, dtype, held=held, name=name, is_scaled=is_scaled)


def _scaling(header: _Header, name: str) -> tuple[float, float] | None:
    """Return slope and intercept; None if the stored numbers are the values.

    As nifti1_io and nibabel: a slope that is 0 or not finite is no scaling, whatever the intercept
    says. The two disagree about a valid slope beside an intercept that is not finite (0, and an
    error), so that is refused.
    """
    slope, intercept = header.slope, header.intercept
    if slope == 0 or not math.isfinite(slope):
        if math.isfinite(intercept) and intercept != 0:
            warn_of_file(
                logger,
                kind="NIfTI scaling",
                file=name,
                message=f"{name}: scl_slope {slope:g} means that the values are not scaled, so "
                f"scl_inter {intercept:g} is not added either, as the standard says",
            )
        return None
    if not math.isfinite(intercept):
        raise MediaError(
            f"{name}: scl_slope {slope:g} is valid, but scl_inter is {intercept:g}: expected a "
            "finite number; correct the header, or set scl_slope to 0 where the stored values "
            "are meant"
        )
    return None if (slope, intercept) == (1, 0) else (slope, intercept)


def _scaled(voxels: np.ndarray, header: _Header, name: str) -> np.ndarray:
    scaling = _scaling(header, name)
    if scaling is None:
        return voxels
    scaled = voxels.astype(np.float32)
    with np.errstate(
        over="ignore"
    ):  # what becomes infinite is counted and refused by `read_volume`
        scaled *= np.float32(scaling[0])
        scaled += np.float32(scaling[1])
    refuse_lost_values(
        voxels, scaled, name, f"scl_slope {scaling[0]:g} with scl_inter {scaling[1]:g}"
    )
    return scaled


def _geometry(header: _Header, name: str) -> Geometry | None:
    """Return the affine of the sform, else of the qform, as nibabel does; None without both."""
    unit = header.unit[1]
    to_lps = np.diag([-1.0, -1.0, 1.0])
    found = []
    if header.sform_code > 0:
        rows = np.asarray(header.rows, dtype=np.float64).reshape(3, 4)
        found.append((rows[:, :3], rows[:, 3]))
    if header.qform_code > 0:
        found.append(
            (
                _rotation(header, name) * np.abs(header.pixdim[1:4]),
                np.asarray(header.quaternion[3:]),
            )
        )
    geometries = [
        geometry_from_steps(to_lps @ steps * unit, to_lps @ offset * unit, name)
        for steps, offset in found
    ]
    if len(geometries) == 2:
        _compare(geometries[0], geometries[1], name)
    if header.sform_code > 0 and spacings_differ(geometries[0].spacing[::-1], header.spacing):
        warn_of_file(
            logger,
            kind="NIfTI spacing",
            file=name,
            message=f"{name}: voxels of {join_numbers(geometries[0].spacing[::-1])} mm by the sform"
            f", of {join_numbers(header.spacing)} mm by pixdim; the sform is used",
        )
    return geometries[0] if geometries else None


def _compare(sform: Geometry, qform: Geometry, name: str) -> None:
    """Compare sform and qform: refuse different sides, warn of different rotations."""
    if sform.axes != qform.axes:
        raise MediaError(
            f"{name}: sform says the axes are {sform.axes}, qform {qform.axes}: left and right "
            "cannot be known; correct the header"
        )
    turn = largest_turn(sform, qform)
    if turn > _TURN_DEGREES:
        warn_of_file(
            logger,
            kind="NIfTI direction",
            file=name,
            message=f"{name}: sform and qform are turned by {turn:.1f} degrees against each other "
            f"(tilted against the patient by {sform.tilt:.1f} and {qform.tilt:.1f} degrees); "
            "the sform is used",
        )


def _rotation(header: _Header, name: str) -> np.ndarray:
    b, c, d = header.quaternion[:3]
    rest = 1 - (b * b + c * c + d * d)
    if not math.isfinite(rest) or rest < -1e-3:
        raise MediaError(f"{name}: the quaternion of the header is not a rotation")
    if rest < 1e-7:  # half a turn: rounding may leave a vector that is not of unit length
        b, c, d = (value / math.sqrt(b * b + c * c + d * d) for value in (b, c, d))
    a = math.sqrt(max(rest, 0.0)) if rest >= 1e-7 else 0.0
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
