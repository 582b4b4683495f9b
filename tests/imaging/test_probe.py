from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from PIL import Image

from medm.errors import MediaError
from medm.imaging.probe import probe
from tests.imaging.tiny import phantom, write_series


@pytest.fixture
def nifti(tmp_path: Path) -> Path:
    path = tmp_path / "ct.nii"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.arange(60, dtype=np.int16).reshape(3, 4, 5)), str(path))
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
    with pytest.raises(MediaError, match=r"ct\.nii: 471 bytes, but its header declares 472; the file is truncated"):
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
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, kind: str, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MediaError, match=f"{name}: .*{reason}"):
        probe(tmp_path / name, kind=kind)  # type: ignore[arg-type]


def test_a_folder_passes_only_if_training_would_read_it(tmp_path: Path) -> None:
    write_series(tmp_path / "study", phantom(), number=3, prefix="A")
    write_series(tmp_path / "study", phantom()[:, :, 2:8], number=4, prefix="B")
    with pytest.raises(MediaError, match="2 series fit"):
        probe(tmp_path / "study", kind="volume", decode=True)
    probe(tmp_path / "study", kind="volume", decode=True, series="largest")
    probe(tmp_path / "study#4", kind="volume", decode=True)


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "series").mkdir()
    with pytest.raises(MediaError, match="the folder is empty"):
        probe(tmp_path / "series#2", kind="volume")
    (tmp_path / "series" / "1.dcm").write_bytes(b"x")
    probe(tmp_path / "series#2", kind="volume")
    with pytest.raises(MediaError, match="no such file or folder"):
        probe(tmp_path / "gone#2", kind="volume")
    with pytest.raises(MediaError, match="expected an image file"):
        probe(tmp_path / "series", kind="image")
