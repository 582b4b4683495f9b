"""2-D images: PNG, JPEG, TIFF, BMP, NPY and single-frame DICOM to pixels, and pixels to inputs.

Files are untrusted input: formats are on a list, sizes are checked before anything is decoded,
metadata is dropped. Images of more than 8 bits, gray or color, keep their values until a window
says which of them matter.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from medm.errors import MediaError, MediaSizeError
from medm.imaging.arrays import check_npy, read_npy
from medm.imaging.constant import Step, check_prepared
from medm.imaging.damage import DECODE_ERRORS
from medm.imaging.decoded_image import DecodedImage
from medm.imaging.dicom_bare import HEAD, is_dicom_head
from medm.imaging.formats import READ, describe_content
from medm.imaging.notices import warn_once
from medm.imaging.options import ImagePreprocess
from medm.imaging.placement import Placement, Prepared
from medm.imaging.samples import (
    Samples,
    check_label_format,
    check_layout,
    decoded_samples,
    read_labels,
    read_samples,
    stored_bytes,
)
from medm.imaging.sources import Source
from medm.limits import MAX_IMAGE_BYTES, MAX_PIXELS, MAX_SCANS, MAX_SIDE

logger = logging.getLogger(__name__)

_MAX_FRAMES_COUNTED = 100
"""Frames that a message counts; Pillow needs longer for each further directory of a TIFF."""

_FORMATS = ["PNG", "JPEG", "TIFF", "BMP"]
_NPY = b"\x93NUMPY"
_TURNED = (5, 6, 7, 8)
"""EXIF orientations that exchange rows and columns."""
_END_MARKS = {b"\x89PNG": b"IEND", b"\xff\xd8\xff": b"\xff\xd9"}
_TAIL = 4096
"""Bytes at the end in which the mark may stand: some programs write something behind it."""
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Weights of red, green and blue in gray, as Pillow converts colors of 8 bits (ITU-R 601)."""
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def read_image(file: Source, *, name: str | None = None) -> DecodedImage:
    """Decode one image.

    Args:
        file: a path, a seekable stream of bytes (an upload), an image of Pillow, or an array as a
            .npy file holds it: (H, W), or (H, W, 3) of uint8 or uint16.
        name: what messages call the image; the path, or "image", by default.

    Raises:
        MediaError: missing, empty, truncated, too large, of several frames, or of a format that is
            not on the list.
    """
    if isinstance(file, np.ndarray):
        return _from_array(file, name or "image")
    if isinstance(file, Image.Image):
        return _from_pillow(file, name or str(getattr(file, "filename", "") or "image"))
    if not isinstance(file, (str, Path)):
        return _decode(file, name or "image", None)
    name = name or str(file)
    with _regular_file(Path(file), name) as stream:
        return _decode(stream, name, Path(file))


def read_label_image(file: Path) -> np.ndarray:
    """Return the numbers that a label map of an image stores, (H, W) or (H, W, 3), upright.

    Raises:
        MediaError: as `read_image`, and for what changes labels; see `medm.imaging.samples`.
    """
    name = str(file)
    with _regular_file(file, name) as stream:
        head = _head(stream, name)
        if head.startswith(_NPY):
            array = read_npy(stream, name, max_items=MAX_PIXELS * 3)
            _check_array(array.shape, array.dtype, name)
            return array
        if is_dicom_head(head):
            return _decode(stream, name, file).pixels
        with _pillow_image(stream, head, name, file.suffix.lower()) as image:
            return read_labels(image, lambda: _reopened(stream), name)


def check_image(file: Path | BinaryIO) -> tuple[int, int]:
    """Check the beginning and the end of an image, and return its height and width.

    They are those of the upright image, as its EXIF orientation says.

    It is decoded only where its end mark is missing, and where it is a DICOM file in a stream.

    Args:
        file: a path, or a seekable stream.

    Raises:
        MediaError: as `read_image`, except for damage in the middle.
    """
    if not isinstance(file, Path):
        return _check_stream(file, "image", None)
    with _regular_file(file, str(file)) as stream:
        return _check_stream(stream, str(file), file)


