from __future__ import annotations

import gzip
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from PIL import Image
from pydicom.dataset import Dataset

from medm.errors import MediaError
from medm.imaging import dicom_series
from medm.imaging.probe import probe
from tests.imaging.tiny import body, phantom, write_multi_frame, write_series


@pytest.fixture
def nifti(tmp_path: Path) -> Path:
    path = tmp_path / "ct.nii"
    SimpleITK.WriteImage(
        SimpleITK.GetImageFromArray(np.arange(60, dtype=np.int16).reshape(3, 4, 5)), str(path)
    )
    return path


def test_whole_files_pass(tmp_path: Path, nifti: Path) -> None:
    (tmp_path / "ct.nii.gz").write_bytes(gzip.compress(nifti.read_bytes()))
    np.save(tmp_path / "ct.npy", np.zeros((3, 4, 5), np.float32))
    Image.new("L", (3, 3)).save(tmp_path / "a.png")
    for decode in (False, True):
        for name in ("ct.nii", "ct.nii.gz", "ct.npy"):
            probe(tmp_path / name, kind="volume", decode=decode)
        probe(tmp_path / "a.png", kind="image", decode=decode)


def test_a_volume_cut_short_is_found_from_its_header(nifti: Path) -> None:
    nifti.write_bytes(nifti.read_bytes()[:-1])
    with pytest.raises(
        MediaError, match=r"ct\.nii: 471 bytes, but its header declares 472; the file is truncated"
    ):
        probe(nifti, kind="volume")


@pytest.mark.parametrize(
    ("name", "content", "kind", "reason"),
    [
        ("a.nii", b"", "volume", "the file is empty"),
        ("a.npy", b"", "volume", "the file is empty"),
        ("a.nii", b"x" * 400, "volume", "not a NIfTI file"),
        ("a.nii.gz", gzip.compress(b"x" * 400, mtime=0)[:20], "volume", "truncated or damaged"),
        ("a.png", b"", "image", "the file is empty"),
        ("a.png", b"<html>", "image", "HTML page"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes, kind: str, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MediaError, match=f"{name}: .*{reason}"):
        probe(tmp_path / name, kind=kind)  # type: ignore[arg-type]


def test_a_folder_passes_only_if_training_would_read_it(tmp_path: Path) -> None:
    write_series(tmp_path / "study", phantom(), number=3, prefix="A")
    write_series(tmp_path / "study", phantom()[:, :, 2:8], number=4, prefix="B")
    for decode in (False, True):
        with pytest.raises(
            MediaError,
            match=r"2 series fit; .*model\.branches\.volume\.preprocess\.series: largest",
        ):
            probe(tmp_path / "study", kind="volume", decode=decode)
        with pytest.raises(MediaError, match="the series asked for is not among them"):
            probe(tmp_path / "study#5", kind="volume", decode=decode)
        probe(tmp_path / "study", kind="volume", decode=decode, series="largest")
        probe(tmp_path / "study#4", kind="volume", decode=decode)


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "series").mkdir()
    with pytest.raises(MediaError, match="the folder is empty"):
        probe(tmp_path / "series#2", kind="volume")
    (tmp_path / "series" / "1.txt").write_bytes(b"x")
    with pytest.raises(MediaError, match="neither DICOM files nor slice images"):
        probe(tmp_path / "series#2", kind="volume")
    with pytest.raises(MediaError, match="no such file or folder"):
        probe(tmp_path / "gone#2", kind="volume")
    with pytest.raises(MediaError, match="expected an image file"):
        probe(tmp_path / "series", kind="image")


def _no_pixels(*_: object, **__: object) -> None:
    raise AssertionError("pixels were decoded")


@pytest.fixture
def headers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # A module that is first imported while the readers are replaced would keep the replacements for
    # good.
    for module in ("dicom_image", "images", "volumes", "nifti", "nrrd", "metaimage", "slices"):
        importlib.import_module(f"medm.imaging.{module}")
    for name in (
        "dicom_series.read_pixels",
        "dicom_pixels.read_pixels",
        "text_header.read_voxels",
        "nifti.read_voxels",
        "volumes.read_npy",
        "volumes.read_npz",
        "slices.read_image",
        "images.read_image",
    ):
        monkeypatch.setattr(f"medm.imaging.{name}", _no_pixels)


def _move(by: float) -> Callable[[Dataset, int], None]:
    """Moves slice 4 along z."""

    def change(dataset: Dataset, z: int) -> None:
        x, y, old = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, y, old + (by if z == 4 else 0)]

    return change


