"""Errors of the operating system: one message with the path and what to do; defects of medm keep
their traceback."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError
from torch.multiprocessing import reductions

import medm.cli.app as app_module
from medm.os_errors import explain, naming, require_writable
from tests.cli.runner import medm


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "make room on the disk"), (errno.EDQUOT, "quota"), (errno.EROFS, "can be written"),
        (errno.EACCES, "permissions"), (errno.ENOTDIR, "a file where a folder is expected"),
        (errno.EISDIR, "expected a file"), (errno.ENAMETOOLONG, "shorter name"), (errno.EMFILE, "ulimit -n"),
        (errno.ESTALE, "mounted"), (errno.EIO, "mounted"), (errno.EEXIST, "exists already"),
    ],
)  # fmt: skip
def test_a_message_names_the_path_the_reason_and_what_to_do(code: int, words: str) -> None:
    text = explain(OSError(code, os.strerror(code), "/share/out"))
    assert text is not None
    assert text.startswith(f"/share/out: {os.strerror(code)}; ")
    assert words in text
    assert "\n" not in text


def test_what_may_be_a_defect_of_medm_is_not_explained_away() -> None:
    for error in (
        KeyError("x"),
        RuntimeError("x"),
        ValueError("x"),
        OSError("x"),
        FileNotFoundError(2, "no"),
        IsADirectoryError(errno.EISDIR, "x"),
        OSError(errno.ENOENT, "no", 7),
    ):
        assert explain(error) is None
    assert "make room" in (explain(OSError(errno.ENOSPC, "No space left on device")) or "")


def test_errors_of_libraries_that_hide_the_code_are_known() -> None:
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    with (
        pytest.raises(OSError, match="No space left") as caught,
        naming(Path("/share/model.safetensors")),
    ):
        raise SafetensorError(text)
    assert explain(caught.value).startswith(
        "/share/model.safetensors: No space left on device; make room"
    )  # type: ignore[union-attr]
    assert "make room" in (explain(SafetensorError(text)) or "")
    assert explain(SafetensorError("Error while deserializing header: HeaderTooLarge")) is None
    full = (
        "unable to resize file </torch_6600_3386804235_61> to the right size: No space left on "
        "device (28)"
    )
    assert "shared memory (/dev/shm)" in (explain(RuntimeError(full)) or "")
    killed = "DataLoader worker (pid 61) is killed by signal: Killed. "
    assert "was killed" in (explain(RuntimeError(killed)) or "")


@pytest.mark.parametrize(
    "kind", [ConnectionResetError, ConnectionRefusedError, FileNotFoundError, EOFError]
)
def test_a_worker_that_ends_while_its_tensors_are_fetched_is_known_by_the_place(
    kind: type[Exception],
) -> None:
    for place, known in ((reductions.__file__, True), (__file__, False)):
        code = compile("raise kind(104, 'lost')", place, "exec")
        with pytest.raises(kind) as caught:
            exec(code, {"kind": kind})
        assert ("was killed" in (explain(caught.value) or "")) == known


def test_naming_puts_the_place_of_a_temporary_file_and_keeps_other_errors(tmp_path: Path) -> None:
    with pytest.raises(KeyError), naming(tmp_path):
        raise KeyError("x")
    out, temporary = tmp_path / "out", tmp_path / ".out.7.tmp"
    for file, named in (
        (temporary / "config.json", out),
        (temporary, out),
        (tmp_path / "source", tmp_path / "source"),
    ):
        with pytest.raises(FileNotFoundError) as caught, naming(out, temporary=temporary):
            file.read_bytes()
        assert caught.value.filename == str(named)


def test_writing_is_proven_without_creating_anything(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    require_writable(tmp_path / "new" / "folder" / "out.jsonl")
    require_writable(file)
    require_writable(tmp_path, folder=True)
    for path, folder, kind in (
        (file / "out.jsonl", False, NotADirectoryError),
        (file / "a" / "b", True, NotADirectoryError),
        (tmp_path, False, IsADirectoryError),
        (file, True, NotADirectoryError),
        (tmp_path / "new" / ("n" * 300), False, OSError),
        (tmp_path / ("n" * 300) / "out", True, OSError),
    ):
        with pytest.raises(kind):
            require_writable(path, folder=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_permission_is_known_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_arguments: False)  # root may write anywhere
    with pytest.raises(PermissionError, match="Permission denied"):
        require_writable(tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (
            OSError(errno.EROFS, "Read-only file system", "/mnt/out"),
            1,
            "error: /mnt/out: Read-only file system; ",
        ),
        (
            OSError(errno.EMFILE, "Too many open files"),
            1,
            "error: Too many open files; too many files are open",
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
            1,
            "was killed, perhaps for lack of memory",
        ),
    ],
)
def test_a_command_says_it_in_one_message(
    error: Exception, status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_keywords: object) -> None:
        raise error

    monkeypatch.setattr(app_module, "app", fail)
    done = medm("list")
    assert done.code == status
    assert words in done.err
    assert "Traceback" not in done.err
    monkeypatch.setenv("MEDM_TRACEBACK", "1")
    with pytest.raises(type(error)):
        medm("list")


def test_a_defect_of_medm_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object, **_keywords: object) -> None:
        raise FileNotFoundError("a file that medm should not have asked for")

    monkeypatch.setattr(app_module, "app", fail)
    with pytest.raises(FileNotFoundError):
        medm("list")


def test_an_option_that_is_none_of_its_values_is_said_in_plain_words() -> None:
    for arguments in (
        ("export", "out", "--model", "m", "--format", "gguf"),
        ("import", "m", "out", "--kind", "gguf"),
        ("infer", "--model", "m", "--data", "d", "--output", "o", "--dtype", "gguf"),
    ):
        done = medm(*arguments)
        assert done.code == 2
        assert f"'{arguments[-2]}': 'gguf' is not one of " in done.err
        assert "Value error" not in done.err
