"""MetaImage, one file (.mha) or a header with the voxels in a file beside it (.mhd); raw or zlib."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from medm.errors import MediaError
from medm.imaging.geometry import Geometry, check_size, check_spacing, geometry_from_steps
from medm.imaging.payload import Packing, check_length, open_binary, read_voxels, sibling

_MAX_HEADER = 2**16
_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip


def read_metaimage(path: Path, name: str) -> tuple[np.ndarray, Geometry | None]:
    """Voxels (z, y, x) and their geometry; None where the header gives no direction.

    Raises:
        MediaError: truncated, damaged, of a kind that is not read, or with impossible numbers in its header.
    """
    with _at_voxels(path, name) as (stream, fields):
        return read_voxels(stream, *_layout(fields, name), _packing(fields), name), _geometry(fields, name)


def check_metaimage(path: Path, name: str) -> None:
    """Check the header, and the length of voxels that are not packed. Raises `MediaError` as `read_metaimage`."""
    with _at_voxels(path, name) as (stream, fields):
        check_length(stream, *_layout(fields, name), _packing(fields), name)


@contextmanager
def _at_voxels(path: Path, name: str) -> Iterator[tuple[BinaryIO, dict[str, str]]]:
    """The file that holds the voxels, before the first one, and the fields of the header, which were checked."""
    with open_binary(path, name) as stream:
        fields = _fields(stream, name)
        _layout(fields, name)
        _geometry(fields, name)
        beside = _data_file(fields, path, name)
        if beside is None:
            yield stream, fields
            return
    with open_binary(beside, name) as stream:
        yield stream, fields


def _packing(fields: dict[str, str]) -> Packing:
    return "zlib" if _true(fields, "CompressedData") else "raw"


def data_file(path: Path, name: str) -> Path | None:
    """Where the voxels lie, if not in the file itself. Raises `MediaError` as `read_metaimage`."""
    with open_binary(path, name) as stream:
        return _data_file(_fields(stream, name), path, name)


def _data_file(fields: dict[str, str], path: Path, name: str) -> Path | None:
    file = fields["ElementDataFile"]
    return None if file.upper() == "LOCAL" else sibling(path, file, name, header=".mhd")


def _fields(stream: BinaryIO, name: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    while stream.tell() < _MAX_HEADER:
        line = stream.readline(_MAX_HEADER)
        key, equals, value = line.decode("latin-1").partition("=")
        if not line or not equals:
            break
        fields[key.strip()] = value.strip()
        if key.strip() == "ElementDataFile":
            return fields
    raise MediaError(f"{name}: not a MetaImage: its header does not end with ElementDataFile")


def _layout(fields: dict[str, str], name: str) -> tuple[tuple[int, ...], np.dtype]:
    for key in ("NDims", "DimSize", "ElementType"):
        if key not in fields:
            raise MediaError(f"{name}: the MetaImage header lacks '{key}'")
    if fields["ElementType"] not in _TYPES:
        raise MediaError(f"{name}: a MetaImage ElementType is declared that is not read; expected plain numbers")
    if fields.get("ElementNumberOfChannels", "1") != "1":
        raise MediaError(f"{name}: a MetaImage with several numbers a voxel is not read; expected one")
    if not _true(fields, "BinaryData", default="True") or fields.get("HeaderSize", "0") != "0":
        raise MediaError(f"{name}: MetaImages of text, or with a HeaderSize, are not read")
    try:
        sizes = [int(size) for size in fields["DimSize"].split()]
    except ValueError:
        raise MediaError(f"{name}: the MetaImage field 'DimSize' does not hold whole numbers") from None
    if fields["NDims"] != str(len(sizes)):
        raise MediaError(f"{name}: the MetaImage header declares another NDims than its {len(sizes)} sizes")
    big = any(_true(fields, key) for key in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"))
    dtype = np.dtype(_TYPES[fields["ElementType"]]).newbyteorder(">" if big else "<")
    check_size(sizes[::-1], dtype.itemsize, name)
    return tuple(sizes[::-1]), dtype


def _geometry(fields: dict[str, str], name: str) -> Geometry | None:
    spacing = next((_numbers(fields, key, name) for key in ("ElementSpacing", "ElementSize") if key in fields), None)
    if spacing is None or len(spacing) != 3:
        raise MediaError(f"{name}: the MetaImage header lacks an ElementSpacing of three numbers")
    check_spacing(spacing, name)
    matrix = next((key for key in ("TransformMatrix", "Orientation", "Rotation") if key in fields), None)
    if matrix is None:
        return None
    origin = next((_numbers(fields, key, name) for key in ("Offset", "Origin", "Position") if key in fields), [0.0] * 3)
    columns = _numbers(fields, matrix, name)
    if len(columns) != 9 or len(origin) != 3:
        raise MediaError(f"{name}: the MetaImage header needs nine numbers of direction and three of origin")
    unit = np.asarray(columns).reshape(3, 3).T  # stored axis by axis
    lengths = np.linalg.norm(unit, axis=0)
    if not np.allclose(lengths, 1, atol=1e-2):
        raise MediaError(
            f"{name}: the direction of the MetaImage header is not made of unit vectors; it is singular or scaled"
        )
    return geometry_from_steps(unit / lengths * np.asarray(spacing), np.asarray(origin), name)


def _true(fields: dict[str, str], key: str, default: str = "False") -> bool:
    return fields.get(key, default).lower() in ("true", "1")


def _numbers(fields: dict[str, str], key: str, name: str) -> list[float]:
    try:
        return [float(word) for word in fields[key].split()]
    except ValueError:
        raise MediaError(f"{name}: the MetaImage field '{key}' does not hold numbers") from None
