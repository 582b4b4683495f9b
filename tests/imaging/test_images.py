"""2-D images: the numbers that transformers gives, every mode of pixels, and files that must be
refused."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import generate_uid
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medm.errors import MediaError, RecipeError
from medm.imaging import ImagePreprocess, fingerprint, load_pixels, preprocess_from_dict
from medm.imaging.images import check_image, prepare_image, read_image
from tests.imaging.tiny import CANARY, body, dicom_slice, phantom, write_report

SIZES = [(300, 400), (500, 333), (224, 224), (20, 31), (225, 1000)]


def noise(height: int, width: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(height * width).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )
    return Image.fromarray(pixels).convert(mode)


def saved(image: Image.Image, form: str = "PNG", **options: object) -> io.BytesIO:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    stream.seek(0)
    return stream


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("mode", "form"), [("RGB", "PNG"), ("L", "BMP"), ("RGBA", "PNG"), ("P", "PNG"), ("CMYK", "TIFF"),
                                            ("LA", "PNG"), ("1", "PNG")])  # fmt: skip
def test_equals_the_processors_of_transformers(size: tuple[int, int], mode: str, form: str) -> None:
    """Measured worst case 5e-7; one grey level of difference would be 0.008."""
    image = noise(*size).convert("L").convert(mode) if mode in ("LA", "1") else noise(*size, mode)
    decoded = read_image(saved(image, form))
    clip = CLIPImageProcessorPil()
    expected = clip(image, return_tensors="np")["pixel_values"][0]
    ours = ImagePreprocess(fit="crop", mean=list(clip.image_mean), std=list(clip.image_std))
    np.testing.assert_allclose(prepare_image(ours, decoded).pixels, expected, atol=1e-5)
    expected = SiglipImageProcessorPil(
        size={"height": 64, "width": 48}, resample=Image.Resampling.BILINEAR
    )(image, return_tensors="np")["pixel_values"][0]
    ours = ImagePreprocess(size=[64, 48], interpolation="bilinear")
    np.testing.assert_allclose(prepare_image(ours, decoded).pixels, expected, atol=1e-5)


def test_pad_keeps_the_aspect_between_bands_of_the_mean() -> None:
    white = Image.new("L", (40, 10), 255)
    pixels = prepare_image(
        ImagePreprocess(size=[8, 8], fit="pad", mean=[0.25] * 3, std=[0.5] * 3),
        read_image(saved(white)),
    ).pixels
    expected = np.zeros((3, 8, 8), dtype=np.float32)  # the mean, normalised
    expected[:, 3:5] = (1 - 0.25) / 0.5
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (7, 3)])
def test_any_shape_becomes_the_declared_one(fit: str, size: tuple[int, int]) -> None:
    pixels = prepare_image(
        ImagePreprocess(size=[6, 9], fit=fit), read_image(saved(noise(*size)))
    ).pixels
    assert pixels.shape == (3, 6, 9)
    assert pixels.dtype == np.float32
    assert pixels.flags.c_contiguous


def test_crop_of_a_hair_is_refused_before_it_fills_memory() -> None:
    decoded = read_image(saved(Image.new("L", (20_000, 1))))
    with pytest.raises(MediaError, match="sides 20000 x 1 are too unequal"):
        prepare_image(ImagePreprocess(fit="crop"), decoded)
    assert prepare_image(ImagePreprocess(fit="pad"), decoded).pixels.shape == (3, 224, 224)


def test_grey_stays_one_channel() -> None:
    preprocess = ImagePreprocess(size=[5, 5], channels=1, mean=[0.0], std=[1.0])
    pixels = prepare_image(
        preprocess, read_image(saved(Image.new("RGB", (5, 5), (10, 20, 30))))
    ).pixels
    np.testing.assert_allclose(
        pixels, np.full((1, 5, 5), round(0.299 * 10 + 0.587 * 20 + 0.114 * 30) / 255), atol=1e-6
    )


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bits_are_windowed_and_not_clipped(form: str) -> None:
    values = np.array([[0, 100, 300], [700, 1100, 65535]], dtype=np.uint16)
    decoded = read_image(saved(Image.fromarray(values), form))
    np.testing.assert_array_equal(decoded.pixels, values)
    plain = {"size": [2, 3], "channels": 1, "mean": [0.0], "std": [1.0]}
    pixels = prepare_image(ImagePreprocess(**plain, window=[100, 1100]), decoded).pixels
    np.testing.assert_allclose(pixels[0], [[0, 0, 0.2], [0.6, 1, 1]], atol=1e-6)
    pixels = prepare_image(ImagePreprocess(**plain), decoded).pixels  # the whole declared range
    np.testing.assert_allclose(pixels[0], values / 65535, atol=1e-6)


def test_a_dark_16_bit_image_warns(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medm.imaging.notices._logged", set())
    decoded = read_image(
        saved(Image.fromarray(np.array([[0, 4095]], dtype=np.uint16))), name="x.png"
    )
    prepare_image(ImagePreprocess(window=[0, 65535.5]), decoded)
    assert "x.png: values 0..4095 are almost one shade in the window 0..65535.5" in caplog.text


def test_float_images_need_a_declared_window() -> None:
    decoded = read_image(
        saved(Image.fromarray(np.array([[0.5, 2.5]], dtype=np.float32)), "TIFF"), name="f.tif"
    )
    with pytest.raises(
        MediaError, match=r"f.tif: float32 pixels in 0.5..2.5 without a declared range; .*`window"
    ):
        prepare_image(ImagePreprocess(), decoded)
    assert prepare_image(ImagePreprocess(window=[0.0, 3.0]), decoded).pixels.shape == (3, 224, 224)


def test_exif_orientation_is_applied_and_metadata_dropped() -> None:
    image = Image.new("RGB", (6, 4))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to the right"
    exif[0x010E] = CANARY
    decoded = read_image(saved(image, "PNG", exif=exif))
    assert decoded.pixels.shape == (6, 4, 3)
    assert decoded.pixels[0, 3].tolist() == [255, 0, 0]
    assert CANARY not in repr(decoded)


def test_arrays_as_images(tmp_path: Path) -> None:
    for array in (
        np.eye(3, dtype=bool),
        np.eye(3, dtype=np.uint8),
        np.zeros((2, 2, 3), dtype=np.uint8),
    ):
        np.save(tmp_path / "a.npy", array)
        np.testing.assert_array_equal(
            read_image(tmp_path / "a.npy").pixels, array * (255 if array.dtype == bool else 1)
        )


def dicom(path: Path, change: Callable[[pydicom.Dataset], None] | None = None) -> Path:
    dataset = dicom_slice(
        phantom(), body()[6], 0, series=generate_uid(), study=generate_uid(), number=1
    )
    if change is not None:
        change(dataset)
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_dicom_uses_the_window_of_the_file_or_of_the_recipe(tmp_path: Path) -> None:
    def lung(dataset: pydicom.Dataset) -> None:
        dataset.WindowCenter, dataset.WindowWidth = [-600, 40], [1500, 400]

    path = dicom(tmp_path / "a", lung)
    decoded = read_image(path)
    np.testing.assert_array_equal(decoded.pixels, body()[6])
    assert decoded.window == (-600.5 - 749.5, -600.5 + 749.5)
    plain = {"size": [20, 26], "channels": 1, "mean": [0.0], "std": [1.0]}
    np.testing.assert_allclose(
        load_pixels(path, ImagePreprocess(**plain))[0],
        np.clip((body()[6] + 1350) / 1499, 0, 1),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        load_pixels(path, ImagePreprocess(**plain, window=[-160, 240]))[0],
        np.clip((body()[6] + 160) / 400, 0, 1),
        atol=1e-5,
    )
    with path.open("rb") as stream:
        np.testing.assert_array_equal(read_image(stream).pixels, decoded.pixels)


def test_dicom_without_window_uses_its_declared_range(tmp_path: Path) -> None:
    def twelve_bits(dataset: pydicom.Dataset) -> None:
        dataset.BitsStored, dataset.HighBit = 12, 11

    assert read_image(dicom(tmp_path / "a", twelve_bits)).full_range == (-1024, 2 * 4095 - 1024)


@pytest.mark.parametrize(
    ("bits", "signed"), [(12, 0), (16, 0), (16, 1)]
)  # GDCM refuses 12 signed bits
@pytest.mark.parametrize("rescaled", [True, False])
def test_monochrome1_is_shown_with_white_at_the_low_end(
    tmp_path: Path, bits: int, signed: int, rescaled: bool
) -> None:
    def inverted(dataset: pydicom.Dataset) -> None:
        dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME1", signed
        dataset.BitsStored, dataset.HighBit = bits, bits - 1
        if not rescaled:
            del dataset.RescaleSlope, dataset.RescaleIntercept

    path = dicom(tmp_path / "a", inverted)
    values = body()[6] if rescaled else (body()[6] + 1024) // 2
    np.testing.assert_array_equal(read_image(path).pixels, values)
    preprocess = ImagePreprocess(size=[20, 26], window=[-1000, 1000], mean=[0.0], std=[1.0])
    pixels = load_pixels(path, preprocess)
    np.testing.assert_allclose(pixels[0], 1 - np.clip((values + 1000) / 2000, 0, 1), atol=1e-5)


def test_real_dicom_files_of_every_encoding() -> None:
    """The files that come with pydicom: native, big-endian, RLE, JPEG, JPEG-LS, JPEG 2000, colour,
    palette."""
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    reference = read_image(folder / "MR_small.dcm").pixels
    assert reference.shape == (64, 64)
    np.testing.assert_array_equal(reference, pydicom.dcmread(folder / "MR_small.dcm").pixel_array)
    for name in (
        "MR_small_RLE",
        "MR_small_bigendian",
        "MR_small_implicit",
        "MR_small_jp2klossless",
        "MR_small_jpeg_ls_lossless",
    ):
        np.testing.assert_array_equal(read_image(folder / f"{name}.dcm").pixels, reference)
    for name in (
        "SC_rgb_jpeg_dcmtk",
        "SC_rgb_rle",
        "examples_palette",
        "SC_ybr_full_422_uncompressed",
        "examples_jpeg2k",
    ):
        assert read_image(folder / f"{name}.dcm").pixels.dtype == np.uint8
    with pytest.raises(MediaError, match="need 8192 bytes, the file has 8130"):
        read_image(folder / "MR_truncated.dcm")
    with pytest.raises(MediaError, match="holds 2 frames where one image is expected"):
        read_image(folder / "SC_rgb_rle_2frame.dcm")


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def animated(form: str) -> bytes:
    return saved(
        noise(4, 4), form, save_all=True, append_images=[noise(4, 4, "L").convert("RGB")]
    ).getvalue()


def phi(data: bytes) -> bytes:
    """A comment with a name behind the start of a JPEG."""
    return data[:2] + b"\xff\xfe" + struct.pack(">H", len(CANARY) + 2) + CANARY.encode() + data[2:]


BAD = {
    "empty": (b"", "the file is empty"),
    "web page": (b"<!DOCTYPE html><p>404", "HTML page, perhaps a failed download"),
    "truncated png": (saved(noise(50, 50)).getvalue()[:3000], "truncated or damaged"),
    "truncated jpeg": (phi(saved(noise(50, 50), "JPEG").getvalue()[:900]), "truncated or damaged"),
    "truncated tiff": (saved(noise(50, 50), "TIFF").getvalue()[:3000], "truncated or damaged"),
    "header only": (saved(noise(50, 50)).getvalue()[:20], "damaged|not a PNG"),
    "bomb of 196 Mpixel": (png_header(14_000, 14_000), "more than the 67108864"),
    "bomb of 144 Mpixel": (png_header(12_000, 12_000), "more than the 67108864"),
    "animated png": (animated("PNG"), "holds 2 frames where one image is expected"),
    "pages of a tiff": (animated("TIFF"), "holds 2 frames where one image is expected"),
    "gif": (animated("GIF"), "GIF content under .png"),
    "pdf": (b"%PDF-1.7 " + CANARY.encode(), "PDF content under .png"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0", "PostScript content under .png"),
    "psd": (b"8BPS\0\1" + bytes(30), "PSD content under .png"),
    "noise": (np.random.default_rng(0).bytes(500), "unknown content"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_their_reason(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    data, reason = BAD[case]
    path = tmp_path / "scan.png"
    path.write_bytes(data)
    with (
        caplog.at_level(logging.DEBUG, logger="medm"),
        pytest.raises(MediaError, match=reason) as caught,
    ):
        read_image(path)
    assert str(path) in str(caught.value)
    assert "anary" not in str(caught.value) + caplog.text
    if "truncated" not in case:
        with pytest.raises(MediaError, match=reason):
            check_image(path)


def test_arrays_that_are_no_image(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for array, reason in (
        (np.zeros((2, 2, 2)), r"found \(2, 2, 2\) of float64"),
        (np.array([[np.nan, 1.0]]), "1 of 2 pixels are NaN"),
        (np.zeros((2, 2), dtype=np.complex64), "expected an array of numbers"),
        (np.zeros((0, 2), dtype=np.uint8), r"found \(0, 2\)"),
    ):
        np.save(path, array)
        with pytest.raises(MediaError, match=reason):
            read_image(path)
    np.save(path, np.array([[CANARY]], dtype=object), allow_pickle=True)
    with pytest.raises(MediaError, match="Python objects"):
        read_image(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="cannot be opened"):
        read_image(tmp_path / "nothing.png")
    with pytest.raises(MediaError, match="found a folder"):
        read_image(tmp_path)
    with pytest.raises(MediaError, match="without an image"):
        read_image(write_report(tmp_path / "sr", "1.2.840.10008.5.1.4.1.1.88.22", "SR"))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP"])
def test_mutated_files_give_pixels_or_a_media_error(form: str) -> None:
    """125 damaged files of each format from a fixed seed: nothing but a `MediaError` comes out."""
    whole = saved(noise(16, 16), form).getvalue()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(125):
        data = bytearray(whole)
        for at in generator.integers(0, len(data), generator.integers(1, 8)):
            data[at] = generator.integers(0, 256)
        try:
            prepare_image(
                ImagePreprocess(size=[4, 4], window=[0.0, 1.0]), read_image(io.BytesIO(data))
            )
        except MediaError:
            refused += 1
    assert refused > 0


def test_descriptions_come_back_from_their_dictionary() -> None:
    preprocess = ImagePreprocess(size=[3, 4], fit="crop", window=[-1.0, 2.0])
    assert preprocess_from_dict(preprocess.model_dump()) == preprocess
    assert fingerprint(preprocess) == fingerprint(preprocess_from_dict(preprocess.model_dump()))
    assert fingerprint(preprocess) != fingerprint(
        ImagePreprocess(size=[3, 4], fit="crop", window=[-1.0, 2.5])
    )
    with pytest.raises(RecipeError, match="unknown kind 'imagge': did you mean 'image'"):
        preprocess_from_dict({"kind": "imagge"})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"size": [0, 4]}, "size: expected numbers above 0"),
        ({"mean": [0.5, 0.5]}, "mean: expected 1 or 3 values"),
        ({"channels": 1}, "mean: expected 1 or 1 values"),
        ({"std": [0.0, 1.0, 1.0]}, "std: expected numbers above 0"),
        ({"window": [5.0, 5.0]}, r"window: expected \[lower, upper\]"),
        ({"sise": [4, 4]}, "did you mean 'size'"),
    ],
)
def test_impossible_descriptions_are_refused(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        preprocess_from_dict({"kind": "image", **fields})
