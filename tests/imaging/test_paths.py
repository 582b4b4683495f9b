"""No path of a record leads out of the data root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medm.errors import MediaError
from medm.imaging import resolve_inside
from medm.imaging.paths import MissingFileError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "secret.png").write_bytes(b"x")
    root = tmp_path / "data"
    (root / "deep").mkdir(parents=True)
    for name in ("a.png", "deep/b.png", "odd name #1.png", "odd\\name.png", "deep/#1"):
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
        ("deep\\b.png", "deep/b.png"),
        (".\\deep\\b.png", "deep/b.png"),
        ("deep\\#1", "deep/#1"),
        ("odd\\name.png", "odd\\name.png"),  # exists as it is written
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
        ("\\\\server\\share\\secret.png", "absolute paths are refused"),
        ("deep\\..\\..\\secret.png", r"'\.\.' is refused"),
        ("above\\secret.png", "a link leads out of the data root"),
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
        (".#1", "no such file"),
        ("deep/.#1", "no such file"),
        ("#1", "no such file"),
        ("#" + "x" * 300, "cannot be opened"),
        ("deep#" + "1" * 300, "cannot be opened"),
        ("y" * 300 + "#3", "cannot be opened"),
        ("deep#", "no such file"),
        ("..#3", "no such file"),
        ("iVBORw0KGgo" + "A" * 400 + "==", "base64"),
        ("/9j/" + "4AAQ" * 100, "base64"),
        ("s3://bucket/a.png", "URLs are not opened"),
        ("hf://datasets/me/a.png", "URLs are not opened"),
        ("file:deep/b.png", "without 'file:'"),
    ],
)
def test_what_leads_out_is_refused(root: Path, relative: str, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        resolve_inside(root, relative)


NFC, NFD = "M\u00fcller.png", "Mu\u0308ller.png"


@pytest.mark.parametrize(
    ("written", "file"),
    [
        (NFC, NFD),
        (NFD, NFC),
        (f"{NFC[:-4]}/{NFD}", f"{NFD[:-4]}/{NFC}"),  # each part in a form of its own
        (f"deep\\{NFC}", f"deep/{NFD}"),
        ("\uac00.png", "\u1100\u1161.png"),
        ("K\u00f6ln#3", "Ko\u0308ln#3"),
    ],
)
def test_a_name_in_another_unicode_form_is_read(tmp_path: Path, written: str, file: str) -> None:
    target = tmp_path / file.removesuffix("#3")
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(b"x")
    assert [path.name for path in target.parent.iterdir()] == [
        target.name
    ]  # the file system keeps the form
    assert resolve_inside(tmp_path, written) == tmp_path.resolve() / file


def test_two_files_in_two_unicode_forms_are_never_chosen_between(tmp_path: Path) -> None:
    for name in (
        "a\u0323\u0307.png",
        "\u1ea1\u0307.png",
    ):  # a, dot below, dot above: decomposed and composed
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(MissingFileError, match="2 similar names are there"):
        resolve_inside(tmp_path, "\u0227\u0323.png")  # the same letter in a third way


@pytest.mark.parametrize(
    ("written", "file", "differs"),
    [
        ("Sub/A.PNG", "Sub/a.png", "'a.png' is there, which differs in capital letters"),
        ("sub/a.png", "Sub/a.png", "'Sub' is there, which differs in capital letters"),
        ("sub\\a.png", "Sub/a.png", "'Sub' is there, which differs in capital letters"),
        ("a%20b.png", "a b.png", "'a b.png' is there, which differs in percent-encoding"),
        ("a.png ", "a.png", "differs in spaces or full stops at its ends"),
        ("a.png", "a.png.", "differs in spaces or full stops at its ends"),
        (" a.png", "a.png", "differs in spaces or full stops at its ends"),
        ("a\u00a0b.png", "a b.png", r"Unicode characters \(composed, decomposed or look-alike\)"),
        ("A%20B.PNG", "a b.png", "differs in percent-encoding and capital letters"),
        ("sub/b.png", "sub/a.png", "the folder 'sub' is there, and 'b.png' is not in it"),
        ("sub.zip/b.png", "sub.zip", "'sub.zip' is a file, not a folder: unpack it"),
        ("C:a.png", "a.png", "as an absolute path of Windows"),
        ("\\a.png", "a.png", "as an absolute path of Windows"),
        ("~/a.png", "a.png", "'~' is not expanded"),
    ],
)
def test_what_differs_is_said_and_not_read(
    tmp_path: Path, written: str, file: str, differs: str
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(MissingFileError, match=f"no such file under the data root .*{differs}"):
        resolve_inside(tmp_path, written)


def test_what_lies_outside_is_not_described(root: Path) -> None:
    with pytest.raises(MissingFileError) as caught:
        resolve_inside(root, "above/Secret.png")
    assert "secret.png" not in str(caught.value)


def test_links_say_what_can_be_done(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        MediaError, match=f"or set root to the folder above both \\({tmp_path.resolve()}\\)"
    ):
        resolve_inside(root, "outside.png")
    (root / "annex.png").symlink_to(root / ".git" / "annex" / "objects")
    with pytest.raises(MissingFileError, match="a link to a file that does not exist"):
        resolve_inside(root, "annex.png")


def test_an_absolute_path_inside_the_root_is_rewritten_in_the_message(root: Path) -> None:
    with pytest.raises(MediaError, match=r"absolute paths are refused; write 'deep/b\.png'"):
        resolve_inside(root, str(root / "deep" / "b.png"))


def test_a_root_that_does_not_exist_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="which does not exist itself"):
        resolve_inside(tmp_path / "gone", "a.png")


def test_messages_do_not_repeat_a_whole_image() -> None:
    with pytest.raises(MediaError) as caught:
        resolve_inside(Path("/"), "data:image/png;base64," + "A" * 100_000)
    assert len(str(caught.value)) < 500


PARTS = [
    "..",
    ".",
    "deep",
    "above",
    "a.png",
    "secret.png",
    "",
    "#",
    "~",
    ".#1",
    "\\",
    "..\\",
    "above\\",
]


@given(parts=st.lists(st.sampled_from(PARTS), max_size=6))
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
