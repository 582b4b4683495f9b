"""Batch inference on machines that fail: shares that vanish, full disks, limits, two runs at once,
broken models."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import medm.inference.batch as infer_module
from medm.errors import (
    CheckpointError,
    DataError,
    DeviceError,
    InputLostError,
    MedmError,
    RecipeError,
)
from medm.files import atomic_write_text
from medm.imaging import images
from medm.inference import batches
from medm.inference.batch import InferSummary, infer
from medm.inference.options import GenerationOptions, InferOptions
from medm.inference.predictions import Appender, Results, encode
from medm.os_errors import explain
from tests.cli.runner import medm
from tests.inference.tiny import questions, read_output, save_tiny, write_records

COUNT = 9
SHORT = GenerationOptions(max_new_tokens=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Nine records about images in a folder of their own, `images`, in a subfolder of it."""
    records = questions(tmp_path / "images" / "scans", COUNT)
    for record in records:
        record["image"] = [f"scans/{name}" for name in record.get("image", ["0.png"])]
        record["task"] = "vqa"
        if "<image>" not in record["conversations"][0]["value"]:
            record["conversations"][0]["value"] = "<image>\n" + record["conversations"][0]["value"]
    return write_records(tmp_path, records)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "WAITS", ())


def run(model: Path, data: Path, *, progress: Any = None, **changes: Any) -> InferSummary:
    given: dict[str, Any] = {
        "output": str(data.parent / "out.jsonl"),
        "root": str(data.parent / "images"),
        "generation": SHORT,
        "device": "cpu",
        "workers": 0,
        "batch_size": 1,
    }
    summary = infer(
        InferOptions(model=str(model), data=str(data), **(given | changes)), progress=progress
    )
    assert summary is not None
    return summary


def command(model: Path, data: Path, *more: str) -> tuple[str, ...]:
    """`medm infer` as `run` runs it."""
    return (
        "infer",
        "--model",
        str(model),
        "--data",
        str(data),
        "--root",
        str(data.parent / "images"),
        "--output",
        str(data.parent / "out.jsonl"),
        "--max-new-tokens",
        "3",
        "--device",
        "cpu",
        "--workers",
        "0",
        *more,
    )


def whole(model: Path, data: Path) -> bytes:
    """The lines of a run that nothing disturbed."""
    output = data.parent / "whole.jsonl"
    run(model, data, output=str(output))
    return output.read_bytes()


def away(folder: Path) -> Callable[[], None]:
    """Move a folder away; returns what brings it back."""
    hidden = folder.with_name(f"{folder.name}-away")
    folder.rename(hidden)

    def back() -> None:
        if hidden.exists():
            shutil.rmtree(folder, ignore_errors=True)
            hidden.rename(folder)

    return back


def vanish(folder: Path, how: str) -> Callable[[], None]:
    """Take the images away, as a share does. Returns what brings them back."""
    if how == "a folder in it":
        return away(folder / "scans")
    back = away(folder)
    if how == "not mounted":
        folder.mkdir()  # the mount point stays
    return back


