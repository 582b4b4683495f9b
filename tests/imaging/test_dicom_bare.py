"""DICOM without its file header, and the other files of a series folder: never a shorter volume."""

from __future__ import annotations

import io
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.filewriter import write_file_meta_info

from medm.errors import MediaError
from medm.imaging import VolumePreprocess, load_pixels
from medm.imaging.dicom_bare import is_dicom_head
from medm.imaging.images import check_image, read_image
from medm.imaging.notices import collected
from medm.imaging.volumes import read_volume
from tests.imaging.tiny import body, phantom, write_report, write_series

FILES = Path(pydicom.__file__).parent / "data" / "test_files"
PREPROCESS = VolumePreprocess(size=[4, 4, 4])


def strip(path: Path, *, implicit: bool = True, little: bool = True, meta: bool = False) -> None:
    """Write a file again without preamble and prefix, and without meta information unless
    `meta`."""
    dataset = pydicom.dcmread(path)
    buffer = io.BytesIO()
    if meta:
        write_file_meta_info(buffer, dataset.file_meta, enforce_standard=True)
        implicit = False
    if not little:
        dataset["PixelData"]._value = (
            np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
        )
    bare = Dataset(dataset)
    bare.preamble = None  # type: ignore[attr-defined]
    bare.save_as(buffer, implicit_vr=implicit, little_endian=little, enforce_file_format=False)
    path.write_bytes(buffer.getvalue())


ENCODINGS: dict[str, dict[str, bool]] = {
    "implicit": {},
    "explicit": {"implicit": False},
    "big endian": {"implicit": False, "little": False},
    "meta information": {"meta": True},
}


def series(folder: Path, names: Callable[[int], str] = "IM{}".format) -> list[Path]:
    """Four slices."""
    paths = write_series(folder, phantom()[:, :, 4:8], shuffle=False)
    return [path.rename(folder / names(number)) for number, path in enumerate(paths)]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("names", ["IM{}", "{}.dcm", "1.2.840.{}"])
@pytest.mark.parametrize("which", ["all", "last"])
def test_slices_without_file_header_are_read(
    tmp_path: Path, encoding: str, names: str, which: str
) -> None:
    paths = series(tmp_path / "ct", names.format)
    for path in paths if which == "all" else paths[3:]:
        strip(path, **ENCODINGS[encoding])
        assert path.read_bytes()[128:132] != b"DICM"
    volume = read_volume(tmp_path / "ct")
    np.testing.assert_array_equal(volume.voxels, body()[4:8])
    assert volume.unit == "HU"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_one_without_file_header_as_an_image(tmp_path: Path, encoding: str) -> None:
    path = series(tmp_path)[2]
    strip(path, **ENCODINGS[encoding])
    np.testing.assert_array_equal(read_image(path).pixels, body()[6])
    with path.open("rb") as stream:
        np.testing.assert_array_equal(read_image(stream).pixels, body()[6])
    check_image(path)


def test_compressed_pixels_without_file_header(tmp_path: Path) -> None:
    """The meta information names the encoding; without it the pixels cannot be decoded."""
    whole = (FILES / "MR_small_RLE.dcm").read_bytes()
    (tmp_path / "a").write_bytes(whole[132:])
    np.testing.assert_array_equal(
        read_image(tmp_path / "a").pixels, read_image(FILES / "MR_small.dcm").pixels
    )
    behind_meta = 144 + int.from_bytes(whole[140:144], "little")
    (tmp_path / "b").write_bytes(whole[behind_meta:])
    with pytest.raises(
        MediaError, match="b: DICOM without its file header, which would name the encoding"
    ):
        read_image(tmp_path / "b")


