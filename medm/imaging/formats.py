"""Names of formats, and of TIFF and JPEG layouts, that are recognized but not supported.

A message that says "WebP content under .jpg" is of more use than "unknown content". Nothing is
decoded here.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

from PIL import TiffImagePlugin

from medm.imaging.damage import DECODE_ERRORS

READ = "PNG, JPEG, TIFF, BMP, DICOM or NPY"
"""Formats of 2-D images that are read."""

_SIGNATURES = (
    (0, b"GIF8", "GIF"),
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "PSD"),
    (0, b"%!PS", "PostScript"),
    (8, b"WEBP", "WebP"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIC or AVIF"),
    (4, b"ftypmsf1", "HEIC or AVIF"),
    (4, b"ftyp", "MP4 or other video"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"NRRD", "NRRD volume"),
    (0, b"ObjectType", "MetaImage volume"),
    (0, b"\x5c\1\0\0", "NIfTI volume"),
    (0, b"\0\0\1\x5c", "NIfTI volume"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"PK\3\4", "ZIP"),
    (0, b"\x89HDF", "HDF5"),
    (0, b"version https://git-lfs", "Git LFS pointer (not downloaded)"),
)
_PNM = {bytes((0x50, 0x30 + digit)): "PNM" for digit in range(1, 8)}  # "P1" to "P7"
_SUFFIXES = {
    "GIF": (".gif",), "PDF": (".pdf",), "PSD": (".psd",), "PostScript": (".ps", ".eps"),
        "WebP": (".webp",),
    "AVIF": (".avif",), "HEIC": (".heic", ".heif"),
        "JPEG 2000": (".jp2", ".j2k", ".jpx", ".jpf", ".j2c"),
    "JPEG XL": (".jxl",), "ICO": (".ico",), "SVG": (".svg",), "gzip": (".gz",),
        "ZIP": (".zip", ".npz"),
}  # fmt: skip
_SOF = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7}
_PHOTOMETRIC = {
    0: "MinIsWhite", 1: "MinIsBlack", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr",
    8: "CIELAB",
    9: "ICCLab", 10: "ITULab", 32803: "CFA (raw camera)", 34892: "linear raw",
}  # fmt: skip
_SAMPLE_FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point", 4: "untyped"}


def describe_content(head: bytes, stream: BinaryIO, suffix: str) -> str:
    """Name the content of a file that Pillow does not take, for a message.

    Args:
        head: the first bytes, 132 or fewer.
        stream: the whole file.
        suffix: of the file's name, in lower case; empty where it has none.
    """
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page, perhaps a failed download"
    if head.startswith(b"\xff\xd8\xff"):
        return _describe_jpeg(stream)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _describe_tiff(head, stream)
    if text.startswith(b"<svg") or (text.startswith((b"<?xml", b"<!doctype")) and b"svg" in text):
        content = "SVG"
    else:
        content = next(
            (name for at, mark, name in _SIGNATURES if head[at : at + len(mark)] == mark),
            _PNM.get(head[:2], ""),
        )
    if not content:
        return "unknown content"
    where = f" under {suffix}" if suffix and suffix not in _SUFFIXES.get(content, ()) else ""
    hint = (
        "; give it as a volume" if "volume" in content or suffix == ".gz" else "; convert it to PNG"
    )
    return f"{content} content{where}{hint}"


def describe_tiff_layout(tags: TiffImagePlugin.ImageFileDirectory_v2) -> str:
    """Photometric interpretation, samples, bits and sample format of a TIFF, for a message."""
    samples = tags.get(277, 1)
    bits = tags.get(258, (1,))
    kind = _SAMPLE_FORMATS.get(max(tags.get(339, (1,))), "unknown")
    photometric = tags.get(262, "missing")
    planes = ", in separate planes" if tags.get(284, 1) == 2 and samples > 1 else ""
    return (
        f"TIFF with photometric interpretation {_PHOTOMETRIC.get(photometric, photometric)}, "
        f"{samples} {kind} samples of {'/'.join(map(str, sorted(set(bits))))} bits a pixel{planes}"
    )


def _describe_tiff(head: bytes, stream: BinaryIO) -> str:
    if b"+" in head[:4]:
        return "a BigTIFF file that cannot be read"
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(head[:8])
        stream.seek(tags.next)
        tags.load(stream)
        return f"a {describe_tiff_layout(tags)}"
    except DECODE_ERRORS as error:
        return f"a TIFF file with a damaged directory ({type(error).__name__})"


def _describe_jpeg(stream: BinaryIO) -> str:
    """Describe a JPEG by its frame header: precision and process."""
    stream.seek(2)
    while len(mark := stream.read(4)) == 4 and mark[0] == 0xFF:
        code, length = struct.unpack(">xBH", mark)
        if code in _SOF:
            bits = stream.read(1)
            process = {0xC3: "lossless ", 0xF7: "JPEG-LS "}.get(code, "")
            return (
                f"a {process}JPEG of {bits[0] if bits else '?'} bits per sample; expected 8 bits, "
                "not lossless"
            )
        if code == 0xDA or length < 2:
            break
        stream.seek(length - 2, 1)
    return "a JPEG file with a damaged header"
