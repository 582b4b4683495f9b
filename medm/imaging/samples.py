"""Samples of an opened PNG, TIFF, JPEG or BMP, as the file stores them.

Pillow keeps the high byte of 16-bit color and drops the rest, takes signed bytes for unsigned ones,
and swaps the bytes of some big-endian TIFFs. Such layouts are decoded here by other means, or
refused by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, ImageOps

from medm.errors import MediaError
from medm.imaging.formats import describe_tiff_layout

Reopen = Callable[[], AbstractContextManager[ImageFile.ImageFile]]
"""Open the same file once more."""

_NATIVE = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}
"""Raw modes of big-endian TIFFs, and the ones for what libtiff returns: native byte order."""
_JPEG_IN_TIFF = (6, 7)
"""Compression tags of TIFF that stand for JPEG."""
_SPREAD = {"L;2": 85, "L;4": 17}
"""Factors by which Pillow spreads numbers of 2 and 4 bits over 0..255."""
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


@dataclass(frozen=True, slots=True)
class Samples:
    """Pixels of one image."""

    pixels: np.ndarray
    """(H, W) or (H, W, 3), of uint8 or of a wider type with the stored values."""
    alpha: np.ndarray | None = None
    """(H, W) float32 in 0..1, beside pixels of a wider type that are not opaque everywhere."""
    inverted: bool = False
    """The smallest stored value is white."""
    bits: int | None = None
    """Bits that the file declares for a sample, if fewer than those of the array's type."""


def read_samples(image: ImageFile.ImageFile, reopen: Reopen, name: str) -> Samples:
    """Decode an opened image with a checked header; its EXIF or TIFF orientation is applied.

    Raises:
        MediaError: a layout that cannot be decoded without loss.
    """
    check_layout(image, name)
    if image.format == "TIFF":
        return _read_tiff(image, reopen)
    return _deep_color(image, reopen) if _is_deep_color(image) else _from_mode(image)


def read_labels(image: ImageFile.ImageFile, reopen: Reopen, name: str) -> np.ndarray:
    """Decode an opened label map to the numbers that it stores, (H, W) or (H, W, 3).

    They are the indices of a palette, not its colors, and the numbers of 1, 2 and 4 bits, which
    Pillow spreads over 0..255. The EXIF or TIFF orientation is applied.

    Raises:
        MediaError: a file that was compressed with loss, is transparent in places, or has white for
            its smallest number.
    """
    check_layout(image, name)
    check_label_format(image, name)
    image.info.pop(
        "transparency", None
    )  # a number that is shown transparent is a label all the same
    if image.mode == "P":
        return np.array(_upright(image))
    if image.mode == "1":
        return np.array(_upright(image)).astype(np.uint8)
    if image.mode == "L" and (spread := _SPREAD.get(_raw_mode(image))):
        return np.array(_upright(image)) // np.uint8(spread)
    if image.mode in _WITH_ALPHA and not _is_deep_color(image):
        array = np.array(_upright(image))
        _require_opaque((array[..., -1] == 255).all(), name)
        return array[..., 0] if array.shape[-1] == 2 else array[..., :-1]
    samples = read_samples(image, reopen, name)
    _require_opaque(samples.alpha is None, name)
    return samples.pixels


def check_label_format(image: ImageFile.ImageFile, name: str) -> None:
    """Refuse what the header of a label map tells to have changed its numbers.

    Raises:
        MediaError: a file that was compressed with loss, or has white for its smallest number.
    """
    tags = image.tag_v2 if image.format == "TIFF" else {}  # type: ignore[attr-defined]
    if image.format in ("JPEG", "MPO") or tags.get(259) in _JPEG_IN_TIFF:
        raise MediaError(
            f"{name}: JPEG changes values, so that labels in it are not exact; write the label map "
            "as PNG"
        )
    if image.format == "TIFF" and tags.get(262, 0) == 0:
        raise MediaError(
            f"{name}: a TIFF whose 0 is white (PhotometricInterpretation 0); expected 0 for the "
            "background. Write the label map as PNG"
        )


