"""No path of a record leads out of the data root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medm.errors import MediaError
from medm.imaging import resolve_inside


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "secret.png").write_bytes(b"x")
    root = tmp_path / "data"
    (root / "deep").mkdir(parents=True)
    for name in ("a.png", "deep/b.png", "odd name #1.png"):
        (root / name).write_bytes(b"x")
    (root / "deep" / "inside.png").symlink_to(root / "a.png")
    (root / "outside.png").symlink_to(tmp_path / "secret.png")
    (root / "above").symlink_to(tmp_path)
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "pipe.png")
    return root


@pytest.mark.parametrize(
    ("relative", "file"),
    [
        ("a.png", "a.png"),
        ("./deep//b.png", "deep/b.png"),
        ("deep/inside.png", "a.png"),
        ("odd name #1.png", "odd name #1.png"),
        ("deep", "deep"),
        ("deep#3", "deep#3"),
    ],
)
def test_what_lies_inside_is_found(root: Path, relative: str, file: str) -> None:
    assert resolve_inside(root, relative) == root.resolve() / file


@pytest.mark.parametrize(
    ("relative", "reason"),
    [
        ("../secret.png", r"'\.\.' is refused"),
        ("deep/../../secret.png", r"'\.\.' is refused"),
        ("..\\secret.png", r"'\.\.' is refused"),
        ("/etc/passwd", "absolute paths are refused"),
        ("C:\\secret.png", "absolute paths are refused"),
        ("outside.png", "a link leads out of the data root"),
        ("above/secret.png", "a link leads out of the data root"),
        ("above#3", "a link leads out of the data root"),
        ("loop.png", "cannot be opened"),
        ("pipe.png", "found a device, pipe or socket"),
        ("http://host/a.png", "URLs are not opened"),
        ("FILE:///etc/passwd", "URLs are not opened"),
        ("data:image/png;base64,AAAA", "URLs are not opened"),
        ("a.png\0.txt", "without control characters"),
        ("a\n.png", "without control characters"),
        ("", "expected a file name"),
        ("nothing.png", "no such file under the data root"),
        ("a.png/b", "cannot be opened|no such file"),
        ("x" * 5000, "cannot be opened|no such file"),
    ],
)
def test_what_leads_out_is_refused(root: Path, relative: str, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        resolve_inside(root, relative)


@given(parts=st.lists(st.sampled_from(["..", ".", "deep", "above", "a.png", "secret.png", "", "#", "~"]), max_size=6))
def test_no_combination_escapes(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    base = tmp_path_factory.getbasetemp() / "escape"
    root = base / "data"
    if not root.exists():
        (root / "deep").mkdir(parents=True)
        (base / "secret.png").write_bytes(b"x")
        (root / "a.png").write_bytes(b"x")
        (root / "above").symlink_to(base)
    try:
        found = resolve_inside(root, "/".join(parts))
    except MediaError:
        return
    assert found.is_relative_to(root.resolve())