def check_label_image(file: Path) -> tuple[int, int]:
    """`check_image` of a label map, whose header must not tell that its numbers were changed.

    Raises:
        MediaError: as `check_image`, and for a file that was compressed with loss.
    """
    size = check_image(file)
    name = str(file)
    with _regular_file(file, name) as stream:
        head = _head(stream, name)
        if not head.startswith(_NPY) and not is_dicom_head(head):
            with _pillow_image(stream, head, name, file.suffix.lower()) as image:
                check_label_format(image, name)
    return size


def _check_stream(stream: BinaryIO, name: str, file: Path | None) -> tuple[int, int]:
    head = _head(stream, name)
    if is_dicom_head(head):
        from medm.imaging.dicom_image import read_image_header

        if file is None:
            height, width = _decode(stream, name, None).pixels.shape[:2]
            return height, width
        header = read_image_header(file, name)
        return header.rows, header.columns
    if head.startswith(_NPY):
        length = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        shape, dtype = check_npy(stream, name, max_items=MAX_PIXELS * 3, length=length)
        _check_array(shape, dtype, name)
        return shape[0], shape[1]
    with _pillow_image(stream, head, name, file.suffix.lower() if file else "") as image:
        size = image.height, image.width
        if _is_turned(image, stream):
            size = image.width, image.height
    if not _has_end(stream, head):
        stream.seek(0)
        read_image(file or stream, name=name)
    return size


def prepare_image(preprocess: ImagePreprocess, image: DecodedImage) -> Prepared:
    """Return the image as an encoder takes it, (C, height, width) float32, and its placement.

    8-bit images give what the CLIP and SigLIP processors of transformers give (Pillow backend).
    Deeper ones are windowed first and resized without rounding.

    Raises:
        MediaError: a deep image with neither a window nor a declared range, sides too unequal to be
            cropped, or one value for every pixel of an image that varies.
    """
    layers = _windowed(preprocess, image) if image.is_deep else [_shallow(preprocess, image)]
    height, width = preprocess.size
    placement = Placement.of_source(image.pixels.shape[:2])
    placement = placement.resized(_fitted_size(preprocess, placement.source_shape, image.name))
    top, left = _margins(preprocess, placement.shape)
    placement = placement.boxed((top, left), (height, width))
    fitted = [np.asarray(_fit(layer, preprocess, image.name), dtype=np.float32) for layer in layers]
    pixels = (
        fitted[0] if len(fitted) == 1 else np.stack(fitted, axis=-1)
    )  # [H, W] or [H, W, C], values 0..255
    pixels = (pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)) * np.float32(
        1 / 255
    )
    by_table = image.voi is not None and preprocess.window is None
    window = image.shown_range(preprocess.window) if image.is_deep and not by_table else None
    transform = str(image.voi) if by_table else f"window {list(window)}" if window else "no window"
    check_prepared(
        pixels,
        image.pixels,
        name=image.name,
        unit="pixel",
        windows=[window] if window else [],
        trace=lambda channel: [
            Step.of("the file", image.pixels, tolerance=0.0),
            Step.of(transform, np.asarray(layers[channel % len(layers)], np.float32) / 255),
            Step.of(f"fit {preprocess.fit} to {width} x {height}", pixels[channel]),
        ],
    )
    if pixels.shape[0] != preprocess.channels:
        pixels = np.repeat(pixels, preprocess.channels, axis=0)
    mean = np.asarray(preprocess.mean, dtype=np.float32)[:, None, None]
    std = np.asarray(preprocess.std, dtype=np.float32)[:, None, None]
    pixels = (pixels - mean) / std
    if preprocess.fit == "pad":
        pixels = _pad(pixels, top, left, height, width)
    return Prepared(np.ascontiguousarray(pixels), placement)


