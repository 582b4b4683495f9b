"""Atomic files and folders, and locks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from medm.files import LockedError, atomic_directory, atomic_file, atomic_write_text, lock, lock_file


def test_a_text_replaces_a_file_and_leaves_nothing_beside(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("old")
    atomic_write_text(file, '"\ud83d"')
    assert file.read_bytes() == rb'"\ud83d"'
    assert list(tmp_path.iterdir()) == [file]


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.npy"
    file.write_text("old")
    with pytest.raises(ValueError, match="stop"), atomic_file(file) as temporary:
        temporary.write_text("half")
        assert list(tmp_path.glob("*.npy")) == [file]  # a reader that lists files does not find the temporary one
        raise ValueError("stop")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_disk_error_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    with pytest.raises(FileNotFoundError) as caught, atomic_file(file):
        pass  # nothing was written, so that there is nothing to rename
    assert caught.value.filename == str(file)


def test_a_folder_appears_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(ValueError, match="stop"), atomic_directory(folder) as temporary:
        (temporary / "config.json").write_text("{}")
        raise ValueError("stop")
    assert not list(tmp_path.iterdir())
    folder.mkdir()
    with atomic_directory(folder) as temporary:
        (temporary / "config.json").write_text("{}")
        assert not list(folder.iterdir())
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    with pytest.raises(OSError, match="not empty"), atomic_directory(folder):
        pass


def test_one_holder_a_lock_file(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with lock_file(file, target=tmp_path):
        with pytest.raises(LockedError, match=f"process {os.getpid()} on "), lock_file(file, target=tmp_path):
            pytest.fail("held twice")
        assert file.exists()
    assert not file.exists()
    with lock_file(file, target=tmp_path):
        pass


def test_shared_locks_keep_only_the_exclusive_one_away(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    file.touch()
    with file.open("rb") as one, file.open("rb") as two, file.open("rb") as three:
        lock(one, shared=True)
        lock(two, shared=True)
        with pytest.raises(LockedError):
            lock(three)
