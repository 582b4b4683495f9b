"""MetaImage: one file (.mha), or a header (.mhd) with voxels in a file beside it; raw or zlib."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import BinaryIO

import numpy as np

from medm.errors import MediaError
from medm.imaging.geometry import (
    Geometry,
    check_size,
    check_spacing,
    geometry_from_steps,
    join_numbers,
)
from medm.imaging.notices import warn_of_file
from medm.imaging.payload import sibling
from medm.imaging.text_header import Fields, Layout, TextHeaderFormat

logger = logging.getLogger(__name__)

_MAX_HEADER = 2**16
_USED = {
    "NDims", "DimSize", "ElementType", "ElementSpacing", "ElementSize", "ElementNumberOfChannels",
    "TransformMatrix",
    "Orientation", "Rotation", "Offset", "Origin", "Position", "BinaryData",
    "BinaryDataByteOrderMSB",
    "ElementByteOrderMSB", "CompressedData", "HeaderSize", "AnatomicalOrientation", "DistanceUnits",
    "ElementToIntensityFunctionSlope", "ElementToIntensityFunctionOffset",
}  # fmt: skip
"""Fields that are read."""
_MILLIMETERS = {"?": 1.0, "mm": 1.0, "cm": 10.0, "um": 0.001}
_OPPOSITE = dict(zip("LRPASI", "RLAPIS", strict=True))
_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4",
        "MET_UINT": "u4",
    "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip


def _data_file(fields: Fields, path: Path, name: str) -> Path | None:
    file = fields["ElementDataFile"]
    return None if file.upper() == "LOCAL" else sibling(path, file, name, header=".mhd")


def _fields(stream: BinaryIO, name: str) -> Fields:
    fields: Fields = {}
    while stream.tell() < _MAX_HEADER:
        line = stream.readline(_MAX_HEADER)
        key, equals, value = line.decode("latin-1").partition("=")
        if not line or not equals:
            break
        if fields.setdefault(key.strip(), value.strip()) != value.strip() and key.strip() in _USED:
            raise MediaError(
                f"{name}: the MetaImage header has '{key.strip()}' twice, with different values"
            )
        if key.strip() == "ElementDataFile":
            return fields
    raise MediaError(f"{name}: not a MetaImage: its header does not end with ElementDataFile")


def _layout(fields: Fields, name: str) -> Layout:
    for key in ("NDims", "DimSize", "ElementType"):
        if key not in fields:
            raise MediaError(f"{name}: the MetaImage header lacks '{key}'")
    if fields["ElementType"] not in _TYPES:
        raise MediaError(
            f"{name}: a MetaImage ElementType is declared that is not read; expected plain numbers"
        )
    if fields.get("ElementNumberOfChannels", "1") != "1":
        raise MediaError(
            f"{name}: a MetaImage with several numbers a voxel is not read; expected one"
        )
    if not _true(fields, "BinaryData", default="True") or fields.get("HeaderSize", "0") != "0":
        raise MediaError(
            f"{name}: MetaImages of text, or with a HeaderSize other than 0, are not read"
        )
    _check_intensity(fields, name)
    try:
        sizes = [int(size) for size in fields["DimSize"].split()]
    except ValueError:
        raise MediaError(
            f"{name}: the MetaImage field 'DimSize' does not hold whole numbers"
        ) from None
    if fields["NDims"] != str(len(sizes)):
        raise MediaError(
            f"{name}: the MetaImage header declares another NDims than its {len(sizes)} sizes"
        )
    dtype = np.dtype(_TYPES[fields["ElementType"]])
    orders = {
        _true(fields, key)
        for key in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
        if key in fields
    }
    if len(orders) > 1 and dtype.itemsize > 1:
        raise MediaError(
            f"{name}: BinaryDataByteOrderMSB and ElementByteOrderMSB of the MetaImage header "
            "contradict each other; the byte order is not known"
        )
    dtype = dtype.newbyteorder(">" if True in orders else "<")
    check_size(sizes[::-1], dtype.itemsize, name)
    return Layout(tuple(sizes[::-1]), dtype, "zlib" if _true(fields, "CompressedData") else "raw")


def _check_intensity(fields: Fields, name: str) -> None:
    """Refuse a scale of the stored values that common readers, ITK among them, do not apply."""
    slope, offset = (
        _numbers(fields, key, name) if key in fields else [default]
        for key, default in (
            ("ElementToIntensityFunctionSlope", 1.0),
            ("ElementToIntensityFunctionOffset", 0.0),
        )
    )
    if (slope, offset) != ([1.0], [0.0]):
        raise MediaError(
            f"{name}: the MetaImage header declares intensities of {join_numbers(slope)} times "
            f"the stored values plus {join_numbers(offset)}, which most programs do not apply; "
            "store the values that are meant"
        )


def _geometry(fields: Fields, name: str) -> Geometry | None:
    # ElementSize is the size of a voxel, which gaps between slices make smaller than the distance.
    spacing = next(
        (_numbers(fields, key, name) for key in ("ElementSpacing", "ElementSize") if key in fields),
        None,
    )
    if spacing is None or len(spacing) != 3:
        raise MediaError(f"{name}: the MetaImage header lacks an ElementSpacing of three numbers")
    unit = _MILLIMETERS.get(fields.get("DistanceUnits", "?").lower())
    if unit is None:
        raise MediaError(
            f"{name}: DistanceUnits of the MetaImage header is not known; expected mm, cm or um"
        )
    spacing = [value * unit for value in spacing]
    check_spacing(spacing, name)
    columns = _agreed(fields, ("TransformMatrix", "Orientation", "Rotation"), name)
    origin = _agreed(fields, ("Offset", "Origin", "Position"), name) or [0.0] * 3
    if columns is None:
        return None
    if len(columns) != 9 or len(origin) != 3:
        raise MediaError(
            f"{name}: the MetaImage header needs nine numbers of direction and three of origin"
        )
    directions = np.asarray(columns).reshape(3, 3).T  # stored axis by axis
    lengths = np.linalg.norm(directions, axis=0)
    if not np.allclose(lengths, 1, atol=1e-2):
        raise MediaError(
            f"{name}: the direction of the MetaImage header is not made of unit vectors; it is "
            "singular or scaled"
        )
    geometry = geometry_from_steps(
        directions / lengths * np.asarray(spacing), np.asarray(origin) * unit, name
    )
    _compare_orientation(fields, geometry, name)
    return geometry


def _agreed(fields: Fields, keys: tuple[str, ...], name: str) -> list[float] | None:
    """Return the numbers of synonymous fields; None if all are absent. Raises `MediaError`."""
    found = {key: _numbers(fields, key, name) for key in keys if key in fields}
    for key, numbers in found.items():
        first = next(iter(found))
        if len(numbers) != len(found[first]) or not np.allclose(
            numbers, found[first], atol=1e-3, equal_nan=True
        ):
            raise MediaError(
                f"{name}: {first} {join_numbers(found[first])} and {key} {join_numbers(numbers)} "
                "of the MetaImage header mean the same and contradict each other; remove the "
                "wrong one"
            )
    return next(iter(found.values()), None)


def _compare_orientation(fields: Fields, geometry: Geometry, name: str) -> None:
    """Warn of axis letters that contradict the matrix; the matrix is used."""
    letters = fields.get("AnatomicalOrientation", "").upper()
    own = "".join(_OPPOSITE[letter] for letter in reversed(geometry.axes))
    if len(letters) == 3 and set(letters) <= set(_OPPOSITE) and letters != own:
        warn_of_file(
            logger,
            kind="MetaImage orientation",
            file=name,
            message=f"{name}: the axes begin at {own} by TransformMatrix, at {letters} by "
            "AnatomicalOrientation; TransformMatrix is used. Look at left and right with "
            "`medm data preview`",
        )


def _true(fields: Fields, key: str, default: str = "False") -> bool:
    return fields.get(key, default).lower() in ("true", "1")


def _numbers(fields: Fields, key: str, name: str) -> list[float]:
    try:
        return [float(word) for word in fields[key].split()]
    except ValueError:
        raise MediaError(f"{name}: the MetaImage field '{key}' does not hold numbers") from None


METAIMAGE = TextHeaderFormat(
    fields=_fields, layout=_layout, geometry=_geometry, detached=_data_file
)
"""MetaImage files."""
