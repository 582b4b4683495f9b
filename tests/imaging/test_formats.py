"""Content that is not read as an image is named in the refusal, whatever the file's suffix says."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from medm.errors import MediaError
from medm.imaging.images import check_image, read_image
from medm.imaging.probe import probe
from tests.imaging.rasters import written
from tests.imaging.tiny import body, dicom_slice, phantom


def saved(form: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 8, 7)).save(stream, form)
    return stream.getvalue()


def jpeg_with(code: int, bits: int) -> bytes:
    data = saved("JPEG")
    at = data.index(b"\xff\xc0")
    return data[: at + 1] + bytes([code]) + data[at + 2 : at + 4] + bytes([bits]) + data[at + 5 :]


CONTENT = {
    "webp": (b"RIFF\x24\0\0\0WEBPVP8 " + bytes(30), "WebP content under .jpg"),
    "gif": (saved("GIF"), "GIF content under .jpg"),
    "jpeg 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(30), "JPEG 2000 content under .jpg"),
    "jpeg 2000 codestream": (b"\xff\x4f\xff\x51" + bytes(30), "JPEG 2000 content under .jpg"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(30), "HEIC content under .jpg"),
    "avif": (b"\0\0\0\x18ftypavif" + bytes(30), "AVIF content under .jpg"),
    "svg": (
        b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
        "SVG content under .jpg",
    ),
    "pdf": (b"%PDF-1.7", "PDF content under .jpg"),
    "pnm": (b"P5 8 8 255\n" + bytes(64), "PNM content under .jpg"),
    "video": (b"\0\0\0\x18ftypisom" + bytes(30), "MP4 or other video content under .jpg"),
    "nifti": (b"\x5c\1\0\0" + bytes(348), "NIfTI volume content under .jpg; give it as a volume"),
    "gzip": (b"\x1f\x8b\x08" + bytes(30), "gzip content under .jpg"),
    "git lfs": (
        b"version https://git-lfs.github.com/spec/v1\n",
        r"Git LFS pointer \(not downloaded\) content",
    ),
    "12 bits": (jpeg_with(0xC1, 12), "a JPEG of 12 bits per sample; expected 8 bits"),
    "jpeg-ls": (b"\xff\xd8\xff\xf7\0\x0b\x08" + bytes(30), "a JPEG-LS JPEG of 8 bits per sample"),
    "bigtiff": (
        b"II+\0\x08\0\0\0" + bytes(30),
        "a BigTIFF file that cannot be read|truncated or damaged",
    ),
}


@pytest.mark.parametrize("case", CONTENT)
def test_content_is_named(tmp_path: Path, case: str) -> None:
    data, reason = CONTENT[case]
    path = written(tmp_path / "a.jpg", data)
    for look in (read_image, check_image, lambda path: probe(path, kind="image")):
        with pytest.raises(MediaError, match=reason) as caught:
            look(path)
        assert str(path) in str(caught.value)
    with pytest.raises(MediaError) as caught:  # an upload has no suffix
        read_image(io.BytesIO(data))
    assert "under" not in str(caught.value)


@pytest.mark.skipif(not features.check("webp"), reason="this Pillow has no WebP")
def test_a_real_webp_is_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"WebP content under \.png; convert it to PNG"):
        read_image(written(tmp_path / "a.png", saved("WEBP")))
    with pytest.raises(MediaError, match=r"\(WebP content; convert it to PNG\)"):
        read_image(written(tmp_path / "a.webp", saved("WEBP")))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP", "DICOM"])
def test_supported_content_is_read_under_another_suffix(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.jpg"
    if form == "DICOM":
        dataset = dicom_slice(phantom(), body()[6], 0, series="1.2", study="1.3", number=1)
        dataset.save_as(path, enforce_file_format=True)
        np.testing.assert_array_equal(read_image(path).pixels, body()[6])
    else:
        assert read_image(written(path, saved(form))).pixels[0, 0].tolist() == [9, 8, 7]
    check_image(path)


def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded() -> None:
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    assert read_image(io.BytesIO(data)).pixels.shape == (64, 64)
    last = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(MediaError, match=r"a JPEG of \d+ scans, more than the 100"):
        read_image(io.BytesIO(data[:-2] + last * 200 + data[-2:]))


def test_frames_of_a_tiff_are_counted_only_so_far() -> None:
    pages = [Image.new("L", (1, 1), shade) for shade in range(150)]
    stream = io.BytesIO()
    pages[0].save(stream, "TIFF", save_all=True, append_images=pages[1:])
    stream.seek(0)
    with pytest.raises(MediaError, match="holds 100 or more frames"):
        read_image(stream)
