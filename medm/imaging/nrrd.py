"""NRRD, attached (.nrrd) or with the voxels in a file beside it (.nhdr); raw or gzip."""

from __future__ import annotations

import re
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
    spacings_differ,
)
from medm.imaging.payload import Packing, sibling
from medm.imaging.text_header import Fields, Layout, TextHeaderFormat

_MAX_HEADER = 2**16
_USED = {
    "type", "dimension", "sizes", "encoding", "endian", "kinds", "space", "spacedimension",
    "spacedirections",
    "spaceorigin", "spaceunits", "spacings", "units", "datafile", "lineskip", "byteskip",
}  # fmt: skip
"""Fields that are read, without spaces."""
_TYPES = {
    "signed char": "i1", "int8": "i1", "int8_t": "i1", "uchar": "u1", "unsigned char": "u1",
        "uint8": "u1",
    "uint8_t": "u1", "short": "i2", "short int": "i2", "signed short": "i2",
        "signed short int": "i2", "int16": "i2",
    "int16_t": "i2", "ushort": "u2", "unsigned short": "u2", "unsigned short int": "u2",
        "uint16": "u2",
    "uint16_t": "u2", "int": "i4", "signed int": "i4", "int32": "i4", "int32_t": "i4", "uint": "u4",
    "unsigned int": "u4", "uint32": "u4", "uint32_t": "u4", "longlong": "i8", "long long": "i8",
    "long long int": "i8", "signed long long": "i8", "signed long long int": "i8", "int64": "i8",
        "int64_t": "i8",
    "ulonglong": "u8", "unsigned long long": "u8", "unsigned long long int": "u8", "uint64": "u8",
        "uint64_t": "u8",
    "float": "f4", "double": "f8",
}  # fmt: skip
_TO_LPS = {
    "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1), "right-anterior-superior": (-1, -1, 1),
    "ras": (-1, -1, 1), "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1),
}  # fmt: skip
_MILLIMETERS = {
    "": 1.0, "???": 1.0, "mm": 1.0, "millimeter": 1.0, "millimeters": 1.0, "millimetre": 1.0,
        "millimetres": 1.0,
    "cm": 10.0, "centimeter": 10.0, "centimeters": 10.0, "m": 1000.0, "meter": 1000.0,
        "meters": 1000.0,
    "um": 0.001, "\xb5m": 0.001, "micron": 0.001, "microns": 0.001, "micrometer": 0.001,
        "micrometers": 0.001,
}  # fmt: skip
_SPATIAL_KINDS = {"domain", "space", "none", "???"}
_OTHER_KINDS = {
    "time", "list", "point", "vector", "covariant-vector", "normal", "stub", "scalar", "complex",
    "2-vector",
    "3-color", "rgb-color", "hsv-color", "xyz-color", "4-color", "rgba-color", "3-vector",
    "3-gradient", "3-normal",
    "4-vector", "quaternion", "2d-symmetric-matrix", "2d-masked-symmetric-matrix", "2d-matrix",
    "2d-masked-matrix",
    "3d-symmetric-matrix", "3d-masked-symmetric-matrix", "3d-matrix", "3d-masked-matrix",
}  # fmt: skip
"""Fields that messages may quote; any other text may be patient data."""
_PACKINGS: dict[str, Packing] = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}


def _data_file(fields: Fields, path: Path, name: str) -> Path | None:
    file = fields.get("datafile")
    return None if file is None else sibling(path, file, name, header=".nhdr")


def _fields(stream: BinaryIO, name: str) -> Fields:
    """Return the fields that describe the array, without comments and key:=value pairs.

    Names are in small letters without spaces: "data file" and "datafile" are the same.
    """
    if not stream.readline(16).startswith(b"NRRD000"):
        raise MediaError(f"{name}: not an NRRD file: its first line is not NRRD000x")
    fields: Fields = {}
    while stream.tell() < _MAX_HEADER:
        line = stream.readline(_MAX_HEADER)
        if line.strip() == b"":
            return fields
        text = line.decode("latin-1").strip()
        key, colon, value = text.partition(":")
        if colon and not text.startswith("#") and not value.startswith("="):
            key = "".join(key.lower().split())
            if fields.setdefault(key, value.strip()) != value.strip() and key in _USED:
                raise MediaError(
                    f"{name}: the NRRD header has the field '{key}' twice, with different values"
                )
    raise MediaError(f"{name}: the NRRD header does not end within {_MAX_HEADER} bytes")


