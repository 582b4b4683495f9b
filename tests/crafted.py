"""Small files that ask for much: each maker writes one, from a few hundred bytes to a few MB.

They belong to the fault campaign (docs/faults.md). A maker takes the path of the file; its suffix
is in `IMAGES`, `VOLUMES` and `RECORDS`. `measured` runs a reader in a process of its own and
returns the processor seconds and the peak memory that the file costs.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Maker = Callable[[Path], None]

MAX_SECONDS, MAX_GIB = 20.0, 2.0
"""What no small file may cost: seconds of one core, and memory beyond the imports."""


# Images -------------------------------------------------------------------------------------------


def png(width: int, height: int, *, bits: int = 8, color: int = 2) -> Maker:
    """Black pixels of any size: deflate holds a thousand of them in a byte or two."""

    def make(path: Path) -> None:
        channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
        data = _zeros((1 + (width * channels * bits + 7) // 8) * height, wbits=15)
        header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
        palette = [_chunk(b"PLTE", bytes(3))] if color == 3 else []
        parts = [_chunk(b"IHDR", header), *palette, _chunk(b"IDAT", data), _chunk(b"IEND", b"")]
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))

    return make


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def progressive_jpeg(side: int, scans: int, *, mode: str = "L", scan: int = -1) -> Maker:
    """A progressive JPEG of which one scan is repeated: each repetition touches every block.

    Args:
        side: of the image.
        scans: in all.
        mode: of Pillow; "RGB" has scans of one and of three components.
        scan: which is repeated.
    """

    def make(path: Path) -> None:
        from PIL import Image

        buffer = io.BytesIO()
        Image.new(mode, (side, side)).save(
            buffer, "JPEG", progressive=True, quality=50, subsampling=0
        )
        data = buffer.getvalue()
        starts = [at for at in range(len(data) - 1) if data[at : at + 2] == b"\xff\xda"]
        ends = [*starts[1:], len(data) - 2]
        # Tables of the next scan may stand behind one, and do no harm.
        repeated = data[starts[scan] : ends[scan]] * max(scans - len(starts), 0)
        at = ends[scan]
        path.write_bytes(data[:at] + repeated + data[at:])

    return make


def many_frames(count: int) -> Maker:
    """A TIFF of many directories, all of the same two by two pixels."""

    def make(path: Path) -> None:
        entries = [
            (256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
            (273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, 2), (279, 4, 1, 4),
        ]  # fmt: skip
        size = 2 + 12 * len(entries) + 4
        packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
        body = bytearray(b"II*\0" + struct.pack("<I", 12) + bytes(4))
        for number in range(count):
            following = 12 + size * (number + 1) if number + 1 < count else 0
            body += struct.pack("<H", len(entries)) + packed + struct.pack("<I", following)
        path.write_bytes(bytes(body))

    return make


def deflated_tiff(width: int, height: int, *, dtype: str = "uint8") -> Maker:
    """A TIFF of one strip of zeros, packed with deflate."""

    def make(path: Path) -> None:
        from PIL import Image

        image = Image.fromarray(np.zeros((height, width), dtype))
        image.save(path, "TIFF", compression="tiff_adobe_deflate")

    return make


def npy_header(shape: str, *, descr: str = "|u1", data: bytes = b"") -> Maker:
    """An NPY file whose header holds any text as its shape."""

    def make(path: Path) -> None:
        path.write_bytes(_npy(shape, descr) + data)

    return make


def _npy(shape: str, descr: str) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


# Volumes ------------------------------------------------------------------------------------------


def npz(shape: tuple[int, ...], packing: int) -> Maker:
    """An NPZ archive of zeros, packed by any method of ZIP."""

    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", packing) as archive, archive.open("a.npy", "w") as member:
            member.write(_npy(str(shape), "|u1"))
            left = int(np.prod(shape))
            while left:
                piece = min(left, 2**24)
                member.write(bytes(piece))
                left -= piece

    return make


def nifti(
    shape: tuple[int, int, int],
    *,
    datatype: int = 2,
    bits: int = 8,
    slope: float = 1.0,
    held: int | None = None,
    spacing: float = 1.0,
) -> Maker:
    """A packed NIfTI of zeros; `held` bytes of voxels are there instead of those declared."""

    def make(path: Path) -> None:
        header = bytearray(352)
        struct.pack_into("<i8h", header, 0, 348, *([0] * 8))
        struct.pack_into("<8h", header, 40, 3, *shape, 1, 1, 1, 1)
        struct.pack_into("<hh", header, 70, datatype, bits)
        struct.pack_into("<8f", header, 76, 1, *[spacing] * 7)
        struct.pack_into("<h", header, 254, 1)
        rows = [float(spacing * (row == column)) for row in range(3) for column in range(4)]
        struct.pack_into("<12f", header, 280, *rows)
        struct.pack_into("<fff", header, 108, 352, slope, 0)
        header[344:348] = b"n+1\0"
        left = int(np.prod([int(side) for side in shape])) * bits // 8 if held is None else held
        with gzip.open(path, "wb", compresslevel=9) as stream:
            stream.write(bytes(header))
            while left > 0:
                stream.write(bytes(min(left, 2**24)))
                left -= 2**24

    return make


def nrrd(shape: tuple[int, int, int], *, kind: str = "uint8") -> Maker:
    """A packed NRRD of zeros."""

    def make(path: Path) -> None:
        sizes = " ".join(map(str, shape))
        head = (
            f"NRRD0004\ntype: {kind}\ndimension: 3\nsizes: {sizes}\nendian: little\n"
            "spacings: 1 1 1\nencoding: gzip\n\n"
        )
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        path.write_bytes(head.encode() + _zeros(size, wbits=31))

    return make


def metaimage(shape: tuple[int, int, int], *, kind: str = "MET_UCHAR", itemsize: int = 1) -> Maker:
    """A packed MetaImage of zeros."""

    def make(path: Path) -> None:
        sizes = " ".join(map(str, shape))
        data = _zeros(int(np.prod(shape)) * itemsize, wbits=15)
        head = (
            "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
            f"CompressedData = True\nCompressedDataSize = {len(data)}\nDimSize = {sizes}\n"
            f"ElementSpacing = 1 1 1\nElementType = {kind}\nElementDataFile = LOCAL\n"
        )
        path.write_bytes(head.encode() + data)

    return make


def _zeros(size: int, *, wbits: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    pieces = [packer.compress(bytes(min(2**24, size - at))) for at in range(0, size, 2**24)]
    return b"".join([*pieces, packer.flush()])


def rle_dicom(rows: int, columns: int, frames: int) -> Maker:
    """A DICOM file of many frames of zeros, packed by run lengths."""

    def make(path: Path) -> None:
        from pydicom.dataset import FileDataset, FileMetaDataset
        from pydicom.encaps import encapsulate
        from pydicom.uid import MultiFrameGrayscaleByteSecondaryCaptureImageStorage as KIND
        from pydicom.uid import RLELossless, generate_uid

        line = b"\x81\x00" * (rows * columns // 128)  # 128 zeros in two bytes
        frame = struct.pack("<16I", 1, 64, *([0] * 14)) + line
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = KIND, RLELossless
        meta.MediaStorageSOPInstanceUID = generate_uid()
        data = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
        data.SOPClassUID, data.SOPInstanceUID = KIND, meta.MediaStorageSOPInstanceUID
        data.Rows, data.Columns, data.NumberOfFrames = rows, columns, frames
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
        data.Modality = "OT"
        data.PixelData = encapsulate([frame] * frames)
        data["PixelData"].is_undefined_length = True
        data.save_as(path, enforce_file_format=True)

    return make


# Records, recipes, archives -----------------------------------------------------------------------


def double_key(count: int) -> Maker:
    """A record of many keys, the last of which is written twice."""

    def make(path: Path) -> None:
        pairs = [f'"k{number}":0' for number in range(count)] + [f'"k{count - 1}":0']
        path.write_text("{" + ",".join(pairs) + "}\n", encoding="utf-8")

    return make


def placeholders(count: int, *, word: str = "<image>") -> Maker:
    """A record with many placeholders in one text, and as many files."""

    def make(path: Path) -> None:
        field = "image" if word == "<image>" else "volume"
        turns = [{"from": "human", "value": word * count}, {"from": "gpt", "value": "x"}]
        record = {field: ["a"] * count, "conversations": turns}
        path.write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")

    return make


def turns(count: int) -> Maker:
    """A conversation of many short turns."""

    def make(path: Path) -> None:
        pair = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
        path.write_text(json.dumps({"conversations": pair * count}) + "\n", encoding="utf-8")

    return make


def brackets(count: int) -> Maker:
    """A record that is nested deeper than any parser goes."""

    def make(path: Path) -> None:
        path.write_text("[" * count + "]" * count + "\n", encoding="utf-8")

    return make


def yaml_aliases(levels: int, *, width: int = 9) -> Maker:
    """A recipe whose aliases name lists of aliases: its size grows by `width` at each level."""

    def make(path: Path) -> None:
        lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
        lines += [
            f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]"
            for level in range(1, levels)
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    return make


def sparse_tar(declared: int) -> Maker:
    """A tar archive whose member declares more bytes than the archive has."""

    def make(path: Path) -> None:
        member = tarfile.TarInfo("a.json")
        member.size = declared
        path.write_bytes(member.tobuf() + bytes(1024))

    return make


# Measuring ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cost:
    """What reading a file costs beyond the imports."""

    seconds: float
    """Processor seconds of the process and of its children."""
    gib: float
    """Growth of the largest resident memory, of the process or of one child."""
    said: str
    """The last line of its output: the message of the error, or the result."""


_PROGRAM = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_CPU, ({limit}, {limit} + 5))
sys.setrecursionlimit(10000)
{imports}
who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
used = lambda: [resource.getrusage(w) for w in who]
peak = lambda: int(next(line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
before, held = used(), peak()
try:
    said = repr({call})[:200]
except Exception as error:
    said = f"{{type(error).__name__}}: {{error}}"
after = used()
seconds = sum(a.ru_utime + a.ru_stime - b.ru_utime - b.ru_stime for a, b in zip(after, before))
grown = max(peak() - held, after[1].ru_maxrss - held)
print(seconds, grown / 2**20, said.replace(chr(10), " "))
"""


