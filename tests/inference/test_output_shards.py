"""Batch inference in the tasks of a job array: kills, missing shards, and one output byte for
byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medm.data.conversations import Conversations
from medm.data.options import SourceOptions
from medm.data.owners import Shard
from medm.data.records import Records
from medm.errors import RecipeError
from medm.inference.batch import InferSummary, infer
from medm.inference.options import GenerationOptions, InferOptions
from medm.inference.output_shards import owned_indices
from medm.inference.predictions import Appender
from tests.cli.runner import medm
from tests.inference.tiny import questions, read_output, save_image, save_tiny, write_records

REPLY = GenerationOptions(max_new_tokens=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("shards"))


def run(model: Path, data: Path, output: Path, **changes: Any) -> InferSummary:
    given = {"generation": REPLY, "device": "cpu", "workers": 0, "batch_size": 1} | changes
    summary = infer(InferOptions(model=str(model), data=str(data), output=str(output), **given))
    assert summary is not None
    return summary


class KilledError(BaseException):
    """Stands for SIGKILL: nothing behind it handles it."""


def test_shards_that_were_killed_and_merged_are_one_run_byte_for_byte(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[Any] = questions(tmp_path, 13)
    del records[3]["id"], records[5]["id"]
    records[4]["image"] = "late.png"
    records.append("no object")
    data = write_records(tmp_path, records)
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    run(model, data, whole)
    with pytest.raises(RecipeError, match="has no shards yet"):
        run(model, data, parts, merge=True)
    assert not list(tmp_path.glob("parts*")), "a refused merge leaves nothing"

    add, lines = Appender.add, []

    def killed(self: Appender, given: Any) -> None:
        add(self, given)
        lines.append(given)
        if len(lines) == 2:
            with self.file.open("ab") as stream:
                stream.write(b'{"index": 9, "rep')
            raise KilledError

    with monkeypatch.context() as patched, pytest.raises(KilledError):
        patched.setattr(Appender, "add", killed)
        patched.setattr("medm.inference.batch._BATCHES_AHEAD", 1)
        run(model, data, parts, shard="0/3")
    with pytest.raises(RecipeError, match=r"2 of 3 shards are missing \(1/3, 2/3\)"):
        run(model, data, parts, merge=True)
    summaries = [run(model, data, parts, shard=f"{i}/3") for i in (1, 2)]
    with pytest.raises(RecipeError, match=r"shard 0/3 lacks \d+ of its \d+ records"):
        run(model, data, parts, merge=True)
    summaries.append(run(model, data, parts, shard="0/3"))
    assert summaries[-1].resumed > 0
    assert sum(summary.records for summary in summaries) == 14
    merged = run(model, data, parts, merge=True, json_output=str(tmp_path / "parts.json"))
    assert (merged.records, merged.answered, merged.errors) == (14, 12, 2)
    assert parts.read_bytes() == whole.read_bytes()
    assert len(json.loads((tmp_path / "parts.json").read_text())) == 14

    # The file comes: only what failed is tried again, then merged anew.
    save_image(tmp_path / "late.png", 7)
    for i in range(3):
        run(model, data, parts, shard=f"{i}/3", only_failed=True)
    assert run(model, data, whole).errors == run(model, data, parts, merge=True).errors == 1
    assert parts.read_bytes() == whole.read_bytes()


def test_the_tasks_of_a_folder_have_one_list_of_files(model: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "images", tmp_path / "out.jsonl"
    for n in range(4):
        save_image(folder / f"{n}.png", n)
    given: dict[str, Any] = {"folder": str(folder), "prompt": "What?", "generation": REPLY}
    given |= {"model": str(model), "output": str(output), "device": "cpu", "workers": 0}

    def run_folder(**more: Any) -> InferSummary:
        summary = infer(InferOptions(**given | more))
        assert summary is not None
        return summary

    first = run_folder(shard="0/2")
    save_image(folder / "00.png", 9)  # sorted before the others: positions would shift
    second = run_folder(shard="1/2", overwrite=True)
    assert first.records + second.records == 4
    assert run_folder(merge=True).answered == 4
    assert [line["id"] for line in read_output(output)] == [f"{n}.png" for n in range(4)]


def test_only_failed_tries_nothing_new(model: Path, tmp_path: Path) -> None:
    data = write_records(tmp_path, questions(tmp_path, 4))
    summary = run(model, data, tmp_path / "out.jsonl", shard="0/1", only_failed=True)
    assert (summary.records, summary.answered, summary.errors) == (4, 0, 0)


def test_shards_of_other_settings_are_not_merged(model: Path, tmp_path: Path) -> None:
    data, output = write_records(tmp_path, questions(tmp_path, 4)), tmp_path / "out.jsonl"
    for i in range(2):
        run(model, data, output, shard=f"{i}/2")
    longer = GenerationOptions(max_new_tokens=5)
    with pytest.raises(RecipeError, match="max_new_tokens was 4 and is now 5"):
        run(model, data, output, merge=True, generation=longer)
    with pytest.raises(RecipeError, match="holds replies of another run"):
        run(model, data, output, shard="0/2", generation=longer)
    run(model, data, output, shard="0/3")
    with pytest.raises(RecipeError, match="has shards of 2 and of 3; delete"):
        run(model, data, output, merge=True)
    assert not output.exists()


def test_owners_depend_on_names_alone(tmp_path: Path) -> None:
    records = questions(tmp_path, 40)
    for record in records[:10]:
        del record["id"]

    def owners(records: list[Any], name: str) -> dict[str, int]:
        source = SourceOptions(path=str(write_records(tmp_path, records, name)))
        opened = Records([source], Conversations(inference=True))
        found = {}
        for number in range(4):
            for index in owned_indices(opened, Shard(number, 4)):
                found[str(records[index])] = number
        return found

    before = owners(records, "a.json")
    more = [{**record, "id": f"new{n}"} for n, record in enumerate(records[10:30])]
    after = owners([*more, *reversed(records)], "b.json")
    assert set(before.values()) == {0, 1, 2, 3}
    assert before.items() <= after.items()


def test_wrong_shards_are_refused(model: Path, tmp_path: Path) -> None:
    data = write_records(tmp_path, questions(tmp_path, 2))
    given = ["infer", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "o")]
    for words, expected in {
        ("--shard", "4/4"): "expected i/N with i from 0 to N-1",
        ("--shard", "0/2", "--merge"): "expected neither shard nor only_failed",
        ("--shard", "0/2", "--json", str(tmp_path / "j")): "json and csv belong to merge",
        ("--only-failed", "--overwrite"): "would delete",
    }.items():
        done = medm(*given, *words)
        assert done.code == 2, words
        assert expected in done.err
    done = medm(*given, "--shard", "1/2", "--max-new-tokens", "3", "--workers", "0")
    assert done.code == 0, done.err
    assert str(tmp_path / "o.shard-1-of-2") in done.out
    assert len(read_output(tmp_path / "o.shard-1-of-2")) < 2 or done.out.startswith("2 records")