@pytest.mark.parametrize("how", ["renamed", "not mounted", "a folder in it"])
def test_images_that_are_away_for_a_second_cost_no_record(
    how: str, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(model, data)
    restore: list[Callable[[], None]] = []
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            restore[0]()

    def progress(done: int, _total: int, _errors: int) -> None:
        if done == 4:
            restore.append(vanish(data.parent / "images", how))

    monkeypatch.setattr(batches.time, "sleep", sleep)
    assert run(model, data, progress=progress).errors == 0
    assert len(slept) == 3
    assert (data.parent / "out.jsonl").read_bytes() == expected


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO, errno.ESTALE])
def test_trouble_of_the_machine_for_a_moment_costs_no_record(
    code: int, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = os.open

    def flaky(file: Any, *arguments: Any, **keywords: Any) -> int:
        if str(file).endswith(".png"):
            opened.append(str(file))
            if 3 < len(opened) <= 6:
                raise OSError(code, os.strerror(code))
        return real(file, *arguments, **keywords)

    monkeypatch.setattr(batches.time, "sleep", lambda _seconds: None)
    expected = whole(model, data)
    monkeypatch.setattr(images.os, "open", flaky)
    assert run(model, data).errors == 0
    assert len(opened) == COUNT + 3
    assert (data.parent / "out.jsonl").read_bytes() == expected


def test_trouble_that_stays_stops_the_run_and_the_next_one_answers_the_rest(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, no_waiting: None
) -> None:
    expected = whole(model, data)
    real, opened = os.open, []

    def broken(file: Any, *arguments: Any, **keywords: Any) -> int:
        if str(file).endswith(".png"):
            opened.append(file)
            if len(opened) > 3:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(infer_module, "_OUTAGE", 4)
        patch.setattr(images.os, "open", broken)
        with pytest.raises(
            InputLostError, match=r"4 consecutive records .*Input/output error.*same command again"
        ):
            run(model, data)
    lines = read_output(data.parent / "out.jsonl")
    assert [("reply" in line) for line in lines].count(True) == 3
    assert all(line["id"] == f"q{line['index']}" and line["task"] == "vqa" for line in lines)
    assert run(model, data).resumed == 3
    assert (data.parent / "out.jsonl").read_bytes() == expected


@pytest.mark.parametrize("how", ["renamed", "not mounted"])
def test_a_data_root_that_is_gone_stops_the_run(
    how: str, model: Path, data: Path, no_waiting: None
) -> None:
    expected = whole(model, data)
    restore: list[Callable[[], None]] = []

    def progress(done: int, _total: int, _errors: int) -> None:
        if done == 4:
            restore.append(vanish(data.parent / "images", how))

    with pytest.raises(
        InputLostError,
        match=r"images: the folder of images and volumes is gone or empty.*out\.jsonl",
    ):
        run(model, data, progress=progress)
    restore[0]()
    assert len(read_output(data.parent / "out.jsonl")) == 4, "what could not be read got no line"
    assert run(model, data).resumed == 4
    assert (data.parent / "out.jsonl").read_bytes() == expected


def test_a_data_file_that_changes_stops_the_run_and_says_so_again(model: Path, data: Path) -> None:
    records = json.loads(data.read_text())

    def progress(done: int, _total: int, _errors: int) -> None:
        if done == 4:
            data.write_text(json.dumps(records[::-1], indent=1))

    with pytest.raises(
        InputLostError, match=r"in\.json: the file changed after it was opened.*answered is kept in"
    ):
        run(model, data, progress=progress)
    assert len(read_output(data.parent / "out.jsonl")) == 4, "no record is blamed"
    with pytest.raises(RecipeError, match="the data file changed"):
        run(model, data)


def test_a_missing_file_is_looked_for_again_at_the_end(
    model: Path, data: Path, no_waiting: None
) -> None:
    expected = whole(model, data)
    file = data.parent / "images" / "scans" / "1.png"
    content = file.read_bytes()
    file.unlink()
    seen = []

    def progress(done: int, _total: int, errors: int) -> None:
        seen.append(errors)
        if done == COUNT and not file.exists():
            file.write_bytes(content)

    assert run(model, data, progress=progress).errors == 0
    assert max(seen) == 3
    assert seen[-1] == 0
    assert (data.parent / "out.jsonl").read_bytes() == expected


def test_records_without_a_reply_are_tried_again_and_the_model_is_read_only_for_one_that_is_good(
    model: Path, data: Path, no_waiting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(model, data)
    scans = data.parent / "images" / "scans"
    content = (scans / "2.png").read_bytes()
    (scans / "2.png").write_bytes(content[:300])
    first = medm(*command(model, data))
    assert first.code == 1
    assert "9 records: 7 answered, 2 without a reply" in first.out
    assert "no reply to 2 of 9 records" in first.err
    assert "same command again" in first.err
    bad = [line for line in read_output(data.parent / "out.jsonl") if "error" in line]
    assert [sorted(line) for line in bad] == [["error", "id", "index", "task"]] * 2

    def no_model(*_arguments: Any, **_keywords: Any) -> None:
        raise AssertionError("weights were read")

    with monkeypatch.context() as patch:
        patch.setattr(infer_module, "load_engine", no_model)
        (scans / "2.png").unlink()
        again = medm(*command(model, data))
    assert again.code == 1, again.err
    assert "records/s" not in again.out
    now = [line["error"] for line in read_output(data.parent / "out.jsonl") if "error" in line]
    assert all("no such file" in text for text in now), "the reason of today"
    (scans / "2.png").write_bytes(content)
    assert medm(*command(model, data)).code == 0
    assert (data.parent / "out.jsonl").read_bytes() == expected


def test_nothing_answered_is_a_failure_and_does_not_block_the_corrected_command(
    model: Path, data: Path, no_waiting: None
) -> None:
    wrong = data.parent / "wrong"
    (wrong / "scans").mkdir(parents=True)
    (wrong / "other.txt").write_text("not empty")
    done = medm(*command(model, data), "--root", str(wrong))
    assert done.code == 1
    assert "9 records: 0 answered, 9 without a reply" in done.out
    assert medm(*command(model, data)).code == 0


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond this many bytes: what a full disk does, on any machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["out.jsonl", "all.json", "out.jsonl.run.json"])
def test_a_full_disk_is_a_message_and_with_room_the_results_are_the_same(
    name: str, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(model, data)
    more = ("--json", str(data.parent / "all.json"))
    real = os.fsync

    def full(descriptor: int) -> None:
        file = Path(f"/proc/self/fd/{descriptor}").readlink().name
        if file == name or re.fullmatch(rf"\.{re.escape(name)}\.\d+-[0-9a-f]+\.tmp", file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done = medm(*command(model, data), *more)
    assert done.code == 1
    assert (
        f"error: {data.parent / name}: No space left on device; make room on the disk" in done.err
    )
    assert done.err.count("error:") == 1
    assert "Traceback" not in done.err
    assert medm(*command(model, data), *more).code == 0
    assert (data.parent / "out.jsonl").read_bytes() == expected
    assert not [path for path in data.parent.iterdir() if path.name.startswith(".")]


def test_a_line_that_was_cut_by_a_full_disk_is_written_again(tmp_path: Path) -> None:
    line = {"index": 0, "reply": "word " * 20}
    with Appender(tmp_path / "out.jsonl") as lines:
        lines.add([line])
        with (
            file_size_limit(150),
            pytest.raises(MedmError, match=r"File too large.*resumes after the last complete"),
        ):
            lines.add([line | {"index": 1}])
    assert (tmp_path / "out.jsonl").stat().st_size == 150
    with Appender(tmp_path / "out.jsonl") as lines:
        lines.add([line | {"index": 1}])
    assert read_output(tmp_path / "out.jsonl") == [line, line | {"index": 1}]


def test_a_close_that_fails_does_not_hide_the_first_error(tmp_path: Path) -> None:
    class Failing:
        def write(self, _data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    lines = Appender(tmp_path / "out.jsonl")
    lines._stream.close()
    lines._stream = Failing()  # type: ignore[assignment]
    with pytest.raises(MedmError, match=r"out\.jsonl: No space left on device; make room"), lines:
        lines.add([{"index": 0}])
    with pytest.raises(MedmError, match=r"out\.jsonl: Input/output error"), lines:
        pass


def test_a_run_locks_its_output_from_the_start_to_the_end(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    first, second = Results(output, {"a": 1}), Results(output, {"a": 1})
    with first.locked():
        first.begin()
        output.write_text(encode({"index": 0, "reply": "x"}))
        with pytest.raises(MedmError, match=f"process {os.getpid()} on "), second.locked():
            pytest.fail("locked twice")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]
    with second.locked():  # and is free again
        second.begin()


def test_a_lock_that_cannot_be_made_names_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock

    def unsupported(stream: Any, operation: int) -> None:
        if Path(stream.name).suffix == ".lock":
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        real(stream, operation)

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with (
        pytest.raises(OSError, match=r"No locks available") as caught,
        Results(tmp_path / "out.jsonl", {}).locked(),
    ):
        pytest.fail("held without a lock")
    assert explain(caught.value) == (
        f"{tmp_path / 'out.jsonl'}: No locks available; this file system cannot lock files; "
        "choose a folder on another one, or set MEDM_LOCKS=off and start one run at a time in a "
        "folder"
    )
    monkeypatch.setenv("MEDM_LOCKS", "off")
    with Results(tmp_path / "out.jsonl", {}).locked():
        assert (tmp_path / ".out.jsonl.lock").exists()


@pytest.mark.parametrize("name", ["out.jsonl.part-1-of-2", "out.jsonl"])
def test_a_process_that_outlived_its_run_is_waited_for(name: str, tmp_path: Path) -> None:
    results = Results(tmp_path / "out.jsonl", {})
    with Appender(tmp_path / name) as orphan, results.locked():
        orphan.add([{"index": 0, "reply": "x"}])
        with pytest.raises(MedmError, match="an earlier run is still writing"):
            results.begin(overwrite=True)
        assert (tmp_path / name).exists()


def test_a_model_that_is_refused_leaves_nothing_that_blocks_the_right_one(
    model: Path, data: Path
) -> None:
    stock = data.parent / "stock"
    stock.mkdir()
    shutil.copy(model / "processor_config.json", stock)
    (stock / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(CheckpointError, match="which medm did not save"):
        run(stock, data)
    damaged = data.parent / "damaged"
    shutil.copytree(model, damaged)
    (damaged / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError):
        run(damaged, data)
    assert not list(data.parent.glob("*out.jsonl*"))
    # What a kill at that moment leaves: settings of another run, and no line.
    (data.parent / "out.jsonl.run.json").write_text('{"model_fingerprint": "other"}')
    assert run(model, data).errors == 0


def test_what_can_be_known_is_reported_before_weights_are_read(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*_arguments: Any, **_keywords: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(infer_module, "load_engine", no_model)
    file, folder = data.parent / "a-file", data.parent / "images"
    file.write_text("x")
    broken = data.parent / "broken"
    shutil.copytree(model, broken)
    (broken / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.content }}"
    )
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (DeviceError, "expected auto, cpu", {"device": "warp"}),
        (DataError, "no such folder", {"root": str(data.parent / "nowhere")}),
        (DataError, "no such file", {"data": str(data.parent / "none.json")}),
        (CheckpointError, "no such model folder", {"model": str(data.parent / "nowhere")}),
        (CheckpointError, "not a model folder", {"model": str(folder)}),
        (
            RecipeError,
            "no tokens for a prompt",
            {"generation": GenerationOptions(max_new_tokens=600)},
        ),
        (
            RecipeError,
            r"chat template has an error \(TemplateSyntaxError, line 1",
            {"model": str(broken)},
        ),
        (NotADirectoryError, "a-file", {"output": str(file / "out.jsonl")}),
        (IsADirectoryError, "images", {"output": str(folder)}),
        (OSError, "too long", {"output": str(data.parent / ("n" * 300))}),
        (MedmError, "device, pipe or socket", {"output": os.devnull}),
        (IsADirectoryError, "images", {"json_output": str(folder)}),
        (NotADirectoryError, "a-file", {"json_output": str(file / "all.json")}),
        (
            RecipeError,
            "--data and --output are the same file",
            {"output": str(data), "overwrite": True},
        ),
        (
            RecipeError,
            "--data and --json are the same file",
            {"json_output": str(data.parent / "." / data.name)},
        ),
        (RecipeError, "--output and --json are", {"json_output": str(data.parent / "out.jsonl")}),
        (
            RecipeError,
            "--output and --json are",
            {"json_output": str(data.parent / "out.jsonl.run.json")},
        ),
    ]
    settings = {
        "model": str(model),
        "data": str(data),
        "output": str(data.parent / "out.jsonl"),
        "device": "cpu",
    }
    for kind, words, changes in cases:
        with pytest.raises(kind, match=words):
            infer(InferOptions(**(settings | changes)))
    with (
        Results(data.parent / "out.jsonl", {}).locked(),
        pytest.raises(MedmError, match="another run is writing"),
    ):
        run(model, data)
    assert not list(data.parent.glob("*out.jsonl*"))
    assert data.stat().st_size > 1000


def test_the_json_is_json_whatever_the_records_hold(model: Path, data: Path) -> None:
    records = json.loads(data.read_text())[:5]
    records[0]["note"] = "half \ud800 a pair"
    records[1]["\udfff"] = 1
    deep: Any = "bottom"
    for _ in range(400):
        deep = [deep]
    records[2]["nested"] = deep
    records[3]["size"] = 12345
    records[4]["id"] = 7
    text = json.dumps(records).replace("12345", "1e999")
    data.write_text(text)
    summary = run(model, data, json_output=str(data.parent / "all.json"))
    assert (summary.answered, summary.errors) == (2, 3)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    written = json.loads((data.parent / "all.json").read_bytes(), parse_constant=refuse)
    assert [item.get("id") for item in written] == [None, None, "q2", None, 7]
    assert "half of a surrogate pair" in written[0]["error"]
    assert written[2]["nested"] == deep
    assert "1e999" in written[3]["error"]
    assert [line.get("id") for line in read_output(data.parent / "out.jsonl")] == [
        None,
        None,
        "q2",
        None,
        "7",
    ]


def test_text_that_utf_8_cannot_hold_is_written_as_json_has_it(tmp_path: Path) -> None:
    item = {"\udfff": "half \ud800 a pair", "note": "µ"}
    atomic_write_text(tmp_path / "all.json", json.dumps([item], ensure_ascii=False))
    assert json.loads((tmp_path / "all.json").read_bytes()) == [item]
    with Appender(tmp_path / "out.jsonl") as lines:
        lines.add([item])
    assert read_output(tmp_path / "out.jsonl") == [item]


def test_a_killed_worker_is_a_message(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, real = os.getpid(), os.open

    def deadly(file: Any, *arguments: Any, **keywords: Any) -> int:
        if os.getpid() != parent and str(file).endswith(".png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(file, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(images.os, "open", deadly)
        done = medm(*command(model, data)[:-1], "1")
    assert done.code == 1
    assert "a process that prepares data was killed" in done.err
    assert "Traceback" not in done.err
    assert medm(*command(model, data)).code == 0
