"""PNG and TIFF files written byte by byte, in layouts that Pillow does not write."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples: np.ndarray, color: int, *, bits: int = 16, before: bytes = b"") -> bytes:
    """A PNG of (H, W[, channels]) samples.

    Args:
        samples: numbers of 0 to 2**bits - 1.
        color: color type of the PNG standard: 0 gray, 2 RGB, 3 palette, 4 gray and alpha, 6 RGB and
            alpha.
        bits: of a sample.
        before: chunks that stand before the pixels.
    """
    height, width = samples.shape[:2]
    flat = samples.reshape(height, -1)
    if bits < 8:
        each = np.unpackbits(flat.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
        rows = [np.packbits(row.ravel()).tobytes() for row in each]
    else:
        rows = [row.astype(">u2" if bits == 16 else "u1").tobytes() for row in flat]
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", struct.pack(">2I5B", width, height, bits, color, 0, 0, 0))
        + before
        + png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
        + png_chunk(b"IEND", b"")
    )


def tiff(
    samples: np.ndarray,
    photometric: int,
    *,
    order: str = "<",
    planar: int = 1,
    extra: int | None = None,
    deflate: bool = False,
    tags: Mapping[int, tuple[int, ...]] | None = None,
) -> bytes:
    """A TIFF of (H, W[, channels]) samples, stored in their own type.

    Args:
        samples: of any type of 8 bits or more; it decides bits and sample format.
        photometric: interpretation: 0 MinIsWhite, 1 MinIsBlack, 2 RGB, 3 palette, 5 CMYK, 6 YCbCr,
            8 CIELAB.
        order: "<" or ">".
        planar: 1 for interleaved samples, 2 for a plane each.
        extra: meaning of the last sample: 0 unspecified, 1 premultiplied alpha, 2 alpha.
        deflate: compressed, which makes Pillow decode by libtiff.
        tags: further tags of 16-bit numbers, or others in place of the usual ones.
    """
    height, width = samples.shape[:2]
    channels = samples.shape[2] if samples.ndim == 3 else 1
    stored = samples.astype(samples.dtype.newbyteorder(order))
    planes = (
        [stored[..., i].tobytes() for i in range(channels)] if planar == 2 else [stored.tobytes()]
    )
    if deflate:
        planes = [zlib.compress(plane) for plane in planes]
    entries: dict[int, tuple[str, tuple[int, ...]]] = {
        256: ("I", (width,)),
        257: ("I", (height,)),
        258: ("H", (samples.dtype.itemsize * 8,) * channels),
        259: ("H", (8 if deflate else 1,)),
        262: ("H", (photometric,)),
        273: ("I", (0,) * len(planes)),
        277: ("H", (channels,)),
        278: ("I", (height,)),
        279: ("I", tuple(len(plane) for plane in planes)),
        284: ("H", (planar,)),
        339: ("H", ({"u": 1, "i": 2, "f": 3}[samples.dtype.kind],) * channels),
    }
    if extra is not None:
        entries[338] = ("H", (extra,))
    entries.update({tag: ("H", values) for tag, values in (tags or {}).items()})
    start = 8 + 2 + 12 * len(entries) + 4
    longer = sum(
        size
        for form, values in entries.values()
        if (size := struct.calcsize(form) * len(values)) > 4
    )
    places = np.cumsum([start + longer, *(len(plane) for plane in planes[:-1])])
    entries[273] = ("I", tuple(int(place) for place in places))
    directory, values_behind = b"", b""
    for tag in sorted(entries):
        form, values = entries[tag]
        data = struct.pack(f"{order}{len(values)}{form}", *values)
        directory += struct.pack(f"{order}2HI", tag, {"H": 3, "I": 4}[form], len(values))
        if len(data) > 4:
            directory += struct.pack(f"{order}I", start + len(values_behind))
            values_behind += data
        else:
            directory += data.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    count = struct.pack(f"{order}H", len(entries))
    return (
        mark
        + struct.pack(f"{order}I", 8)
        + count
        + directory
        + bytes(4)
        + values_behind
        + b"".join(planes)
    )


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
