"""Atomic files and folders, and locks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from medm import files
from medm.files import (
    LockedError,
    atomic_create_text,
    atomic_directory,
    atomic_file,
    atomic_write_text,
    lock,
    lock_file,
)


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
        assert list(tmp_path.glob("*.npy")) == [
            file
        ]  # a reader that lists files does not find the temporary one
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
        with (
            pytest.raises(LockedError, match=f"process {os.getpid()} on "),
            lock_file(file, target=tmp_path),
        ):
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


def folder_of(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("existing", [False, True])
def test_a_complete_folder_takes_its_final_name(tmp_path: Path, existing: bool) -> None:
    if existing:
        folder_of(tmp_path / "final", a="old", b="old")
        folder_of(tmp_path / ".tmp-old-final", a="left by a kill")
    files.replace_directory(folder_of(tmp_path / "staged", a="new"), tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert contents(tmp_path / "final") == {"a": "new"}


def test_a_failure_between_the_two_names_loses_neither_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path / "final", a="old")
    staged = folder_of(tmp_path / "staged", a="new")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self == staged:
            raise OSError("the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        files.replace_directory(staged, tmp_path / "final")
    assert not (tmp_path / "final").exists()
    assert (contents(tmp_path / ".tmp-old-final"), contents(staged)) == ({"a": "old"}, {"a": "new"})


def test_a_removal_that_fails_leaves_nothing_under_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "checkpoint", a="1", b="2")

    def half(path: Path) -> None:
        (path / "a").unlink()
        raise OSError("killed")

    monkeypatch.setattr(files.shutil, "rmtree", half)
    with pytest.raises(OSError, match="killed"):
        files.remove_directory(folder)
    assert not folder.exists()


def test_contents_move_with_the_last_names_last_and_a_second_call_moves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = (
        folder_of(tmp_path / "source", z="new", m="new", a="new"),
        folder_of(tmp_path / "target", m="old"),
    )
    folder_of(source / "inner", x="new")
    folder_of(target / "inner", y="old")
    moved: list[str] = []
    replace = Path.replace

    def once(self: Path, place: Path) -> Path:
        if len(moved) == 2:
            raise OSError("full")
        moved.append(self.name)
        return replace(self, place)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
        patched.setattr(Path, "replace", once)
        files.move_contents(source, target, last=("m", "a"))
    assert sorted(moved) == ["inner", "z"]
    assert (target / "m").read_text() == "old"
    files.move_contents(source, target, last=("m", "a"))
    assert not source.exists()
    assert [(target / name).read_text() for name in "zma"] == ["new"] * 3
    assert contents(target / "inner") == {"x": "new"}


def test_one_of_several_writers_creates_a_file(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    assert atomic_create_text(file, "first")
    assert not atomic_create_text(file, "second")
    assert [path.name for path in tmp_path.iterdir()] == ["list.txt"]
    assert file.read_text() == "first"
    with pytest.raises(OSError, match="nowhere") as caught:
        atomic_create_text(tmp_path / "nowhere" / "x", "text")
    assert caught.value.filename == str(tmp_path / "nowhere" / "x")


def test_locks_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / ".lock"
    monkeypatch.setenv("MEDM_LOCKS", "off")
    with lock_file(file, target=tmp_path), lock_file(file, target=tmp_path):
        assert file.exists()
