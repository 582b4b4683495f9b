"""Images of Pillow and arrays give the pixels that their files give."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medm.errors import MediaError
from medm.imaging import ImagePreprocess, VolumePreprocess, load_pixels

RGB = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65536, (9, 7), np.uint16)
PLAIN: dict[str, Any] = {"size": [8, 8], "mean": [0.0], "std": [1.0]}
COLOR = ImagePreprocess(size=[8, 8])
GRAY = ImagePreprocess(channels=1, window=[0, 65535], **PLAIN)


def rgb_png(file: Path) -> ImagePreprocess:
    Image.fromarray(RGB).save(file)
    return COLOR


def turned_jpeg(file: Path) -> ImagePreprocess:
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright
    Image.fromarray(RGB).save(file.with_suffix(".jpg"), exif=exif)
    file.with_suffix(".jpg").rename(file)
    return COLOR


def transparent_png(file: Path) -> ImagePreprocess:
    Image.fromarray(np.dstack([RGB, RGB[..., 0]])).save(file)
    return COLOR


def palette_png(file: Path) -> ImagePreprocess:
    Image.fromarray(RGB).quantize(16).save(file)
    return COLOR


def deep_gray_png(file: Path) -> ImagePreprocess:
    Image.fromarray(DEEP).save(file)
    return GRAY


def float_tiff(file: Path) -> ImagePreprocess:
    Image.fromarray(DEEP.astype(np.float32)).save(file, format="TIFF")
    return GRAY


def white_is_zero_tiff(file: Path) -> ImagePreprocess:
    Image.fromarray(DEEP).save(file, format="TIFF", tiffinfo={262: 0})
    return GRAY


KINDS = [
    rgb_png,
    turned_jpeg,
    transparent_png,
    palette_png,
    deep_gray_png,
    float_tiff,
    white_is_zero_tiff,
]


@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("write", KINDS)
def test_an_image_of_pillow_is_read_as_its_file(write: Any, decoded: bool, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    preprocess = write(file)
    expected = load_pixels(file, preprocess)
    assert expected.std() > 0.05
    with Image.open(file) as image:
        if decoded:
            image.load()
        np.testing.assert_array_equal(load_pixels(image, preprocess), expected)
        image.load()  # the caller's image is not used up
        np.testing.assert_array_equal(load_pixels(image, preprocess), expected)


def test_16_bit_color_is_not_lost_on_the_way_through_pillow(tmp_path: Path) -> None:
    """Pillow keeps the high byte of 16-bit color: its image is read from its file where it is not
    decoded yet."""
    file = tmp_path / "deep.png"
    _write_deep_color(file)
    preprocess = ImagePreprocess(**{**PLAIN, "mean": [0.0] * 3, "std": [1.0] * 3}, window=[0, 255])
    expected = load_pixels(file, preprocess)
    assert expected.max() == 1.0 > 0.4 > expected[:, 0, 0].max()
    with Image.open(file) as image:
        np.testing.assert_array_equal(load_pixels(image, preprocess), expected)


def _write_deep_color(file: Path) -> None:
    """An 8 x 8 PNG of 16-bit RGB, left half 51 and right half 255, which Pillow itself cannot
    write."""
    import struct
    import zlib

    row = b"\0" + struct.pack(">24H", *[51] * 12, *[255] * 12)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(row * 8)),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize(
    ("array", "preprocess"),
    [
        (RGB, COLOR), (RGB[..., 0], COLOR), (DEEP, GRAY), (DEEP.astype(np.float32), GRAY), (DEEP > 30000, COLOR),
        (DEEP.astype(np.int32), GRAY), (RGB.astype(np.uint16) * 257, COLOR), (RGB[::-1, ::2], COLOR),
    ],
)  # fmt: skip
def test_an_array_is_read_as_its_npy_file(
    array: np.ndarray, preprocess: ImagePreprocess, tmp_path: Path
) -> None:
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(
        load_pixels(array, preprocess), load_pixels(tmp_path / "a.npy", preprocess)
    )


@pytest.mark.parametrize("shape", [(4, 5, 6), (1, 4, 5, 6)])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float64, np.float16])
def test_a_volume_array_is_read_as_its_npy_file(
    shape: tuple[int, ...], dtype: Any, tmp_path: Path
) -> None:
    array = (np.random.default_rng(2).random(shape) * 200).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    preprocess = VolumePreprocess(size=[4, 4, 4], scale="minmax")
    np.testing.assert_array_equal(
        load_pixels(array, preprocess), load_pixels(tmp_path / "a.npy", preprocess)
    )


def frames() -> Image.Image:
    stream = io.BytesIO()
    pages = [Image.new("L", (4, 4), shade) for shade in (0, 99)]
    pages[0].save(stream, "GIF", save_all=True, append_images=pages[1:])
    return Image.open(stream)


@pytest.mark.parametrize(
    ("source", "preprocess", "message"),
    [
        (
            np.zeros((3, 8, 8), np.uint8),
            COLOR,
            r"expected an array \(height, width\).*found \(3, 8, 8\) of uint8",
        ),
        (np.zeros((8, 8, 3), np.float32), COLOR, "found .* of float32"),
        (np.full((8, 8), np.nan), COLOR, "NaN or infinite"),
        (np.zeros((0, 8), np.uint8), COLOR, "found"),
        (np.array([["a"]]), COLOR, "expected numbers"),
        (DEEP.astype(np.float32), COLOR, "window"),
        (frames(), COLOR, "2 frames"),
        (
            np.zeros((8, 8), np.uint8),
            VolumePreprocess(size=[4, 4, 4]),
            "expected a volume of 3 axes",
        ),
        (np.full((4, 4, 4), np.inf), VolumePreprocess(size=[4, 4, 4]), "NaN or infinite"),
        (
            np.zeros((4, 4, 4), complex),
            VolumePreprocess(size=[4, 4, 4]),
            "expected an array of numbers",
        ),
        (Image.new("L", (4, 4)), VolumePreprocess(size=[4, 4, 4]), "expected a path or an array"),
    ],
)
def test_what_cannot_be_read_is_refused(source: Any, preprocess: Any, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        load_pixels(source, preprocess)
