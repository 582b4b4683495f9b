"""Types of uploaded content, recognized by their first bytes and never by a name."""

from __future__ import annotations

import io
import struct
import zlib
from typing import BinaryIO, NamedTuple

from medm.imaging.dicom_bare import HEAD, is_dicom_head
from medm.imaging.formats import describe_content
from medm.serving.errors import ServingError
from medm.types import Kind

TAKEN = "PNG, JPEG, TIFF, BMP or DICOM; NIfTI, NRRD or MetaImage; or a zip of a DICOM series"

_IMAGES = {
    b"\x89PNG": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
    b"BM": ".bmp",
}
_NIFTI = {348: (344, b"n+1"), 540: (4, b"n+2")}
"""By size of the header: offset and text of its magic."""


class FileType(NamedTuple):
    """A type of content that is taken."""

    kind: Kind | None
    """None for DICOM, whose header says whether it is an image or a volume."""
    suffix: str
    """Ending of a file, by which readers know it; ".zip" for an archive."""


def file_type(stream: BinaryIO, *, param: str | None = None) -> FileType:
    """Return the type of the content of a seekable stream, which is left at its start.

    Raises:
        ServingError: "unsupported_type".
    """
    head = stream.read(max(HEAD, 352))
    stream.seek(0)
    found = _by_head(head)
    if found is None:
        what = describe_content(head[:132], stream, "") if head else "nothing"
        raise ServingError("unsupported_type", f"expected {TAKEN}; found {what}", param=param)
    return found


def require_image(content: bytes, *, param: str | None = None) -> None:
    """Refuse content that is no image. Raises `ServingError`."""
    found = file_type(io.BytesIO(content), param=param)
    if found.kind == "volume" or found.suffix == ".zip":
        raise ServingError(
            "unsupported_type",
            "expected an image; volumes and zip files are uploaded to /v1/files and named by id",
            param=param,
        )


def _by_head(head: bytes) -> FileType | None:
    for mark, suffix in _IMAGES.items():
        if head.startswith(mark):
            return FileType("image", suffix)
    if head.startswith(b"PK\3\4"):
        return FileType(None, ".zip")
    if head.startswith(b"NRRD"):
        return FileType("volume", ".nrrd")
    if head.startswith((b"ObjectType", b"NDims")):
        return FileType("volume", ".mha")
    if _is_nifti(head):
        return FileType("volume", ".nii")
    if head.startswith(b"\x1f\x8b"):
        try:
            inside = zlib.decompressobj(wbits=31).decompress(head, 352)
        except zlib.error:
            return None
        return FileType("volume", ".nii.gz") if _is_nifti(inside, whole=False) else None
    if is_dicom_head(head):
        return FileType(None, ".dcm")
    return None


def _is_nifti(head: bytes, *, whole: bool = True) -> bool:
    """Return true for the beginning of a NIfTI file.

    Args:
        head: the first bytes.
        whole: the magic is among them; a packed beginning may be shorter.
    """
    for order in "<>":
        if len(head) < 4:
            return False
        at, magic = _NIFTI.get(struct.unpack(f"{order}i", head[:4])[0], (0, b""))
        found = head[at : at + 3]
        if magic and (found == magic or (not whole and magic.startswith(found))):
            return True
    return False
