"""Weights are read in full once, and again whenever they may have changed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from medm.errors import CheckpointError
from medm.models import manifest, verified
from medm.models.manifest import verify_weights, write_manifest


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the files that were read in full; what is remembered stays in the test's own
    folder."""
    names: list[str] = []
    original = manifest._hash

    def counting(path: Path) -> str:
        names.append(path.name)
        return original(path)

    monkeypatch.setattr(manifest, "_hash", counting)
    monkeypatch.setattr(verified, "SETTLED", 0.02)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return names


def model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    write_manifest(folder, {})
    time.sleep(0.03)  # longer than `SETTLED` in `read`, and than a tick of the file system
    return folder


def test_weights_are_read_once_a_folder(tmp_path: Path, read: list[str]) -> None:
    one, other = model(tmp_path / "one"), model(tmp_path / "other")
    read.clear()
    verify_weights(one)
    verify_weights(one)
    assert read == ["model.safetensors"]
    verify_weights(other)
    (tmp_path / "link").symlink_to(one)
    verify_weights(tmp_path / "link")
    assert read == ["model.safetensors"] * 2


def test_a_flipped_byte_is_found_after_the_weights_were_verified(
    tmp_path: Path, read: list[str]
) -> None:
    """Also behind the time of change that copying programs put back."""
    file = model(tmp_path / "model") / "model.safetensors"
    verify_weights(file.parent)
    times = file.stat()
    file.write_bytes(b"weightz")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="the content changed since it was written"):
            verify_weights(file.parent)


def test_other_checksums_are_compared_anew(tmp_path: Path, read: list[str]) -> None:
    folder = model(tmp_path / "model")
    verify_weights(folder)
    record = json.loads((folder / "manifest.json").read_text())
    record["files"]["model.safetensors"]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="sha256 differs"):
        verify_weights(folder)


def test_a_file_that_was_written_just_now_is_not_remembered(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "SETTLED", 60.0)
    folder = model(tmp_path / "model")
    read.clear()
    verify_weights(folder)
    verify_weights(folder)
    assert read == ["model.safetensors"] * 2


def test_a_folder_that_is_gone_is_forgotten(tmp_path: Path, read: list[str]) -> None:
    first = model(tmp_path / "first")
    verify_weights(first)
    first.rename(tmp_path / "second")
    verify_weights(tmp_path / "second")
    assert list(json.loads((tmp_path / "cache" / "medm" / "verified.json").read_text())) == [
        str(tmp_path / "second")
    ]


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 1}'])
def test_a_damaged_memory_knows_nothing(tmp_path: Path, read: list[str], content: str) -> None:
    (tmp_path / "cache" / "medm").mkdir(parents=True)
    (tmp_path / "cache" / "medm" / "verified.json").write_text(content)
    folder = model(tmp_path / "model")
    read.clear()
    verify_weights(folder)
    verify_weights(folder)
    assert read == ["model.safetensors"]


def test_nowhere_to_remember_is_no_error(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = model(tmp_path / "model")
    read.clear()
    verify_weights(folder)
    verify_weights(folder)
    assert read == ["model.safetensors"] * 2