def _layout(fields: Fields, name: str) -> Layout:
    for key in ("type", "dimension", "sizes", "encoding"):
        if key not in fields:
            raise MediaError(f"{name}: the NRRD header lacks the field '{key}'")
    kind, encoding = fields["type"].lower(), fields["encoding"].lower()
    if kind not in _TYPES:
        raise MediaError(
            f"{name}: an NRRD type is declared that is not read; expected plain numbers"
        )
    if encoding not in _PACKINGS:
        raise MediaError(
            f"{name}: an NRRD encoding is declared that is not read; expected raw or gzip"
        )
    try:
        sizes = [int(size) for size in fields["sizes"].split()]
    except ValueError:
        raise MediaError(f"{name}: the NRRD field 'sizes' does not hold whole numbers") from None
    if fields["dimension"] != str(len(sizes)):
        raise MediaError(
            f"{name}: the NRRD header declares another dimension than its {len(sizes)} sizes"
        )
    dtype = np.dtype(_TYPES[kind])
    if dtype.itemsize > 1:
        endian = fields.get("endian", "").lower()
        if endian not in ("little", "big"):
            raise MediaError(
                f"{name}: the NRRD field 'endian' is missing or neither little nor big"
            )
        dtype = dtype.newbyteorder("<" if endian == "little" else ">")
    check_size(sizes[::-1], dtype.itemsize, name)
    _check_kinds(fields, name)
    if any(fields.get(key, "0") != "0" for key in ("lineskip", "byteskip")):
        raise MediaError(
            f"{name}: NRRD files that skip lines or bytes before their voxels are not read; "
            "expected 'line skip' and 'byte skip' of 0"
        )
    return Layout(tuple(sizes[::-1]), dtype, _PACKINGS[encoding])


def _check_kinds(fields: Fields, name: str) -> None:
    """Refuse axes that do not lie in space: colors, vectors, time."""
    kinds = fields.get("kinds", "").lower().split()
    other = [(axis, kind) for axis, kind in enumerate(kinds) if kind not in _SPATIAL_KINDS]
    if other:
        axis, kind = other[0]
        found = f"'{kind}'" if kind in _OTHER_KINDS else "a kind that is not known"
        raise MediaError(
            f"{name}: axis {axis + 1} of the NRRD file is {found} by the field 'kinds'; expected "
            "'domain' or 'space' for all three. Extract one volume of plain numbers"
        )


def _geometry(fields: Fields, name: str) -> Geometry | None:
    """Return the geometry of voxel centers, for 'centers' cell and node (format, section 4)."""
    signs = _TO_LPS.get(fields.get("space", "").lower())
    vectors = re.findall(r"\(([^)]*)\)", fields.get("spacedirections", ""))
    if signs is None or not vectors:
        if "spacings" in fields:
            check_spacing(_spacings(fields, name), name)
        return None
    if fields.get("spacedimension", "3") != "3":
        raise MediaError(
            f"{name}: the NRRD header names a space of the patient and another 'space dimension' "
            "than 3"
        )
    units = _units(fields, "spaceunits", name)
    scale = np.asarray(signs, dtype=np.float64) * units
    steps = [_numbers(vector.split(","), "space directions", name) for vector in vectors]
    origin = np.asarray(
        _numbers(fields.get("spaceorigin", "(0,0,0)").strip("() ").split(","), "space origin", name)
    )
    if [len(step) for step in steps] != [3, 3, 3] or origin.shape != (3,):
        raise MediaError(
            f"{name}: the NRRD header needs three space directions of three numbers and such an "
            "origin"
        )
    geometry = geometry_from_steps((np.asarray(steps) * scale).T, origin * scale, name)
    if "spacings" in fields:
        spacings = _spacings(fields, name)
        if spacings_differ(spacings, geometry.spacing[::-1]):
            raise MediaError(
                f"{name}: voxels of {join_numbers(geometry.spacing[::-1])} mm by 'space "
                f"directions', of {join_numbers(spacings)} mm by 'spacings', which may not stand "
                "beside each other; remove one of them"
            )
    return geometry


def _spacings(fields: Fields, name: str) -> list[float]:
    """Return the field 'spacings' in mm."""
    spacings = _numbers(fields["spacings"].split(), "spacings", name)
    if len(spacings) != 3:
        raise MediaError(
            f"{name}: the NRRD field 'spacings' holds {len(spacings)} numbers; expected 3"
        )
    return [
        value * unit for value, unit in zip(spacings, _units(fields, "units", name), strict=True)
    ]


def _units(fields: Fields, field: str, name: str) -> list[float]:
    """Length in mm of the unit along each of three axes; mm where the header names none."""
    words = re.findall(r'"([^"]*)"', fields.get(field, ""))
    lengths = [_MILLIMETERS.get(word.strip().lower()) for word in words] or [1.0] * 3
    if len(lengths) != 3 or None in lengths:
        raise MediaError(
            f"{name}: the NRRD field '{field}' holds {len(words)} units, of which "
            f"{lengths.count(None)} are not known; "
            'expected three of "mm", "cm", "m" and "um"'
        )
    return [length for length in lengths if length is not None]


def _numbers(words: list[str], field: str, name: str) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError:
        raise MediaError(f"{name}: the NRRD field '{field}' does not hold numbers") from None


NRRD = TextHeaderFormat(fields=_fields, layout=_layout, geometry=_geometry, detached=_data_file)
"""NRRD files; their geometry is None where the header names no space of the patient."""
