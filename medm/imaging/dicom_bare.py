"""DICOM data sets without the file header of PS3.10: no preamble, no "DICM", often no meta group.

Some archives and old scanners export them. The header names the encoding of the elements; without
it the default of DICOM holds (PS3.5 section 10.1: implicit VR, little endian), unless the elements
themselves show their VR.
"""

from __future__ import annotations

import itertools
import struct
from typing import BinaryIO

from medm.errors import MediaError

HEAD = 132
"""Bytes of a file that `is_dicom_head` looks at."""

IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
"""UIDs of the three encodings that data sets can have."""

_VRS = {
    b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN",
    b"SH", b"SL", b"SS",
    b"ST", b"TM", b"UI", b"UL", b"US",
}  # fmt: skip
_LONG_VRS = {
    b"OB",
    b"OD",
    b"OF",
    b"OL",
    b"OV",
    b"OW",
    b"SQ",
    b"SV",
    b"UC",
    b"UN",
    b"UR",
    b"UT",
    b"UV",
}
"""Value representations with a length of four bytes behind two that are reserved."""
_MAX_FIRST = 1024
"""Largest plausible first element: a group length, a character set, a date or a UID."""
_MAX_META = 4096
"""Bytes at the start of a file in which its meta information is looked for."""
_TRANSFER_SYNTAX = 0x00020010


def has_file_header(head: bytes) -> bool:
    """Return true if the file begins with the preamble and prefix of DICOM."""
    return head[128:132] == b"DICM"


def is_dicom_head(head: bytes) -> bool:
    """Return true if the first `HEAD` bytes are DICOM, with or without its file header."""
    return has_file_header(head) or _encoding(head) is not None


def bare_syntax(stream: BinaryIO, name: str) -> tuple[str, bool]:
    """Transfer syntax of a file without preamble, and whether its meta information names it.

    Raises:
        MediaError: the elements show no encoding, or the meta information no transfer syntax.
    """
    stream.seek(0)
    head = stream.read(_MAX_META)
    stream.seek(0)
    syntax = _encoding(head)
    if syntax is None:
        raise MediaError(
            f"{name}: not DICOM: neither its file header nor a data set begins the file"
        )
    if head[:2] != b"\2\0":
        return syntax, False
    for tag, start, length in _elements(head, "<", explicit=True):
        if tag == _TRANSFER_SYNTAX:
            return head[start : start + length].rstrip(b"\0 ").decode("ascii", "replace"), True
    raise MediaError(
        f"{name}: DICOM without its file header (preamble and prefix), and without "
        "TransferSyntaxUID (0002,0010)"
    )


def _encoding(head: bytes) -> str | None:
    """UID of the encoding that the first elements show; None where they are no DICOM elements."""
    if len(head) < 8:
        return None
    for order in "<>":
        if struct.unpack_from(f"{order}H", head)[0] in (0x0002, 0x0008):
            explicit = head[4:6] in _VRS | _LONG_VRS
            if not explicit and order == ">":
                return None  # no such encoding exists
            if not _plausible(head[:HEAD], order, explicit=explicit):
                return None
            return BIG_ENDIAN if order == ">" else EXPLICIT if explicit else IMPLICIT
    return None


def _plausible(head: bytes, order: str, *, explicit: bool) -> bool:
    """Return true if the tags ascend and the first element is as short as at a data set's start."""
    found = _elements(head, order, explicit=explicit)
    rising = all(earlier[0] < later[0] for earlier, later in itertools.pairwise(found))
    return bool(found) and rising and found[0][2] <= _MAX_FIRST and found[0][2] % 2 == 0


def _elements(data: bytes, order: str, *, explicit: bool) -> list[tuple[int, int, int]]:
    """Return tag, value offset and length of the elements in `data`; empty on an invalid VR."""
    found: list[tuple[int, int, int]] = []
    at = 0
    while at + 12 <= len(data):
        group, element = struct.unpack_from(f"{order}2H", data, at)
        vr = data[at + 4 : at + 6]
        if not explicit:
            start, (length,) = at + 8, struct.unpack_from(f"{order}I", data, at + 4)
        elif vr in _LONG_VRS:
            start, (length,) = at + 12, struct.unpack_from(f"{order}I", data, at + 8)
        elif vr in _VRS:
            start, (length,) = at + 8, struct.unpack_from(f"{order}H", data, at + 6)
        else:
            return (
                found if found and group > 2 else []
            )  # behind the meta information another encoding may follow
        found.append((group << 16 | element, start, length))
        at = start + length
    return found