@contextmanager
def _regular_file(file: Path, name: str) -> Iterator[BinaryIO]:
    """Open a regular file. Its type is checked after opening: the checked file is the read one."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise MediaError(f"{name}: cannot be opened ({error.strerror})") from None
    if not stat.S_ISREG(
        os.fstat(descriptor).st_mode
    ):  # asked first: a folder cannot even become a stream
        os.close(descriptor)
        raise MediaError(f"{name}: expected an image file, found a folder, device or pipe")
    with os.fdopen(descriptor, "rb") as stream:
        yield stream


def _head(stream: BinaryIO, name: str) -> bytes:
    head = stream.read(HEAD)
    stream.seek(0)
    if not head:
        raise MediaError(f"{name}: the file is empty")
    return head


def _has_end(stream: BinaryIO, head: bytes) -> bool:
    """Return true if an end marker is near the end of a PNG or JPEG; true for other formats."""
    mark = next((end for start, end in _END_MARKS.items() if head.startswith(start)), None)
    if mark is None:
        return True
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _TAIL))
    return mark in stream.read(_TAIL)


def _is_turned(image: ImageFile.ImageFile, stream: BinaryIO) -> bool:
    """Return true if the EXIF orientation exchanges rows and columns; no pixel is decoded for it.

    Pillow decodes all of a PNG to look for EXIF data behind its pixels, which few have.
    """
    if image.format == "PNG" and "exif" not in image.info:
        at, size = stream.tell(), stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _TAIL))
        behind = b"eXIf" in stream.read(_TAIL)
        stream.seek(at)
        if not behind:
            return False
    exif = image.getexif()
    # Pillow gives the size of a TIFF as it is after the turn.
    is_applied = image.format == "TIFF" and image.width != exif.get(ExifTags.Base.ImageWidth)
    return exif.get(ExifTags.Base.Orientation, 1) in _TURNED and not is_applied


def _decode(stream: BinaryIO, name: str, path: Path | None) -> DecodedImage:
    head = _head(stream, name)
    if head.startswith(_NPY):
        return _from_array(read_npy(stream, name, max_items=MAX_PIXELS * 3), name)
    if is_dicom_head(head):
        from medm.imaging.dicom_image import read_dicom_image

        return read_dicom_image(path or stream, name)
    suffix = path.suffix.lower() if path else ""
    with _pillow_image(stream, head, name, suffix) as image:
        samples = read_samples(image, lambda: _reopened(stream), name)
    return _from_samples(samples, name)


def _from_pillow(image: Image.Image, name: str) -> DecodedImage:
    """Return the file's samples if Pillow has not decoded them: it would lose 16-bit color."""
    stream = getattr(image, "fp", None)
    if stream is not None and getattr(image, "tile", None) and image.format in (*_FORMATS, "MPO"):
        stream.seek(0)
        return _decode(stream, name, None)
    with _pillow_errors(name):
        _check_header(image, name)
        samples = decoded_samples(image)
    return _from_samples(samples, name)


def _reopened(stream: BinaryIO) -> ImageFile.ImageFile:
    stream.seek(0)
    return Image.open(stream, formats=_FORMATS)


@contextmanager
def _pillow_image(
    stream: BinaryIO, head: bytes, name: str, suffix: str
) -> Iterator[ImageFile.ImageFile]:
    """Open the image and check its header; whatever Pillow raises inside becomes a `MediaError`."""
    with _pillow_errors(name):
        try:
            with _reopened(stream) as image:
                _check_header(image, name)
                check_layout(image, name)
                if image.format in ("JPEG", "MPO"):
                    _check_scans(stream, name)
                yield image
        except UnidentifiedImageError:
            raise MediaError(
                f"{name}: not a {READ} image that is read "
                f"({describe_content(head, stream, suffix)})"
            ) from None


@contextmanager
def _pillow_errors(name: str) -> Iterator[None]:
    try:
        yield
    except MediaError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MediaSizeError(
            f"{name}: declares more than the {MAX_PIXELS} pixels that are allowed"
        ) from None
    except DECODE_ERRORS as error:
        raise MediaError(
            f"{name}: the image is truncated or damaged ({type(error).__name__})"
        ) from None