def _require_opaque(opaque: bool | np.bool_, name: str) -> None:
    if not opaque:
        raise MediaError(
            f"{name}: a label map with transparent pixels, which are neither background nor "
            "target; write it without an alpha channel"
        )


def check_layout(image: ImageFile.ImageFile, name: str) -> None:
    """Refuse what `read_samples` cannot decode without loss, as far as the header tells.

    Raises:
        MediaError: a layout of TIFF or JPEG that is not read.
    """
    if image.format == "TIFF":
        _check_tiff(image, name)
    elif image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        raise MediaError(
            f"{name}: CMYK JPEG without an Adobe marker, which would say whether 0 or 255 is full "
            "ink; convert it to RGB"
        )


def decoded_samples(image: Image.Image) -> Samples:
    """Return the pixels of an image that Pillow has decoded; what it dropped on the way is gone."""
    samples = _from_mode(ImageOps.exif_transpose(image))  # a copy: the image is the caller's
    tags = getattr(image, "tag_v2", None) or {}
    # Pillow turns white-is-zero TIFFs of 8 bits over, and leaves wider ones as they are stored.
    inverted = tags.get(262) == 0 and samples.pixels.dtype != np.uint8
    return Samples(samples.pixels, samples.alpha, inverted)


def _raw_mode(image: ImageFile.ImageFile) -> str:
    args = image.tile[0].args if image.tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _set_raw_mode(image: ImageFile.ImageFile, raw: str) -> None:
    """Make Pillow unpack the stored bytes in another way."""
    image.tile = [
        tile._replace(args=(raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw)
        for tile in image.tile
    ]


def stored_bytes(image: Image.Image) -> int:
    """Return the bytes of the samples of an opened image, as far as its header tells."""
    bands, size = len(image.getbands()), 1
    if isinstance(image, ImageFile.ImageFile) and _is_deep_color(image):
        bands, size = max(bands, 4 * _raw_mode(image).startswith("LA;")), 2
    elif image.mode.startswith("I;16"):
        size = 2
    elif image.mode in ("I", "F"):
        size = 4
    return image.width * image.height * bands * size


def _is_deep_color(image: ImageFile.ImageFile) -> bool:
    return ";16" in _raw_mode(image) and not image.mode.startswith("I")


def _check_tiff(image: ImageFile.ImageFile, name: str) -> None:
    tags = image.tag_v2  # type: ignore[attr-defined]
    photometric = tags.get(262, 0)
    bits = max(tags.get(258, (1,)))
    separate = tags.get(284, 1) == 2 and tags.get(277, 1) > 1
    if (bits > 8 and separate) or (bits > 8 and photometric not in (0, 1, 2)) or photometric == 8:
        depth = "16-bit color is" if bits == 16 else "this layout is"
        raise MediaError(
            f"{name}: {describe_tiff_layout(tags)}: {depth} not read; convert it to RGB with "
            "interleaved samples"
        )
    if photometric == 6 and tags.get(259, 1) == 1:
        _check_plain_ycbcr(tags, name)


def _read_tiff(image: ImageFile.ImageFile, reopen: Reopen) -> Samples:
    tags = image.tag_v2  # type: ignore[attr-defined]
    if _is_deep_color(image):
        return _deep_color(image, reopen)
    bits = max(tags.get(258, (1,)))
    signed = max(tags.get(339, (1,))) == 2
    if image.tile and image.tile[0][0] == "libtiff":
        raw = _raw_mode(image)
        _set_raw_mode(image, _NATIVE.get(raw, raw))
    if image.mode == "P":
        return _from_mode(_with_palette(image, tags[320]))
    inverted = tags.get(262, 0) == 0
    if image.mode == "L" and signed:
        return Samples(np.array(_upright(image)).view(np.int8))
    if image.mode == "I":
        pixels = np.array(_upright(image))
        wanted = np.int16 if bits == 16 else np.int32 if signed else np.uint32
        return Samples(
            pixels.astype(np.int16) if bits == 16 else pixels.view(wanted), inverted=inverted
        )
    if image.mode.startswith("I;16") or image.mode == "F":
        found = _from_mode(image)
        return Samples(found.pixels, inverted=inverted, bits=bits if bits < 16 else None)
    return _from_mode(image)


def _check_plain_ycbcr(tags: Mapping[int, Sequence[float]], name: str) -> None:
    """Convert uncompressed YCbCr (three full-range bytes per pixel) by the coefficients of JPEG."""
    default = {530: (1, 1), 529: (0.299, 0.587, 0.114), 532: (0, 255, 128, 255, 128, 255)}
    for tag, what in (
        (530, "YCbCrSubSampling"),
        (529, "YCbCrCoefficients"),
        (532, "ReferenceBlackWhite"),
    ):
        # Without the tag, TIFF 6.0 subsamples by (2, 2).
        value = tags.get(tag, (2, 2) if tag == 530 else default[tag])
        if not np.allclose(np.asarray(value, dtype=np.float64), default[tag], atol=1e-3):
            raise MediaError(
                f"{name}: uncompressed YCbCr TIFF with {what} (tag {tag}) "
                f"{tuple(map(float, value))}: expected {default[tag]}; convert it to RGB"
            )


def _with_palette(image: Image.Image, colors: tuple[int, ...]) -> Image.Image:
    """Replace a TIFF palette with 8 instead of 16 bits per entry, which Pillow shows as black."""
    if max(colors) > 255:
        return image
    entries = np.asarray(colors, dtype=np.uint8).reshape(3, -1).T
    turned = _upright(image)
    turned.putpalette(entries.tobytes())
    return turned


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    ImageOps.exif_transpose(image, in_place=True)  # a copy would cost as much again
    return image


def _deep_color(image: ImageFile.ImageFile, reopen: Reopen) -> Samples:
    """Return 16-bit color: Pillow keeps one byte of each sample, as its raw mode states."""
    raw, key = _raw_mode(image), image.info.get("transparency")
    if raw.startswith(
        "LA;"
    ):  # four bytes per pixel, which are not converted at all as RGBA of 8 bits
        four = _decode_as(reopen, "RGBA").astype(np.uint16)
        return Samples(four[..., 0] << 8 | four[..., 1], _opacity(four[..., 2] << 8 | four[..., 3]))
    layout, order = raw.split(";16")
    kept = "RGBA" if layout == "RGBa" else layout
    first, second = (_decode_as(reopen, f"{kept};16{byte}").astype(np.uint16) for byte in "BL")
    little = order == "L" or (order == "N" and sys.byteorder == "little")
    stored = second << 8 | first if little else first << 8 | second
    pixels: np.ndarray = stored[..., :3]
    opacity = _opacity(stored[..., 3]) if stored.shape[2] == 4 else None
    if key is not None:
        opacity = _opacity(np.where((pixels == np.asarray(key)).all(axis=-1), 0, 65535))
    if layout == "RGBa" and opacity is not None:
        # Colors were multiplied by alpha; what is fully transparent has none.
        pixels = (
            np.round(pixels / opacity[..., None].clip(min=1 / 65535))
            .clip(max=65535)
            .astype(np.uint16)
        )
    return Samples(pixels, opacity)


def _decode_as(reopen: Reopen, raw: str) -> np.ndarray:
    with reopen() as image:
        _set_raw_mode(image, raw)
        return np.array(_upright(image))


def _opacity(alpha: np.ndarray) -> np.ndarray | None:
    return None if (alpha == 65535).all() else alpha.astype(np.float32) / 65535


def _from_mode(image: Image.Image) -> Samples:
    """Modes that Pillow decodes without loss: 8 bits, and gray numbers of any width."""
    key = image.info.get("transparency")
    image = _upright(image)
    mode = image.mode
    if mode.startswith("I;16"):
        pixels = np.asarray(image).astype(
            np.uint16
        )  # `np.asarray` keeps the byte order of the mode
        return Samples(pixels, None if key is None else _opacity(np.where(pixels == key, 0, 65535)))
    if mode in ("I", "F"):
        return Samples(np.array(image))
    gray = mode in ("LA", "La", "L", "1")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        # As transformers does: what is transparent shows white.
        if mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    wanted = "L" if gray else "RGB"
    return Samples(np.array(image if image.mode == wanted else image.convert(wanted)))