def test_color_without_file_header(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    shutil.copy(FILES / "SC_ybr_full_422_uncompressed.dcm", path)
    expected = read_image(path).pixels
    data = path.read_bytes()
    path.write_bytes(data[data.index(b"\x08\0\x05\0CS") :])
    np.testing.assert_array_equal(read_image(path).pixels, expected)


def test_meta_information_without_transfer_syntax_is_refused(tmp_path: Path) -> None:
    path = series(tmp_path)[0]
    strip(path, meta=True)
    path.write_bytes(path.read_bytes().replace(b"\2\0\x10\0UI", b"\2\0\x11\0UI"))
    with pytest.raises(
        MediaError, match=r"without its file header .* without TransferSyntaxUID \(0002,0010\)"
    ):
        read_image(path)


@pytest.mark.parametrize(
    "head",
    [b"", b"\x08\0", bytes(132), b"\x08\0" * 66, b"\x08\0\x05\0" + b"\xff" * 128, b"\0\x08\0\x05ab" + bytes(126),
     b"\x08\0\0\0" + bytes(128), b"\x89PNG\r\n\x1a\n" + bytes(124), np.arange(66, dtype="<u2").tobytes()],
)  # fmt: skip
def test_other_content_is_not_taken_for_dicom(head: bytes) -> None:
    assert not is_dicom_head(head)


LOST: dict[str, tuple[str, bytes, str]] = {
    "empty": ("IM9", b"", "an empty file"),
    "noise": ("IM9", bytes(range(128, 256)) * 4, "unknown content"),
    "zeros": ("9.dcm", bytes(5000), "unknown content"),
    "web page": ("9.dcm", b"<html>404", "HTML page"),
    "text under .dcm": ("9.dcm", b"quota exceeded", "unknown content"),
    "packed": ("9.dcm.gz", b"\x1f\x8b\x08" + bytes(20), "gzip"),
    "download": ("IM9.part", b"\0" * 200, "unknown content"),
    "same suffix as the slices": ("9.mr", bytes(300), "unknown content"),
    "number as suffix": ("1.2.840.9", bytes(300), "unknown content"),
}


@pytest.mark.parametrize("case", LOST)
def test_a_file_that_could_be_a_slice_is_refused(tmp_path: Path, case: str) -> None:
    name, data, what = LOST[case]
    series(tmp_path / "ct", "{}.mr".format if name.endswith(".mr") else "IM{}".format)
    (tmp_path / "ct" / name).write_bytes(data)
    with pytest.raises(
        MediaError, match=rf"ct: {name} could be a slice, but is not DICOM \(.*{what}"
    ):
        load_pixels(tmp_path / "ct", PREPROCESS)


@pytest.mark.parametrize("kept", [0.5, 300 / 1700, 1000 / 1700])
def test_a_slice_cut_before_its_pixels_is_refused(tmp_path: Path, kept: float) -> None:
    """It has no pixels, as a report has none; its class says that it is an image."""
    paths = series(tmp_path / "ct")
    data = paths[3].read_bytes()
    end = data.index(b"\xe0\x7f\x10\0OW")
    paths[3].write_bytes(data[: int(end * kept)])
    with pytest.raises(
        MediaError, match=r"IM3: .*(without Pixel Data|damaged|declares \d+ bytes|transfer syntax)"
    ):
        read_volume(tmp_path / "ct")


@pytest.mark.parametrize("keyword", ["FloatPixelData", "DoubleFloatPixelData"])
def test_pixels_of_another_element_are_named(tmp_path: Path, keyword: str) -> None:
    paths = series(tmp_path / "ct")
    dataset = pydicom.dcmread(paths[3])
    del dataset.PixelData
    setattr(dataset, keyword, bytes(8 * 20 * 26))
    dataset.save_as(paths[3], enforce_file_format=True)
    with pytest.raises(MediaError, match="Float Pixel Data"):
        read_volume(tmp_path / "ct")


def test_other_files_are_passed_over_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "ct"
    series(folder)
    for name in ("Thumbs.db", ".DS_Store", "._IM0", "desktop.ini", "report.pdf", "info.xml"):
        (folder / name).write_bytes(b"x")
    shutil.copy(
        write_report(tmp_path / "sr", "1.2.840.10008.5.1.4.1.1.88.22", "SR"), folder / "DICOMDIR"
    )
    with caplog.at_level(logging.INFO), collected() as notices:
        assert read_volume(folder).voxels.shape[0] == 4
    assert "6 files are skipped; expected DICOM, found " in caplog.text
    assert (
        "skipped DICOM without an image (1; structure sets, reports or directories): DICOM"
        in caplog.text
    )
    assert not notices
    (folder / "README").write_text("Exported on a CD.")
    Image.new("L", (4, 4)).save(folder / "key.png")
    with collected() as notices:
        assert read_volume(folder).voxels.shape[0] == 4
    assert [notice.kind for notice in notices] == ["skipped"]
    assert "8 files are skipped" in notices[0].message
    assert "key.png" in notices[0].message


def test_other_files_beside_slice_images(tmp_path: Path) -> None:
    for number in range(3):
        Image.effect_noise((5, 4), 50).save(tmp_path / f"{number}.png")
    (tmp_path / "labels.csv").write_text("a")
    (tmp_path / "README").write_text("Slices.")
    with collected() as notices:
        assert read_volume(tmp_path).voxels.shape == (3, 4, 5)
    assert (
        "2 files are skipped; expected slice images, found README, labels.csv" in notices[0].message
    )
    for name, data, reason in (
        (
            "3.webp",
            b"RIFF\0\0\0\0WEBP",
            "3.webp could be a slice, but .webp is not read; convert it",
        ),
        ("3.jp2", b"\0\0\0\x0cjP  ", "3.jp2 could be a slice, but .jp2 is not read"),
        ("0003", bytes(50), "0003 could be a slice, but is not an image that is read"),
        (
            "3.dcm",
            b"",
            r"3\.dcm could be a slice, but is not an image that is read \(an empty file",
        ),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MediaError, match=reason):
            read_volume(tmp_path)
        (tmp_path / name).unlink()


def test_a_folder_without_any_slice_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(MediaError, match=r"neither DICOM files nor slice images; found notes\.txt"):
        read_volume(tmp_path)


def test_a_link_to_a_missing_file_and_a_file_that_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data sets under version control leave links to files that were not fetched."""
    series(tmp_path / "ct")
    link = tmp_path / "ct" / "IM9"
    link.symlink_to("objects/missing")
    with pytest.raises(
        MediaError, match="IM9 could be a slice, but is a link to a file that is missing; fetch"
    ):
        read_volume(tmp_path / "ct")
    link.unlink()
    link.write_bytes(b"x")
    whole = Path.open

    def denied(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "IM9":
            raise PermissionError(13, "Permission denied")
        return whole(path, *args, **options)

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(
        MediaError, match=r"IM9 could be a slice, but cannot be opened \(Permission denied\)"
    ):
        read_volume(tmp_path / "ct")