def _set(keyword: str, value: Any) -> Callable[[Dataset, int], None]:
    return lambda dataset, z: setattr(dataset, keyword, value) if z == 4 else None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_move(-5.0), "slices lie where another lies"),
        (_move(1.0), "distances between slices are uneven"),
        (_set("PixelSpacing", [3.0, 3.0]), "different PixelSpacing"),
        (_set("ImageOrientationPatient", [0, 1, 0, 0, 0, -1]), "different orientations"),
        (_set("ImagePositionPatient", None), "lack ImagePositionPatient"),
        (_set("Rows", 10), "mixes slices of 2 sizes"),
        (_set("RescaleSlope", 0), "RescaleSlope is 0"),
        (_set("PixelData", b"00"), "is truncated"),
    ],
)
def test_a_bad_series_is_found_in_its_headers(
    tmp_path: Path, headers_only: None, change: Callable[[Dataset, int], None], reason: str
) -> None:
    write_series(tmp_path / "series", phantom(), change=change)
    with pytest.raises(MediaError, match=reason):
        probe(tmp_path / "series", kind="volume")


def test_missing_slices_and_good_series_are_told_apart_by_headers(
    tmp_path: Path, headers_only: None
) -> None:
    paths = write_series(tmp_path / "series", phantom())
    probe(tmp_path / "series", kind="volume")
    for path in paths[4:6]:
        path.unlink()
    with pytest.raises(MediaError, match="about 2 slices are missing"):
        probe(tmp_path / "series", kind="volume")


def test_each_file_of_a_series_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_series(tmp_path / "series", phantom())
    seen: list[Path] = []
    plain = dicom_series.read_header
    monkeypatch.setattr(
        dicom_series, "read_header", lambda path, *rest: seen.append(path) or plain(path, *rest)
    )
    probe(tmp_path / "series", kind="volume")
    assert sorted(seen) == sorted(paths)


def test_frames_of_one_file_are_checked_by_its_header(tmp_path: Path, headers_only: None) -> None:
    probe(write_multi_frame(tmp_path / "whole.dcm", phantom()), kind="volume")
    gap = write_multi_frame(tmp_path / "gap.dcm", phantom(), order=[0, 1, 2, 3, 6, 7, 8, 9, 10, 11])
    with pytest.raises(MediaError, match="about 2 slices are missing"):
        probe(gap, kind="volume")
    with pytest.raises(MediaError, match="holds 12 frames where one image is expected"):
        probe(tmp_path / "whole.dcm", kind="image")
    with pytest.raises(MediaError, match="one DICOM slice, not a volume"):
        probe(write_series(tmp_path / "series", phantom())[0], kind="volume")


@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha", ".npy", ".npz", ".mhd", ".nhdr"])
def test_whole_and_truncated_volumes_are_told_apart_by_headers(
    tmp_path: Path, headers_only: None, suffix: str
) -> None:
    path = tmp_path / f"ct{suffix}"
    if suffix == ".npy":
        np.save(path, body())
    elif suffix == ".npz":
        np.savez_compressed(path, body())
    else:
        SimpleITK.WriteImage(phantom(), str(path))
    probe(path, kind="volume")
    (voxels,) = [other for other in tmp_path.iterdir() if other != path] or [path]
    voxels.write_bytes(voxels.read_bytes()[:-3])
    with pytest.raises(MediaError, match=r"truncated|damaged"):
        probe(path, kind="volume")


def test_flat_files_are_no_volumes_and_volumes_no_images(
    tmp_path: Path, headers_only: None
) -> None:
    Image.new("L", (3, 3)).save(tmp_path / "a.png")
    np.save(tmp_path / "flat.npy", np.zeros((4, 5), np.float32))
    np.save(tmp_path / "deep.npy", np.zeros((3, 4, 5), np.float32))
    np.savez(tmp_path / "flat.npz", np.zeros((4, 5), np.float32))
    SimpleITK.WriteImage(phantom(), str(tmp_path / "ct.nii.gz"))
    with pytest.raises(MediaError, match="not a volume that is read"):
        probe(tmp_path / "a.png", kind="volume")
    for name in ("flat.npy", "flat.npz"):
        with pytest.raises(MediaError, match=f"{name}: .*3"):
            probe(tmp_path / name, kind="volume")
    with pytest.raises(MediaError, match=r"expected an array \(height, width\)"):
        probe(tmp_path / "deep.npy", kind="image")
    with pytest.raises(MediaError, match=r"ct\.nii\.gz: "):
        probe(tmp_path / "ct.nii.gz", kind="image")


def test_slice_images_are_checked_by_names_and_headers(tmp_path: Path, headers_only: None) -> None:
    for number in range(4):
        Image.new("L", (6, 5)).save(tmp_path / f"s{number}.png")
    probe(tmp_path, kind="volume")
    Image.new("L", (6, 7)).save(tmp_path / "s4.png")
    with pytest.raises(MediaError, match=r"2 sizes: s0\.png is 5 x 6, s4\.png is 7 x 6"):
        probe(tmp_path, kind="volume")
    (tmp_path / "s4.png").rename(tmp_path / "s6.png")
    with pytest.raises(MediaError, match="2 slices are missing between numbers 0 and 6"):
        probe(tmp_path, kind="volume")