def _check_header(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise MediaSizeError(
            f"{name}: {image.width} x {image.height} pixels are more than the {MAX_PIXELS} that "
            "are allowed (MEDM_MAX_PIXELS)"
        )
    if max(image.size) > MAX_SIDE:
        raise MediaError(
            f"{name}: {image.width} x {image.height} pixels, expected at most {MAX_SIDE} along one "
            "side; cut it into parts, or set MEDM_MAX_SIDE"
        )
    if (needed := stored_bytes(image)) > MAX_IMAGE_BYTES:
        raise MediaError(
            f"{name}: {image.width} x {image.height} pixels of {needed} bytes are more than the "
            f"{MAX_IMAGE_BYTES} that are allowed; save it smaller or with 8 bits, or set "
            "MEDM_MAX_IMAGE_BYTES"
        )
    # A phone's JPEG may carry a thumbnail or depth map as further frames (MPO); the photograph is
    # the first.
    frames = 1 if image.format == "MPO" else _count_frames(image)
    if frames > 1:
        count = frames if frames < _MAX_FRAMES_COUNTED else f"{frames} or more"
        raise MediaError(
            f"{name}: holds {count} frames where one image is expected; write the wanted frame to "
            "a file"
        )


def _count_frames(image: Image.Image) -> int:
    if image.format != "TIFF":
        return int(getattr(image, "n_frames", 1))
    frames = 1
    try:
        while frames < _MAX_FRAMES_COUNTED:
            image.seek(frames)
            frames += 1
    except EOFError:
        pass  # the last directory
    image.seek(0)
    return frames


def _check_scans(stream: BinaryIO, name: str) -> None:
    """Refuse a JPEG of many scans; data inside a scan cannot hold its start marker."""
    at = stream.tell()
    stream.seek(0)
    scans = stream.read().count(b"\xff\xda")
    stream.seek(at)
    if scans > MAX_SCANS:
        raise MediaError(
            f"{name}: a JPEG of {scans} scans, more than the {MAX_SCANS} that are allowed; save "
            "it anew"
        )


def _from_samples(samples: Samples, name: str) -> DecodedImage:
    image = _from_array(samples.pixels, name)
    full_range = image.full_range if samples.bits is None else (0.0, 2.0**samples.bits - 1)
    return replace(image, alpha=samples.alpha, inverted=samples.inverted, full_range=full_range)


def _check_array(shape: tuple[int, ...], dtype: np.dtype, name: str) -> None:
    """Raise `MediaError` unless an array of this shape and type is an image."""
    color = len(shape) == 3 and shape[2] == 3 and dtype in (np.uint8, np.uint16)
    if not (color or len(shape) == 2) or 0 in shape:
        raise MediaError(
            f"{name}: expected an array (height, width), or (height, width, 3) of uint8 or uint16, "
            f"found {shape} of {dtype}"
        )
    if shape[0] * shape[1] > MAX_PIXELS:
        raise MediaSizeError(
            f"{name}: {shape[1]} x {shape[0]} pixels are more than the {MAX_PIXELS} that are "
            "allowed (MEDM_MAX_PIXELS)"
        )
    if max(shape[:2]) > MAX_SIDE:
        raise MediaError(
            f"{name}: {shape[1]} x {shape[0]} pixels, expected at most {MAX_SIDE} along one side"
        )


def _from_array(array: np.ndarray, name: str) -> DecodedImage:
    _check_array(array.shape, array.dtype, name)
    if array.dtype == np.uint8:
        return DecodedImage(array, name)
    if array.dtype == np.bool_:
        return DecodedImage(array.astype(np.uint8) * 255, name)
    if array.dtype.kind not in "iuf":
        raise MediaError(f"{name}: expected numbers, found an array of {array.dtype}")
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise MediaError(f"{name}: {bad} of {array.size} pixels are NaN or infinite")
    limits = (
        np.iinfo(array.dtype) if array.dtype.kind in "iu" and array.dtype.itemsize <= 2 else None
    )
    return DecodedImage(
        array, name, full_range=(float(limits.min), float(limits.max)) if limits else None
    )


def shown(preprocess: ImagePreprocess, image: DecodedImage) -> np.ndarray:
    """Return an image as it is shown, (H, W, 3) uint8: deep pixels after the window.

    Raises `MediaError` for a deep image without a window or a declared range.
    """
    color = preprocess.model_copy(update={"channels": 3})
    layers = _windowed(color, image) if image.is_deep else [_shallow(color, image).convert("RGB")]
    if len(layers) == 1 and not image.is_deep:
        return np.asarray(layers[0])
    planes = np.stack([np.asarray(layer, np.float32) for layer in layers], axis=-1)
    planes = np.round(planes).clip(0, 255).astype(np.uint8)  # [H, W, 1 or 3]
    return np.repeat(planes, 3, axis=-1) if planes.shape[-1] == 1 else planes


def _shallow(preprocess: ImagePreprocess, image: DecodedImage) -> Image.Image:
    layer = Image.fromarray(image.pixels)
    # Gray pixels are resized once and repeated afterwards: the filters treat channels alike.
    return layer.convert("L") if preprocess.channels == 1 else layer


def _windowed(preprocess: ImagePreprocess, image: DecodedImage) -> list[Image.Image]:
    """One floating-point image per channel, 0..255; one for gray."""
    if image.voi is not None and preprocess.window is None:
        values = image.voi.apply(image.pixels)
        range_text = str(image.voi)
    else:
        low, high = _known_range(preprocess, image)
        numbers = image.pixels.astype(np.float32) - np.float32(low)
        # A window of width 1 (DICOM) is a threshold.
        values = (
            np.clip(numbers / (high - low), 0, 1)
            if high > low
            else (numbers > 0).astype(np.float32)
        )
        range_text = f"window {low:g}..{high:g}"
    if (
        float(values.max()) - float(values.min()) < 1 / 16
        and image.pixels.min() != image.pixels.max()
    ):
        warn_once(
            logger,
            f"shade {range_text}",
            f"{image.name}: values {image.pixels.min():g}..{image.pixels.max():g} are almost one "
            f"shade in the {range_text}; set `window` to the range that matters",
        )
    if image.inverted:
        values = 1 - values
    if image.alpha is not None:  # what is transparent shows white, as in images of 8 bits
        values = 1 - (1 - values) * (image.alpha if values.ndim == 2 else image.alpha[..., None])
    if image.padding is not None:
        values = np.where(image.padding, np.float32(0), values)
    values = values * np.float32(255)
    if values.ndim == 3 and preprocess.channels == 1:
        values = values @ _LUMA
    return (
        [Image.fromarray(values)]
        if values.ndim == 2
        else [Image.fromarray(values[..., i]) for i in range(3)]
    )


def _known_range(preprocess: ImagePreprocess, image: DecodedImage) -> tuple[float, float]:
    window = image.shown_range(preprocess.window)
    if window is None:
        low, high = float(image.pixels.min()), float(image.pixels.max())
        raise MediaError(
            f"{image.name}: {image.pixels.dtype} pixels in {low:g}..{high:g} without a declared "
            "range; say which values become black and white with `window: [lower, upper]`"
        )
    return window


def _fitted_size(preprocess: ImagePreprocess, size: Sequence[int], name: str) -> tuple[int, int]:
    """Return height and width after resizing, before crop or padding, as transformers does."""
    (height, width), (own_height, own_width) = preprocess.size, size
    if preprocess.fit == "squash":
        return height, width
    across, down = width / own_width, height / own_height
    by_width = (across >= down) == (preprocess.fit == "crop")
    if by_width:
        new_height, new_width = max(int(width * own_height / own_width), 1), width
    else:
        new_height, new_width = height, max(int(height * own_width / own_height), 1)
    if new_height * new_width > MAX_PIXELS:
        raise MediaError(
            f"{name}: sides {own_width} x {own_height} are too unequal for `fit: crop` "
            f"({new_width} x {new_height} pixels before the crop); use `fit: pad` or `fit: squash`"
        )
    return new_height, new_width


def _margins(preprocess: ImagePreprocess, fitted: Sequence[int]) -> tuple[int, int]:
    """First row and column of the result in the resized image; negative where it is padded."""
    (height, width), (new_height, new_width) = preprocess.size, fitted
    if preprocess.fit == "pad":
        return -((height - new_height) // 2), -((width - new_width) // 2)
    return (new_height - height) // 2, (new_width - width) // 2


def _fit(image: Image.Image, preprocess: ImagePreprocess, name: str) -> Image.Image:
    """Resized, and for "crop" cropped. "pad" leaves one side short."""
    fitted = _fitted_size(preprocess, (image.height, image.width), name)
    image = image.resize(fitted[::-1], resample=_FILTERS[preprocess.interpolation])
    if preprocess.fit != "crop":
        return image
    (height, width), (top, left) = preprocess.size, _margins(preprocess, fitted)
    return image.crop((left, top, left + width, top + height))


def _pad(pixels: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """Pad with zeros (`mean` after normalization); the image begins at (-`top`, -`left`)."""
    below, right = height - pixels.shape[1] + top, width - pixels.shape[2] + left
    return np.pad(pixels, ((0, 0), (-top, below), (-left, right)))
