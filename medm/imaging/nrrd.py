"""NRRD, attached (.nrrd) or with the voxels in a file beside it (.nhdr); raw or gzip."""

from __future__ import annotations

import re
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
    "signed char": "i1", "int8": "i1", "int8_t": "i1", "uchar": "u1", "unsigned char": "u1", "uint8": "u1",
    "uint8_t": "u1", "short": "i2", "short int": "i2", "signed short": "i2", "signed short int": "i2", "int16": "i2",
    "int16_t": "i2", "ushort": "u2", "unsigned short": "u2", "unsigned short int": "u2", "uint16": "u2",
    "uint16_t": "u2", "int": "i4", "signed int": "i4", "int32": "i4", "int32_t": "i4", "uint": "u4",
    "unsigned int": "u4", "uint32": "u4", "uint32_t": "u4", "longlong": "i8", "long long": "i8",
    "long long int": "i8", "signed long long": "i8", "signed long long int": "i8", "int64": "i8", "int64_t": "i8",
    "ulonglong": "u8", "unsigned long long": "u8", "unsigned long long int": "u8", "uint64": "u8", "uint64_t": "u8",
    "float": "f4", "double": "f8",
}  # fmt: skip
_TO_LPS = {
    "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1), "right-anterior-superior": (-1, -1, 1),
    "ras": (-1, -1, 1), "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1),
}  # fmt: skip
_PACKINGS: dict[str, Packing] = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}


def read_nrrd(path: Path, name: str) -> tuple[np.ndarray, Geometry | None]:
    """Voxels (z, y, x) and their geometry; None where the header names no space of the patient.

    Raises:
        MediaError: truncated, damaged, of a kind that is not read, or with impossible numbers in its header.
    """
    with _at_voxels(path, name) as (stream, fields):
        return read_voxels(stream, *_layout(fields, name), name), _geometry(fields, name)


def check_nrrd(path: Path, name: str) -> None:
    """Check the header, and the length of voxels that are not packed. Raises `MediaError` as `read_nrrd`."""
    with _at_voxels(path, name) as (stream, fields):
        check_length(stream, *_layout(fields, name), name)


@contextmanager
def _at_voxels(path: Path, name: str) -> Iterator[tuple[BinaryIO, dict[str, str]]]:
    """The file that holds the voxels, before the first one, and the fields of the header, which were checked."""
    with open_binary(path, name) as stream:
        fields = _fields(stream, name)
        _layout(fields, name)
        _geometry(fields, name)
        if any(fields.get(key, "0") != "0" for key in ("line skip", "lineskip", "byte skip", "byteskip")):
            raise MediaError(f"{name}: NRRD files that skip lines or bytes are not read")
        beside = _data_file(fields, path, name)
        if beside is None:
            yield stream, fields
            return
    with open_binary(beside, name) as stream:
        yield stream, fields


def data_file(path: Path, name: str) -> Path | None:
    """Where the voxels lie, if not in the file itself. Raises `MediaError` as `read_nrrd`."""
    with open_binary(path, name) as stream:
        return _data_file(_fields(stream, name), path, name)


def _data_file(fields: dict[str, str], path: Path, name: str) -> Path | None:
    file = fields.get("data file") or fields.get("datafile")
    return None if file is None else sibling(path, file, name, header=".nhdr")


def _fields(stream: BinaryIO, name: str) -> dict[str, str]:
    """The fields that describe the array, without comments and key:=value pairs, which may hold a patient's data."""
    if not stream.readline(16).startswith(b"NRRD000"):
        raise MediaError(f"{name}: not an NRRD file: its first line is not NRRD000x")
    fields: dict[str, str] = {}
    while stream.tell() < _MAX_HEADER:
        line = stream.readline(_MAX_HEADER)
        if line.strip() == b"":
            return fields
        text = line.decode("latin-1").strip()
        key, colon, value = text.partition(":")
        if colon and not text.startswith("#") and not value.startswith("="):
            fields[key.strip().lower()] = value.strip()
    raise MediaError(f"{name}: the NRRD header does not end within {_MAX_HEADER} bytes")


def _layout(fields: dict[str, str], name: str) -> tuple[tuple[int, ...], np.dtype, Packing]:
    for key in ("type", "dimension", "sizes", "encoding"):
        if key not in fields:
            raise MediaError(f"{name}: the NRRD header lacks the field '{key}'")
    kind, encoding = fields["type"].lower(), fields["encoding"].lower()
    if kind not in _TYPES:
        raise MediaError(f"{name}: an NRRD type is declared that is not read; expected plain numbers")
    if encoding not in _PACKINGS:
        raise MediaError(f"{name}: an NRRD encoding is declared that is not read; expected raw or gzip")
    try:
        sizes = [int(size) for size in fields["sizes"].split()]
    except ValueError:
        raise MediaError(f"{name}: the NRRD field 'sizes' does not hold whole numbers") from None
    if fields["dimension"] != str(len(sizes)):
        raise MediaError(f"{name}: the NRRD header declares another dimension than its {len(sizes)} sizes")
    dtype = np.dtype(_TYPES[kind])
    if dtype.itemsize > 1:
        endian = fields.get("endian", "").lower()
        if endian not in ("little", "big"):
            raise MediaError(f"{name}: the NRRD field 'endian' is missing or neither little nor big")
        dtype = dtype.newbyteorder("<" if endian == "little" else ">")
    check_size(sizes[::-1], dtype.itemsize, name)
    return tuple(sizes[::-1]), dtype, _PACKINGS[encoding]


def _geometry(fields: dict[str, str], name: str) -> Geometry | None:
    signs = _TO_LPS.get(fields.get("space", "").lower())
    vectors = re.findall(r"\(([^)]*)\)", fields.get("space directions", ""))
    if signs is None or not vectors:
        if "spacings" in fields:
            check_spacing(_numbers(fields["spacings"].split(), "spacings", name), name)
        return None
    flip = np.asarray(signs, dtype=np.float64)
    steps = [_numbers(vector.split(","), "space directions", name) for vector in vectors]
    origin = np.asarray(_numbers(fields.get("space origin", "(0,0,0)").strip("() ").split(","), "space origin", name))
    if [len(step) for step in steps] != [3, 3, 3] or origin.shape != (3,):
        raise MediaError(f"{name}: the NRRD header needs three space directions of three numbers and such an origin")
    return geometry_from_steps((np.asarray(steps) * flip).T, origin * flip, name)


def _numbers(words: list[str], field: str, name: str) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError:
        raise MediaError(f"{name}: the NRRD field '{field}' does not hold numbers") from None