def measured(imports: str, call: str, *, limit: int = 120) -> Cost:
    """Run an expression in a process of its own.

    Args:
        imports: run before the measurement.
        call: the expression.
        limit: processor seconds after which the process is killed; by the clock five times as many,
            since a machine may be busy.

    Raises:
        AssertionError: the process crashed, or did not end in time.
    """
    program = _PROGRAM.format(imports=imports, call=call, limit=limit)
    timeout = 5.0 * limit
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", program],
            capture_output=True, text=True, timeout=timeout, env=os.environ, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end within {timeout:g} s: {call}") from None
    assert done.returncode == 0, f"{call}: status {done.returncode}\n{done.stderr[-2000:]}"
    seconds, gib, said = done.stdout.strip().splitlines()[-1].split(" ", 2)
    return Cost(float(seconds), float(gib), said)


def seconds_of_children() -> float:
    """Return the processor seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


IMAGES: dict[str, tuple[str, Maker]] = {
    "png-1-x-67-million": (".png", png(1, 67_000_000)),
    "png-67-million-x-1": (".png", png(67_000_000, 1)),
    "png-8192-x-8192-rgba16": (".png", png(8192, 8192, bits=16, color=6)),
    "png-5792-x-5792-rgba16": (".png", png(5792, 5792, bits=16, color=6)),
    "png-6600-x-6600-rgb16": (".png", png(6600, 6600, bits=16)),
    "png-8192-x-8192-gray16": (".png", png(8192, 8192, bits=16, color=0)),
    "png-8192-x-8192-rgba8": (".png", png(8192, 8192, color=6)),
    "png-256-x-262144": (".png", png(256, 2**18)),
    "jpeg-many-scans": (".jpg", progressive_jpeg(8192, 600)),
    "jpeg-allowed-scans": (".jpg", progressive_jpeg(8192, 100)),
    "jpeg-allowed-color-scans": (".jpg", progressive_jpeg(8192, 100, mode="RGB", scan=0)),
    "tiff-many-directories": (".tif", many_frames(27_000)),
    "tiff-8192-x-8192-float": (".tif", deflated_tiff(8192, 8192, dtype="float32")),
    "dicom-rle-8192-x-8192": (".dcm", rle_dicom(8192, 8192, 1)),
    "npy-bool-shape": (".npy", npy_header("(True, 2, 2)", data=bytes(4))),
    "npy-lying": (".npy", npy_header("(8192, 8192)")),
}
"""Images by name: suffix and maker."""

VOLUMES: dict[str, tuple[str, Maker]] = {
    "npz-bzip2": (".npz", npz((512, 1024, 1024), zipfile.ZIP_BZIP2)),
    "npz-lzma": (".npz", npz((512, 1024, 1024), zipfile.ZIP_LZMA)),
    "npz-deflate": (".npz", npz((512, 1024, 1024), zipfile.ZIP_DEFLATED)),
    "nifti-lying": (".nii.gz", nifti((1024, 1024, 512), held=1000)),
    "nifti-int8": (".nii.gz", nifti((1024, 1024, 512), datatype=2, bits=8)),
    "nifti-int16-slope": (".nii.gz", nifti((1024, 1024, 512), datatype=4, bits=16, slope=2.0)),
    "nifti-256-slices": (".nii.gz", nifti((1024, 1024, 256), datatype=8, bits=32)),
    "nifti-coarse": (".nii.gz", nifti((16, 16, 16), spacing=40.0)),
    "nifti-int32": (".nii.gz", nifti((1024, 1024, 512), datatype=8, bits=32)),
    "nifti-int64": (".nii.gz", nifti((1024, 1024, 256), datatype=1024, bits=64)),
    "nrrd-uint8": (".nrrd", nrrd((1024, 1024, 512))),
    "nrrd-int32": (".nrrd", nrrd((1024, 1024, 512), kind="int32")),
    "metaimage-uint8": (".mha", metaimage((1024, 1024, 512))),
    "metaimage-int32": (".mha", metaimage((1024, 1024, 512), kind="MET_INT", itemsize=4)),
    "npy-bool-shape": (".npy", npy_header("(True, 2, 2)", data=bytes(4))),
}
"""Volumes by name: suffix and maker."""
