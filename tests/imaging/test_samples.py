"""Images of every depth, color type and byte order: the stored numbers, or a refusal that names the
layout."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from medm.errors import MediaError
from medm.imaging import ImagePreprocess
from medm.imaging.images import check_image, prepare_image, read_image
from medm.imaging.volumes import read_volume
from tests.imaging.rasters import png, png_chunk, tiff, written

RNG = np.random.default_rng(0)


def shown(data: bytes, *, channels: int = 3, **options: object) -> np.ndarray:
    """Pixels (C, H, W) in 0..1 of an image whose size is kept."""
    decoded = read_image(io.BytesIO(data))
    height, width = decoded.pixels.shape[:2]
    plain = {
        "size": [height, width],
        "channels": channels,
        "mean": [0.0],
        "std": [1.0],
        "interpolation": "nearest",
    }
    return prepare_image(ImagePreprocess(**plain, **options), decoded).pixels


def halves(left: int, right: int, channels: int, *, alpha: bool = False) -> np.ndarray:
    """(8, 8, channels) of two values, opaque where there is an alpha channel."""
    samples = np.full((8, 8, channels), right, dtype=np.uint16)
    samples[:, :4] = left
    if alpha:
        samples[..., -1] = 65535
    return samples


def deep_files(left: int, right: int) -> dict[str, bytes]:
    """The same two halves in every 16-bit layout that is read."""
    gray = halves(left, right, 1)[..., 0]
    rgb, rgba = halves(left, right, 3), halves(left, right, 4, alpha=True)
    files = {
        "png gray": png(gray, 0),
        "png rgb": png(rgb, 2),
        "png gray alpha": png(halves(left, right, 2, alpha=True), 4),
        "png rgba": png(rgba, 6),
    }
    for order in "<>":
        for deflate in (False, True):
            files |= {
                f"tiff gray {order} {deflate}": tiff(gray, 1, order=order, deflate=deflate),
                f"tiff signed {order} {deflate}": tiff(
                    gray.astype(np.int16), 1, order=order, deflate=deflate
                ),
                f"tiff int32 {order} {deflate}": tiff(
                    gray.astype(np.int32), 1, order=order, deflate=deflate
                ),
                f"tiff float {order} {deflate}": tiff(
                    gray.astype(np.float32), 1, order=order, deflate=deflate
                ),
                f"tiff rgb {order} {deflate}": tiff(rgb, 2, order=order, deflate=deflate),
                f"tiff rgba {order} {deflate}": tiff(
                    rgba, 2, order=order, deflate=deflate, extra=2
                ),
                f"tiff rgba premultiplied {order} {deflate}": tiff(
                    rgba, 2, order=order, deflate=deflate, extra=1
                ),
                f"tiff rgb and a fourth {order} {deflate}": tiff(
                    rgba, 2, order=order, deflate=deflate, extra=0
                ),
                f"tiff rgba undeclared {order} {deflate}": tiff(
                    rgba, 2, order=order, deflate=deflate
                ),
            }
    return files


@pytest.mark.parametrize("case", deep_files(0, 0))
def test_deep_images_are_windowed_at_full_depth(case: str) -> None:
    for (left, right), window, expected in (
        ((4095, 0), [0, 4095], (1, 0)),
        ((0x0100, 0x01FF), [256, 511], (0, 1)),
        ((1234, 2000), [0, 4095], (1234 / 4095, 2000 / 4095)),
    ):
        pixels = shown(deep_files(left, right)[case], window=window)
        np.testing.assert_allclose(pixels[:, :, :4], expected[0], atol=1e-5)
        np.testing.assert_allclose(pixels[:, :, 4:], expected[1], atol=1e-5)


@pytest.mark.parametrize("form", ["png", "tiff"])
def test_channels_of_deep_color_stay_apart(form: str) -> None:
    samples = RNG.integers(0, 65536, (5, 7, 3)).astype(np.uint16)
    data = png(samples, 2) if form == "png" else tiff(samples, 2)
    np.testing.assert_array_equal(read_image(io.BytesIO(data)).pixels, samples)
    np.testing.assert_allclose(shown(data), np.moveaxis(samples, -1, 0) / 65535, atol=1e-6)
    luma = samples @ np.array([0.299, 0.587, 0.114]) / 65535
    np.testing.assert_allclose(shown(data, channels=1)[0], luma, atol=1e-6)


def test_transparent_deep_pixels_show_white() -> None:
    gray = np.array([[0, 65535], [30000, 30000]], dtype=np.uint16)
    alpha = np.array([[0, 65535], [65535, 0]], dtype=np.uint16)
    expected = np.array([[1, 1], [30000 / 65535, 1]])
    for data in (
        png(np.stack([gray, alpha], axis=-1), 4),
        png(np.stack([gray, gray, gray, alpha], axis=-1), 6),
        tiff(np.stack([gray, gray, gray, alpha], axis=-1), 2, extra=2),
    ):
        np.testing.assert_allclose(shown(data)[0], expected, atol=1e-6)
    keyed = png_chunk(b"tRNS", np.array([0], dtype=">u2").tobytes())
    np.testing.assert_allclose(
        shown(png(gray, 0, before=keyed))[0], [[1, 1], [30000 / 65535] * 2], atol=1e-6
    )
    keyed = png_chunk(b"tRNS", np.array([0, 0, 0], dtype=">u2").tobytes())
    color = np.stack([gray] * 3, axis=-1)
    np.testing.assert_allclose(
        shown(png(color, 2, before=keyed))[0], [[1, 1], [30000 / 65535] * 2], atol=1e-6
    )


def test_premultiplied_deep_color_is_divided_by_its_alpha() -> None:
    samples = np.array([[[10000, 10000, 10000, 32768]]], dtype=np.uint16)
    half = 32768 / 65535
    np.testing.assert_allclose(
        shown(tiff(samples, 2, extra=1)), 10000 / 65535 + 1 - half, atol=1e-4
    )


@pytest.mark.parametrize(
    ("bits", "color"), [(1, 0), (2, 0), (4, 0), (8, 0), (1, 3), (2, 3), (4, 3), (8, 3)]
)
def test_shallow_gray_and_palettes_of_every_depth(bits: int, color: int) -> None:
    indices = RNG.integers(0, 2**bits, (3, 11))
    palette = RNG.integers(0, 256, (2**bits, 3)).astype(np.uint8)
    data = png(
        indices,
        color,
        bits=bits,
        before=png_chunk(b"PLTE", palette.tobytes()) if color == 3 else b"",
    )
    expected = palette[indices] if color == 3 else np.round(indices * 255 / (2**bits - 1))
    np.testing.assert_array_equal(read_image(io.BytesIO(data)).pixels, expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
def test_tiffs_of_8_bits(order: str, deflate: bool) -> None:
    gray = RNG.integers(0, 256, (4, 5)).astype(np.uint8)
    color = RNG.integers(0, 256, (4, 5, 3)).astype(np.uint8)
    palette = RNG.integers(0, 256, (3, 256))
    wide = {320: tuple(int(entry) * 257 for entry in palette.ravel())}
    narrow = {
        320: tuple(int(entry) for entry in palette.ravel())
    }  # 8 bits where 16 belong: some writers do it
    for samples, options, expected in (
        (gray, {"photometric": 1}, gray),
        (gray, {"photometric": 0}, 255 - gray),
        (color, {"photometric": 2}, color),
        (color, {"photometric": 2, "planar": 2}, color),
        (gray, {"photometric": 3, "tags": wide}, palette.T[gray]),
        (gray, {"photometric": 3, "tags": narrow}, palette.T[gray]),
        (gray.view(np.int8), {"photometric": 1}, gray.view(np.int8)),
    ):
        data = tiff(samples, order=order, deflate=deflate, **options)
        np.testing.assert_array_equal(read_image(io.BytesIO(data)).pixels, expected)


def test_min_is_white_is_shown_inverted_and_windowed_by_stored_values(tmp_path: Path) -> None:
    values = np.array([[0, 1000], [4095, 2000]], dtype=np.uint16)
    for samples in (values, values.astype(np.float32)):
        np.testing.assert_allclose(
            shown(tiff(samples, 0), window=[0, 4095])[0], 1 - values / 4095, atol=1e-6
        )
    np.testing.assert_allclose(shown(tiff(values, 0))[0], 1 - values / 65535, atol=1e-6)
    (tmp_path / "stack").mkdir()
    for number in (1, 2):
        written(tmp_path / "stack" / f"{number}.tif", tiff(values, 0))
    np.testing.assert_array_equal(
        read_volume(tmp_path / "stack").voxels[1], 65535 - values.astype(np.float32)
    )


def test_the_declared_range_is_that_of_the_type() -> None:
    zeros = np.zeros((2, 2))
    for dtype, expected in (
        (np.uint16, (0, 65535)),
        (np.int16, (-32768, 32767)),
        (np.int8, (-128, 127)),
        (np.int32, None),
        (np.float32, None),
    ):
        assert read_image(io.BytesIO(tiff(zeros.astype(dtype), 1))).full_range == expected
    top = np.array([[2**32 - 1, 2**31]], dtype=np.uint32)
    np.testing.assert_array_equal(read_image(io.BytesIO(tiff(top, 1))).pixels, top)


@pytest.mark.parametrize(
    ("samples", "options", "reason"),
    [
        (
            halves(9, 0, 3),
            {"photometric": 2, "planar": 2},
            "RGB, 3 unsigned samples.*separate planes: 16-bit color",
        ),
        (
            halves(9, 0, 4),
            {"photometric": 5},
            "CMYK, 4 unsigned samples of 16 bits a pixel: 16-bit color is not read",
        ),
        (
            halves(9, 0, 2),
            {"photometric": 1, "extra": 2},
            "MinIsBlack, 2 unsigned samples of 16 bits",
        ),
        (
            halves(9, 0, 3).astype(np.float32),
            {"photometric": 2},
            "RGB, 3 floating-point samples of 32 bits",
        ),
        (
            halves(9, 0, 1)[..., 0].astype(np.float64),
            {"photometric": 1},
            "1 floating-point samples of 64 bits",
        ),
        (
            halves(9, 0, 1)[..., 0].astype(np.float16),
            {"photometric": 1},
            "1 floating-point samples of 16 bits",
        ),
        (halves(9, 0, 3).astype(np.uint8), {"photometric": 8}, "CIELAB"),
        (halves(9, 0, 3).astype(np.uint8), {"photometric": 6}, r"YCbCrSubSampling \(tag 530\)"),
        (
            halves(9, 0, 3).astype(np.uint8),
            {"photometric": 6, "tags": {530: (1, 1), 532: (16, 235, 128, 240, 128, 240)}},
            "ReferenceBlackWhite",
        ),
    ],
)
@pytest.mark.parametrize("deflate", [False, True])
def test_layouts_that_are_not_read_are_named(
    samples: np.ndarray, options: dict[str, object], reason: str, deflate: bool, tmp_path: Path
) -> None:
    data = tiff(samples, deflate=deflate, **options)
    if deflate and options["photometric"] == 6:
        assert read_image(io.BytesIO(data)).pixels.shape == (
            8,
            8,
            3,
        )  # libtiff knows how to read these
        return
    path = written(tmp_path / "a.tif", data)
    for look in (read_image, check_image):  # the header is enough to tell
        with pytest.raises(MediaError, match=reason):
            look(path)


@pytest.mark.skipif(PIL.__version__ < "13", reason="Pillow before 13 refuses it, and so does medm")
def test_uncompressed_full_range_ycbcr_is_read() -> None:
    samples = np.full((4, 4, 3), 128, dtype=np.uint8)
    samples[..., 0] = 77
    assert (read_image(io.BytesIO(tiff(samples, 6, tags={530: (1, 1)}))).pixels == 77).all()


@pytest.mark.parametrize("turn", [1, 2, 3, 4, 5, 6, 7, 8])
def test_orientation_of_deep_images(turn: int) -> None:
    samples = RNG.integers(0, 65536, (3, 5, 3)).astype(np.uint16)
    expected = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    chunk = png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    for color, kept in ((2, samples), (0, samples[..., 0])):
        for data in (
            png(kept, color, before=chunk),
            tiff(kept, 2 if color else 1, tags={274: (turn,)}),
        ):
            pixels = read_image(io.BytesIO(data)).pixels
            np.testing.assert_array_equal(
                pixels.reshape(*pixels.shape[:2], -1), expected(kept.reshape(3, 5, -1))
            )


def jpeg(mode: str) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (16, 16), 0 if mode == "L" else (0, 255, 255, 0)).save(
        stream, "JPEG", quality=95
    )
    return stream.getvalue()


def test_cmyk_jpeg_needs_the_marker_that_says_what_0_means() -> None:
    data = jpeg("CMYK")  # no cyan, full magenta and yellow: red
    pixels = read_image(io.BytesIO(data)).pixels
    assert pixels[8, 8, 0] > 240
    assert pixels[8, 8, 1:].max() < 15
    at = data.index(b"\xff\xee")
    length = int.from_bytes(data[at + 2 : at + 4], "big")
    with pytest.raises(MediaError, match="CMYK JPEG without an Adobe marker"):
        read_image(io.BytesIO(data[:at] + data[at + 2 + length :]))


def test_a_stack_of_deep_slices_keeps_its_values_or_is_refused(tmp_path: Path) -> None:
    values = RNG.integers(0, 65536, (4, 5)).astype(np.uint16)
    for number in (1, 2):
        written(tmp_path / f"{number}.png", png(np.stack([values] * 3, axis=-1), 2))
    np.testing.assert_array_equal(read_volume(tmp_path).voxels[0], values.astype(np.float32))
    half = np.stack([values, np.full_like(values, 30000)], axis=-1)
    written(tmp_path / "2.png", png(half, 4))
    with pytest.raises(MediaError, match=r"2\.png: a slice with transparent pixels"):
        read_volume(tmp_path)
