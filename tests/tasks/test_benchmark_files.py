"""Archives of numbers: as careful as the readers of volumes."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from medm.errors import DataError
from medm.tasks.benchmark_files import NumberArchive, require


def archive(path: Path, packing: int) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(0).integers(0, 9, (100, 28, 28), dtype=np.uint8))
    with zipfile.ZipFile(path, "w", packing) as opened:
        opened.writestr("test_images.npy", buffer.getvalue())
    return path.read_bytes()


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_what_numpy_writes_is_read(tmp_path: Path, packing: int) -> None:
    archive(tmp_path / "a.npz", packing)
    assert NumberArchive(tmp_path / "a.npz")["test_images"].shape == (100, 28, 28)


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packings_without_bound_are_refused(tmp_path: Path, packing: int) -> None:
    archive(tmp_path / "a.npz", packing)
    with pytest.raises(
        DataError, match=r"a\.npz:test_images: .* expected 0 \(stored\) or 8 \(deflated\)"
    ):
        NumberArchive(tmp_path / "a.npz")["test_images"]


def test_a_directory_that_declares_more_than_its_bytes_hold_is_refused(tmp_path: Path) -> None:
    data = bytearray(archive(tmp_path / "a.npz", zipfile.ZIP_DEFLATED))
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, 2**31)
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(DataError, match="cannot hold the 2147483648 bytes"):
        NumberArchive(tmp_path / "a.npz")["test_images"]


def test_a_damaged_array_is_named(tmp_path: Path) -> None:
    data = bytearray(archive(tmp_path / "a.npz", zipfile.ZIP_DEFLATED))
    middle = len(data) // 2
    data[middle : middle + 10] = b"\xff" * 10
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(DataError, match="array 'test_images' is damaged"):
        NumberArchive(tmp_path / "a.npz")["test_images"]


def test_a_missing_file_names_its_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, why in (
        (tmp_path, ""),
        (tmp_path / "away", ", which does not exist"),
        (tmp_path / "file", ", which is not a folder"),
    ):
        with pytest.raises(DataError) as caught:
            require(folder, "a.json", "b.json", layout="one of them")
        assert f"'a.json' or 'b.json' is missing in {folder}{why}; expected one of them" in str(
            caught.value
        )
