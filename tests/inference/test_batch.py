"""Batch inference: each record answered once, whatever is bad, killed or started again."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from medm.errors import CheckpointError, DataError, MedmError, RecipeError
from medm.inference import batch
from medm.inference.batch import InferSummary, infer, with_reply
from medm.inference.batches import shard_indices
from medm.inference.options import GenerationOptions, InferOptions
from medm.inference.predictions import Appender, Results, encode, model_fingerprint
from tests.cli.runner import medm
from tests.inference.tiny import questions, read_output, save_tiny, write_records
from tests.planted import marks, plant

ROOT = Path(__file__).parents[2]
REPLY = GenerationOptions(max_new_tokens=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("infer"))


def run(model: Path, data: Path, output: Path, **changes: Any) -> InferSummary:
    given = {"generation": REPLY, "device": "cpu", "workers": 0, "batch_size": 4} | changes
    summary = infer(InferOptions(model=str(model), data=str(data), output=str(output), **given))
    assert summary is not None
    return summary


def test_batches_resume_and_processes_answer_like_one_by_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "medm")
    data = write_records(tmp_path, questions(tmp_path, 11))
    assert run(model, data, tmp_path / "one.jsonl", batch_size=1).answered == 11
    one = read_output(tmp_path / "one.jsonl")
    assert [line["index"] for line in one] == list(range(11))
    assert [line["id"] for line in one] == [f"q{i}" for i in range(11)]
    assert len({line["reply"] for line in one}) > 5

    assert run(model, data, tmp_path / "four.jsonl", workers=1).errors == 0
    assert read_output(tmp_path / "four.jsonl") == one

    assert run(model, data, tmp_path / "part.jsonl", limit=4).records == 4
    again = run(model, data, tmp_path / "part.jsonl")
    assert (again.resumed, again.answered) == (4, 11)
    assert read_output(tmp_path / "part.jsonl") == one
    assert run(model, data, tmp_path / "part.jsonl").resumed == 11

    reported: list[tuple[int, int, int]] = []
    planted = plant(tmp_path)
    monkeypatch.chdir(planted)
    options = InferOptions(
        model=str(model),
        data=str(data),
        output=str(tmp_path / "two.jsonl"),
        generation=REPLY,
        device="cpu",
        workers=0,
        batch_size=2,
        processes=2,
    )
    infer(options, progress=lambda *numbers: reported.append(numbers))
    assert read_output(tmp_path / "two.jsonl") == one
    assert reported[-1] == (11, 11, 0)
    forwarded = [record for record in caplog.records if record.process != os.getpid()]
    assert "process 0 of 2: 6 records to answer" in [record.getMessage() for record in forwarded], (
        "a child's log lines come through its parent, in its form"
    )
    assert marks(planted) == [], "a process imported from the working folder"
    assert not list(tmp_path.glob("two.jsonl.part*"))


def test_bad_records_become_lines_with_their_error(model: Path, tmp_path: Path) -> None:
    records: list[Any] = questions(tmp_path, 6)
    records[1]["image"] = ["missing.png"]
    records[2]["image"] = ["../outside.png"]
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:400])
    records[3]["image"] = "cut.png"
    records[4]["conversations"] = []
    records.append("no object")
    records.append(
        {"volume": "a.nii.gz", "conversations": [{"from": "human", "value": "<volume>?"}]}
    )
    records.append({"conversations": [{"from": "human", "value": "long " * 200}]})
    data = write_records(tmp_path, records)
    summary = run(model, data, tmp_path / "out.jsonl", json_output=str(tmp_path / "out.json"))
    lines = read_output(tmp_path / "out.jsonl")
    assert (summary.answered, summary.errors) == (2, 7)
    assert ["reply" in line for line in lines] == [True, *[False] * 4, True, False, False, False]
    expected = {
        1: "field 'image.0': 'missing.png': no such file",
        2: "'..' is refused",
        3: "field 'image'",
        4: "empty",
        6: "expected an object",
        7: "field 'volume'",
        8: "the model's context",
    }
    for index, words in expected.items():
        assert words in lines[index]["error"], index
    written = json.loads((tmp_path / "out.json").read_text())
    assert len(written) == 9
    assert written[1]["error"] == lines[1]["error"]
    assert written[1]["id"] == "q1"
    assert written[6] == {"error": lines[6]["error"]}


def test_an_unknown_task_is_the_error_of_its_record_alone(tmp_path: Path) -> None:
    connector = {"name": "moe", "num_experts": 2, "gate": "hard", "router_dim": 8}
    folder = save_tiny(tmp_path, connector=connector, tasks=["vqa", "cls"])
    records = [
        record | {"task": "vqa"} for record in questions(tmp_path, 5)
    ]  # the first is text only
    records[2]["task"] = "surgery"
    del records[3]["task"], records[0]["task"]
    summary = run(folder, write_records(tmp_path, records), tmp_path / "out.jsonl")
    assert (summary.answered, summary.errors) == (3, 2)
    lines = read_output(tmp_path / "out.jsonl")
    assert "reply" in lines[0]
    assert "field 'task': the record has the task 'surgery'" in lines[2]["error"]
    assert "expected one of vqa, cls" in lines[3]["error"]
    asked = medm(
        "chat", "--model", str(folder), "--image", str(tmp_path / "0.png"), "--task", "surgery"
    )
    assert asked.code == 1
    assert "task 'surgery': expected one of vqa, cls" in asked.err


def test_a_run_of_an_earlier_version_resumes_if_its_options_mean_the_same(
    model: Path, tmp_path: Path
) -> None:
    """Its settings name `num_beams` and not `top_k`."""
    data, output = write_records(tmp_path, questions(tmp_path, 3)), tmp_path / "out.jsonl"
    run(model, data, output)
    sidecar = tmp_path / "out.jsonl.run.json"
    settings = json.loads(sidecar.read_text())
    del settings["generation"]["top_k"]
    for beams in (1, 3):
        settings["generation"]["num_beams"] = beams
        sidecar.write_text(json.dumps(settings))
        if beams == 1:
            assert run(model, data, output).resumed == 3
        else:
            with pytest.raises(RecipeError, match="num_beams was 3 and is now None"):
                run(model, data, output)


def test_the_json_has_the_form_of_medm_vl(model: Path, tmp_path: Path) -> None:
    records = questions(tmp_path, 2)
    records[0]["conversations"].append({"from": "gpt", "value": "参考答案"})
    records[0]["question_type"] = "organ"
    records[1]["answer"] = "yes"
    data = write_records(tmp_path, records)
    run(model, data, tmp_path / "out.jsonl", json_output=str(tmp_path / "new" / "out.json"))
    lines = read_output(tmp_path / "out.jsonl")
    text = (tmp_path / "new" / "out.json").read_text(encoding="utf-8")
    first, second = json.loads(text)
    assert "参考答案" in text
    assert first["answer"] == lines[0]["answer"] == "参考答案"
    assert first["conversations"][1:] == [{"from": "gpt", "value": lines[0]["reply"]}]
    assert first["question_type"] == "organ"
    assert second["answer"] == "yes"
    assert list(second) == ["id", "conversations", "image", "answer"]


def test_a_reply_takes_the_form_of_its_record() -> None:
    line = {"index": 0, "reply": "No."}
    chat = {"messages": [{"role": "user", "content": "?"}]}
    assert with_reply(chat, line)["messages"][-1] == {"role": "assistant", "content": "No."}
    assert len(chat["messages"]) == 1


def test_killed_at_any_moment_each_record_is_answered_once(model: Path, tmp_path: Path) -> None:
    data = write_records(tmp_path, questions(tmp_path, 200))
    run(model, data, tmp_path / "whole.jsonl")
    output = tmp_path / "killed.jsonl"
    command = [
        sys.executable, "-m", "medm", "infer", "--model", str(model), "--data", str(data), "--output", str(output),
        "--max-new-tokens", "5", "--batch-size", "4", "--device", "cpu", "--workers", "0",
    ]  # fmt: skip
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (output.exists() and output.read_bytes().count(b"\n") >= 4):
        assert child.poll() is None, child.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    for changes in ({"overwrite": True}, {"processes": 2}, {"limit": 3}, {}):
        with pytest.raises(
            MedmError, match=f"another run is writing to it .process {child.pid} on "
        ):
            run(model, data, output, **changes)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    kept = output.read_bytes()
    assert output.with_name(".killed.jsonl.lock").exists()  # stale, and in nobody's way
    answered = kept.count(b"\n")
    assert 4 <= answered < 200
    output.write_bytes(kept + b'{"index": 3, "rep')  # and killed again, in the middle of a line
    summary = run(model, data, output)
    assert summary.resumed == answered
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not output.with_name(".killed.jsonl.lock").exists()


def test_lines_of_another_run_are_never_mixed(model: Path, tmp_path: Path) -> None:
    data = write_records(tmp_path, questions(tmp_path, 3))
    output = tmp_path / "out.jsonl"
    run(model, data, output, limit=1)
    with pytest.raises(RecipeError, match="max_new_tokens was 5 and is now 6"):
        run(model, data, output, generation=GenerationOptions(max_new_tokens=6))
    write_records(tmp_path, questions(tmp_path, 4))
    with pytest.raises(RecipeError, match=r"another run \(the data file changed\)"):
        run(model, data, output)
    assert run(model, data, output, overwrite=True).resumed == 0
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(RecipeError, match=r"no other\.jsonl\.run\.json"):
        run(model, data, tmp_path / "other.jsonl")


def test_the_fingerprint_sees_weights_and_generation_but_no_notes(
    model: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    before = model_fingerprint(model)
    (copy / "README.md").write_text("notes")
    assert model_fingerprint(copy) == before
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert model_fingerprint(copy) != before


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    with (
        Appender(tmp_path / "out.jsonl"),
        pytest.raises(MedmError, match="another process is writing"),
    ):
        Appender(tmp_path / "out.jsonl")


def test_a_merge_that_was_interrupted_is_repeated(tmp_path: Path) -> None:
    results = Results(tmp_path / "out.jsonl", {})
    (tmp_path / "out.jsonl").write_text(encode({"index": 1, "reply": "b"}))
    (tmp_path / "out.jsonl.part-0-of-2").write_text(
        encode({"index": 1, "reply": "b"}) + encode({"index": 0, "reply": "a"})
    )
    (tmp_path / "out.jsonl.part-1-of-3").write_text(
        encode({"index": 2, "reply": "c"}) + '{"index": 9'
    )
    assert sorted(results.finish()) == [0, 1, 2]
    assert [line["reply"] for line in read_output(tmp_path / "out.jsonl")] == ["a", "b", "c"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text('{"index": 0}\nnonsense\n{"index": 1}\n')
    with pytest.raises(MedmError, match=r"out\.jsonl, line 2: damaged"):
        Results(tmp_path / "out.jsonl", {}).done()


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_every_record_is_dealt_to_one_process(world: int, count: int) -> None:
    order = list(reversed(range(count)))
    shards = [shard_indices(order, rank=rank, world=world).tolist() for rank in range(world)]
    assert sorted(index for share in shards for index in share) == list(range(count))
    assert max(map(len, shards)) - min(map(len, shards)) <= 64


def test_what_cannot_begin_says_why(model: Path, tmp_path: Path) -> None:
    data = write_records(tmp_path, questions(tmp_path, 1))
    with pytest.raises(CheckpointError, match="no such model folder"):
        run(tmp_path / "nowhere", data, tmp_path / "o.jsonl")
    with pytest.raises(DataError, match="no such file"):
        run(model, tmp_path / "none.json", tmp_path / "o.jsonl")
    with pytest.raises(RecipeError, match="leaves no tokens for a prompt"):
        run(model, data, tmp_path / "o.jsonl", generation=GenerationOptions(max_new_tokens=600))
    with pytest.raises(ValueError, match="top_p"):
        GenerationOptions(top_p=0.5)


def test_a_process_opens_records_config_and_device_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a large annotation file three times costs minutes on a network share."""
    calls: list[str] = []
    for name in ("Records", "load_config", "pick_device"):
        original = getattr(batch, name)

        def counted(
            *given: Any, _name: str = name, _original: Any = original, **keywords: Any
        ) -> Any:
            calls.append(_name)
            return _original(*given, **keywords)

        monkeypatch.setattr(batch, name, counted)
    data = write_records(tmp_path, questions(tmp_path, 2))
    assert (
        run(model, data, tmp_path / "o.jsonl", json_output=str(tmp_path / "o.json")).answered == 2
    )
    assert sorted(calls) == ["Records", "load_config", "pick_device"]


def test_the_command(model: Path, tmp_path: Path) -> None:
    data = write_records(tmp_path, questions(tmp_path, 3))
    common = (
        "infer",
        "--model",
        str(model),
        "--data",
        str(data),
        "--output",
        str(tmp_path / "o.jsonl"),
    )
    done = medm(
        *common, "--max-new-tokens", "3", "--json", str(tmp_path / "o.json"), "--device", "cpu"
    )
    assert done.code == 0, done.err
    assert "3 records: 3 answered, 0 without a reply" in done.out
    assert "Not for clinical use." in done.err
    assert len(json.loads((tmp_path / "o.json").read_text())) == 3
    assert medm(*common, "--max-new-tokens", "4").code == 2
    wrong = medm(*common, "--top-p", "2")
    assert wrong.code == 2
    assert "--top-p: expected less than or equal to 1" in wrong.err


def test_a_full_disk_is_reported_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        Appender(tmp_path / "out.jsonl") as lines,
        pytest.raises(MedmError, match=r"No space left.*same command again"),
    ):
        lines.add([{"id": 1}])
