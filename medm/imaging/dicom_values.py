"""Stored DICOM numbers to values, and values to gray levels: PS3.3 C.11.1, C.11.2, C.7.6.16.

The modality transform (a table, or slope and intercept) gives values with a meaning: Hounsfield
units, optical density. The VOI transform (a table, or a window with its function) gives gray levels
from black to white. Table descriptors are untrusted input, so they are checked against the data
before use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from medm.errors import MediaError
from medm.imaging.damage import DECODE_ERRORS

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_Number: TypeAlias = float | str | Sequence[float] | None
"""A decimal string of a header as pydicom gives it; a sequence where the element holds several."""

_FUNCTIONS: tuple[Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"], ...] = (
    "LINEAR",
    "LINEAR_EXACT",
    "SIGMOID",
)


@dataclass(frozen=True, slots=True)
class LookupTable:
    """A modality or VOI table."""

    first: int
    """Input of the first entry; inputs outside the table take its first or last entry."""
    entries: np.ndarray
    """(N,) uint16."""
    bits: int
    """Of an entry; the output range is 0 to 2**bits - 1."""

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Entries for whole numbers, as int32."""
        places = np.clip(values.astype(np.int64) - self.first, 0, len(self.entries) - 1)
        return self.entries.astype(np.int32)[places]

    @property
    def top(self) -> int:
        """Largest output that the entries may have."""
        return int(2**self.bits - 1)


@dataclass(frozen=True, slots=True)
class Voi:
    """A VOI transform, other than the linear window that `linear_window` expresses."""

    table: LookupTable | None = None
    center: float = 0.0
    width: float = 1.0
    """Of the sigmoid function, where there is no table."""

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Shades in 0..1, float32."""
        if self.table is not None:
            whole = np.rint(values.astype(np.float64))
            return self.table.apply(whole).astype(np.float32) / np.float32(self.table.top)
        exponent = -4 * (values.astype(np.float64) - self.center) / self.width
        return (1 / (1 + np.exp(np.clip(exponent, -700, 700)))).astype(np.float32)

    def __str__(self) -> str:
        if self.table is not None:
            return f"VOI LUT of {len(self.table.entries)} entries from {self.table.first}"
        return f"sigmoid around {self.center:g}, width {self.width:g}"


def read_table(item: Dataset, name: str, *, element: str, signed: bool, order: str) -> LookupTable:
    """Read and check one item of a Modality LUT Sequence or VOI LUT Sequence.

    Args:
        item: the pydicom data set.
        name: the file, for messages.
        element: name and tag of the sequence, for messages.
        signed: whether inputs of the table can be negative.
        order: "<" or ">", of tables that are stored as bytes.

    Raises:
        MediaError: a descriptor or data that are missing or do not fit together.
    """
    descriptor = stored_numbers(item, 0x00283002, order)
    if descriptor is None or descriptor.shape != (3,):
        raise MediaError(
            f"{name}: DICOM {element}: LUTDescriptor (0028,3002) does not hold three numbers"
        )
    count = int(descriptor[0]) % 65536 or 65536
    first = (
        as_stored(int(descriptor[1]), signed=signed)
        if int(descriptor[1]) >= 0
        else int(descriptor[1])
    )
    bits = int(descriptor[2])
    if not 8 <= bits <= 16:
        raise MediaError(
            f"{name}: DICOM {element}: LUTDescriptor (0028,3002) declares entries of {bits} bits; "
            "expected 8 to 16"
        )
    data = item[0x00283006].value if 0x00283006 in item else None
    entries = _entries(data, count, bits, order)
    if entries is None:
        found = 0 if data is None else len(data) if hasattr(data, "__len__") else 1
        unit = "bytes" if isinstance(data, bytes) else "entries"
        raise MediaError(
            f"{name}: DICOM {element}: LUTDescriptor (0028,3002) declares {count} entries of "
            f"{bits} bits, LUTData (0028,3006) holds {found} {unit}"
        )
    if int(entries.max()) >= 2**bits:
        raise MediaError(
            f"{name}: DICOM {element}: LUTDescriptor (0028,3002) declares entries of {bits} bits, "
            f"LUTData (0028,3006) holds {int(entries.max())}"
        )
    return LookupTable(first, entries, bits)


def _entries(data: object, count: int, bits: int, order: str) -> np.ndarray | None:
    """Return the table (count,) as uint16; None if it does not fit. 8-bit entries may be packed."""
    packed = (count + 1) // 2
    if isinstance(data, bytes):
        if len(data) == 2 * count:
            return np.frombuffer(data, f"{order}u2").astype(np.uint16)
        if bits == 8 and len(data) == 2 * packed:
            words = np.frombuffer(data, f"{order}u2").astype("<u2")
            return words.view(np.uint8)[:count].astype(np.uint16)
        return None
    values = (
        np.atleast_1d(np.asarray(data, dtype=np.int64))
        if data is not None
        else np.zeros(0, np.int64)
    )
    if values.min(initial=0) < -(2**15) or values.max(initial=0) > 65535:
        return None
    if values.shape == (count,):
        return (values % 65536).astype(np.uint16)
    if bits == 8 and values.shape == (packed,):
        return (values % 65536).astype("<u2").view(np.uint8)[:count].astype(np.uint16)
    return None


def stored_numbers(dataset: Dataset, tag: int, order: str) -> np.ndarray | None:
    """Return the numbers of a US or SS element as int64; None if it is missing or empty.

    In implicit VR the file does not say which of the two it is, and pydicom leaves the bytes.
    """
    if tag not in dataset:
        return None
    try:
        value = dataset[tag].value
        if isinstance(value, bytes):
            return np.frombuffer(value, f"{order}u2").astype(np.int64) if value else None
        return (
            None
            if value is None or value == ""
            else np.atleast_1d(np.asarray(value, dtype=np.int64))
        )
    except DECODE_ERRORS:
        return None


def as_stored(number: int, *, signed: bool) -> int:
    """A 16-bit number as signed or unsigned; writers use the wrong one of US and SS."""
    number %= 65536
    return number - 65536 if signed and number >= 32768 else number


def read_window(
    center: _Number, width: _Number, function: str
) -> tuple[tuple[float, float] | Voi | None, str]:
    """Return the first window of a file, linear or sigmoid; None with a reason if it has none.

    Args:
        center: value of WindowCenter; several windows are alternatives, of which the first is
            taken.
        width: value of WindowWidth.
        function: value of VOILUTFunction; "LINEAR" where the file has none.
    """
    if center in (None, "") and width in (None, ""):
        return None, ""
    values = []
    for keyword, value in (
        ("WindowCenter (0028,1050)", center),
        ("WindowWidth (0028,1051)", width),
    ):
        if value is None:
            return None, f"{keyword} without a number"
        try:
            values.append(float(value if isinstance(value, (int, float, str)) else value[0]))
        except DECODE_ERRORS:
            return None, f"{keyword} without a number"
        if not math.isfinite(values[-1]):
            return None, f"{keyword} that is not finite"
    middle, extent = values
    if function not in _FUNCTIONS:
        return None, "a window with an unknown VOILUTFunction (0028,1056)"
    if extent < 1 if function == "LINEAR" else extent <= 0:
        return None, f"WindowWidth (0028,1051) {extent:g} with VOILUTFunction {function}"
    if function == "SIGMOID":
        return Voi(center=middle, width=extent), ""
    if function == "LINEAR_EXACT":
        return (middle - extent / 2, middle + extent / 2), ""
    return (middle - 0.5 - (extent - 1) / 2, middle - 0.5 + (extent - 1) / 2), ""
