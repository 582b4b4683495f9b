"""`medm data convert csv`, `folder` and `rows`: records that the pipelines read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medm.data.convert.rows import PromptPool, RecordMaker, Row
from medm.errors import DataError, RecipeError
from medm.types import Media
from tests.cli.runner import medm

SECRET = "Mrs. Zyx"


def picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def table(folder: Path, *rows: Sequence[str]) -> Path:
    text = "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)
    (folder / "t.csv").write_text(text + "\n", encoding="utf-8")
    return folder / "t.csv"


def records(file: Path) -> list[dict[str, Any]]:
    text = file.read_text("utf-8")
    return json.loads(text) if file.suffix == ".json" else list(map(json.loads, text.splitlines()))


def convert(*arguments: object, code: int = 0) -> str:
    done = medm("data", "convert", *map(str, arguments))
    assert done.code == code, done.out + done.err
    assert SECRET not in done.out + done.err
    return " ".join((done.out + done.err).replace("\u2502", " ").split())


def check(file: Path, *arguments: str) -> None:
    done = medm("data", "check", str(file), "--decode", *arguments)
    assert done.code == 0, done.out


def test_reports_with_a_pool_of_questions(tmp_path: Path) -> None:
    for number in range(6):
        picture(tmp_path / f"{number}.png", number)
    file = table(
        tmp_path,
        ("who", "path", "side", "report"),
        *((f"{SECRET}{n // 2}", f"{n}.png", "", f"Report {n} <image>") for n in range(5)),
        (SECRET, "5.png", "0.png", " "),
        (SECRET, "gone.png", "", "x"),
        (SECRET, "../t.csv", "", "x"),
        (SECRET, str(tmp_path / "5.png"), "0.png", "both"),
    )
    (tmp_path / "pool.txt").write_text("Q1?\n\nQ2?\nQ3?\n")
    arguments = (
        "csv", file, tmp_path / "o.jsonl", "--image-column", "path", "--image-column", "side",
        "--text-column", "report", "--patient-column", "who", "--prompts", tmp_path / "pool.txt",
        "--prompt", "Q0?",
    )  # fmt: skip
    said = convert(*arguments, "--seed", "1")
    assert "o.jsonl: 6 conversations" in said
    assert f"1 left out: no text; the first: {file}, record 5: column 'report' is blank" in said
    assert "1 left out: a file is missing" in said and "1 left out: a path that is refused" in said
    made = records(tmp_path / "o.jsonl")
    check(tmp_path / "o.jsonl")
    asked = {json.dumps(one["conversations"]) for one in made}
    assert sum(question in text for text in asked for question in ("Q0", "Q1", "Q2", "Q3")) == 6
    assert len({text.split("Q")[1][:1] for text in asked}) > 1
    assert made[0]["conversations"][-1]["value"] == "Report 0 <image>"
    assert made[-1]["image"] == ["5.png", "0.png"]
    assert made[-1]["conversations"][0]["value"].startswith("<image>\n<image>\nQ")
    patients = [one["patient"] for one in made]
    assert patients[0] == patients[1] != patients[2] and len(set(patients)) == 4
    assert SECRET not in (tmp_path / "o.jsonl").read_text()
    convert(*arguments, "--seed", "1")
    again = records(tmp_path / "o.jsonl")
    without_names = [{k: v for k, v in one.items() if k != "patient"} for one in made]
    assert without_names == [{k: v for k, v in one.items() if k != "patient"} for one in again]
    assert patients != [one["patient"] for one in again]  # the salt is random
    (tmp_path / "salt").write_text("a salt of 16 bytes")
    names = []
    for _ in range(2):
        convert(*arguments, "--salt-file", tmp_path / "salt")
        names.append([one["patient"] for one in records(tmp_path / "o.jsonl")])
    assert names[0] == names[1]
    assert "Q0?" in json.dumps(records(tmp_path / "o.jsonl")[3])  # without a seed the first


def test_questions_pairs_and_studies(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", 1)
    file = table(
        tmp_path,
        ("id", "file", "question", "answer", "edema", "mass", "kind"),
        ("1", '[""a.png"", ""b.png""]', "Is it big?", "no", "1", "", "ct"),
        ("2", "b.png", "Where?", "left", "0.0", "-1", "mr"),
        ("3", "b.png", "Where?", "left", SECRET, "0", "mr"),
    )
    base = ("csv", file)
    columns = ("--image-column", "file", "--id-column", "id")
    ask = ("--question-column", "question", "--answer-column", "answer")
    convert(*base, tmp_path / "c.json", *columns, *ask)
    check(tmp_path / "c.json")
    first = records(tmp_path / "c.json")[0]
    assert first["conversations"] == [
        {"from": "human", "value": "<image>\n<image>\nIs it big?"}, {"from": "gpt", "value": "no"},
    ]  # fmt: skip
    said = convert(
        *base, tmp_path / "s.json", *columns, *ask, "--label-columns", "edema, mass",
        "--to", "studies",
    )  # fmt: skip
    assert "1 left out: a label that is none; the first:" in said and "column 'edema'" in said
    check(tmp_path / "s.json", "--pipeline", "studies")
    made = records(tmp_path / "s.json")
    assert made[0]["labels"] == {"edema": 1, "mass": None}
    assert made[1] == {
        "id": "2", "images": ["b.png"], "question": "Where?", "answer": "left",
        "labels": {"edema": 0, "mass": None},
    }  # fmt: skip
    said = convert(
        *base, tmp_path / "p.jsonl", *columns, "--text-column", "answer", "--label-columns", "kind",
        "--to", "pairs",
    )  # fmt: skip
    assert "1 left out: no record of the form pairs" in said and "a pair has one file" in said
    check(tmp_path / "p.jsonl", "--pipeline", "pairs")
    assert records(tmp_path / "p.jsonl")[0] == {
        "id": "2", "image": "b.png", "caption": "left", "label": "mr",
    }  # fmt: skip
    convert(*base, tmp_path / "i.json", *columns, "--question-column", "question")
    check(tmp_path / "i.json", "--inference")
    assert len(records(tmp_path / "i.json")[0]["conversations"]) == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--text-column", "report"], "no column of images or volumes is named"),
        (["--image-column", "pth"], "no column 'pth': did you mean 'path'"),
        (["--image-column", "path", "--text-column", "report", "--question-column", "path"],
         "name one or the other"),
        (["--image-column", "path", "--prompt", "<image> What?"], "a prompt holds a placeholder"),
        (["--image-column", "path", "--to", "pairs", "--prompt", "Q"], "are for conversations"),
        (["--image-column", "path", "--text-column", "report", "--label-columns", "report"],
         "there are no records to write"),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit(tmp_path: Path, arguments: list[str], reason: str) -> None:
    picture(tmp_path / "a.png")
    file = table(tmp_path, ("path", "report"), ("a.png", SECRET))
    done = medm("data", "convert", "csv", str(file), str(tmp_path / "o.json"), *arguments)
    said = " ".join((done.out + done.err).replace("\u2502", " ").split())
    assert done.code != 0 and reason in said, said
    assert SECRET not in said
    assert not (tmp_path / "o.json").exists()


def test_folders_of_texts_and_of_classes(tmp_path: Path) -> None:
    for name in ("x/a.png", "x/b.png", "y/c.png"):
        picture(tmp_path / "in" / name, len(name))
    source = tmp_path / "in"
    said = convert("folder", source, tmp_path / "c.json")
    assert "answers: classes; 3 files" in said
    check(tmp_path / "c.json", "--root", str(source))
    made = records(tmp_path / "c.json")
    assert made[2]["conversations"][1]["value"] == "y"
    question = "<image>\nWhich of these does the image show: x, y?"
    assert made[0]["conversations"][0]["value"] == question
    (source / "x" / "a.txt").write_text("A small nodule.\n", encoding="utf-8-sig")
    (source / "y" / "c.txt").write_bytes(b"\xff\xfe")
    said = convert("folder", source, tmp_path / "t.json", "--prompt", "Report.")
    assert "answers: texts" in said and "2 left out: no text beside the file" in said
    assert "expected b.txt beside it" in said and "c.txt is not UTF-8 at byte 0" in said
    (one,) = records(tmp_path / "t.json")
    assert one["id"] == "x/a.png" and one["conversations"][1]["value"] == "A small nodule."
    convert("folder", source, tmp_path / "n.json", "--answers", "none")
    check(tmp_path / "n.json", "--root", str(source), "--inference")
    convert("folder", source, tmp_path / "p.json", "--answers", "classes", "--to", "pairs")
    assert records(tmp_path / "p.json")[0]["label"] == "x"
    picture(source / "top.png")
    said = convert("folder", source, tmp_path / "e.json", "--answers", "classes", code=1)
    assert "expected each file in a folder of its class" in said
    assert "no volume in it" in convert(
        "folder", source, tmp_path / "e.json", "--kind", "volume", code=1
    )


ALPACA = {
    "instruction": "What is it?",
    "input": "Be short.",
    "output": "A lung.",
    "images": ["a.png"],
}
QUERY = {
    "query": "And <image>now?", "response": "Still.", "image": "a.png", "system": "Be kind.",
    "history": [["Hello?", "Yes."]],
}  # fmt: skip
SHARED = {
    "talk": [{"who": "person", "what": "Look."}, {"who": "model", "what": "I see."}],
    "pictures": ["a.png", "b.png"],
}  # fmt: skip


def test_rows_of_other_programs(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    bad = [
        {**ALPACA, "videos": ["v.mp4"]}, {**ALPACA, "output": ""}, {**ALPACA, "images": ["a.png"] * 2,
        "instruction": "<image>"}, ["no object"],
    ]  # fmt: skip
    (tmp_path / "alpaca.json").write_text(json.dumps([ALPACA, *bad]))
    said = convert("rows", tmp_path / "alpaca.json", tmp_path / "o.json")
    assert "1 conversations, alpaca" in said and "4 left out" in said
    assert "medm does not train video" in said and "the reply is empty" in said
    (one,) = records(tmp_path / "o.json")
    assert one["conversations"] == [
        {"from": "human", "value": "<image>\nWhat is it?\nBe short."},
        {"from": "gpt", "value": "A lung."},
    ]
    check(tmp_path / "o.json")
    (tmp_path / "swift.jsonl").write_text(json.dumps(QUERY) + "\n")
    convert("rows", tmp_path / "swift.jsonl", tmp_path / "q.json")
    check(tmp_path / "q.json")
    (one,) = records(tmp_path / "q.json")
    assert [turn["value"] for turn in one["conversations"]] == [
        "Hello?", "Yes.", "And <image>now?", "Still.",
    ]  # fmt: skip
    assert one["system"] == "Be kind."
    rows = [{**ALPACA, "patient": n // 2, "study": f"s{n}"} for n in range(8)]
    (tmp_path / "patients.json").write_text(json.dumps(rows))
    convert("rows", tmp_path / "patients.json", tmp_path / "p.jsonl")
    assert [(one["patient"], one["study"]) for one in records(tmp_path / "p.jsonl")] == [
        (n // 2, f"s{n}") for n in range(8)
    ]
    table(tmp_path, ("instruction", "output", "input", "patient"), ("Why?", "So.", "", "P1"))
    convert("rows", tmp_path / "t.csv", tmp_path / "t.jsonl")
    assert records(tmp_path / "t.jsonl")[0]["patient"] == "P1"


def test_a_registry_of_sources(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "shared.json").write_text(json.dumps([SHARED] * 3))
    table(tmp_path, ("file", "q", "a"), ("a.png", "Why?", "So."))
    registry = {
        "shared": {
            "file_name": "shared.json", "formatting": "sharegpt", "num_samples": 2,
            "columns": {"messages": "talk", "images": "pictures"},
            "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "person",
                     "assistant_tag": "model"},
        },
        "sheet": {"file_name": "t.csv", "columns": {"prompt": "q", "query": "", "response": "a",
                                                    "images": "file"}},
        "hub": {"hf_hub_url": "x/y"},
        "ranked": {"file_name": "shared.json", "ranking": True},
        "typo": {"file_name": "shared.json", "colums": {}},
    }  # fmt: skip
    file = tmp_path / "dataset_info.json"
    file.write_text(json.dumps(registry))
    convert("rows", file, tmp_path / "o.json", "--source", "shared")
    made = records(tmp_path / "o.json")
    assert len(made) == 2 and made[0]["conversations"][0]["value"] == "<image>\n<image>\nLook."
    check(tmp_path / "o.json")
    convert("rows", file, tmp_path / "s.json", "--source", "sheet")
    (one,) = records(tmp_path / "s.json")
    assert one["image"] == ["a.png"] and one["conversations"][1]["value"] == "So."
    for name, reason in (
        ("hub", "nothing is downloaded; give file_name"),
        ("ranked", "medm does not train preferences"),
        ("typo", "unknown key 'colums': did you mean 'columns'"),
        ("shard", "did you mean 'shared'"),
    ):
        said = convert("rows", file, tmp_path / "e.json", "--source", name, code=2)
        assert reason in said
    said = convert("rows", file, tmp_path / "e.json", code=1)
    assert "expected instruction and output (Alpaca)" in said


def test_the_old_form_of_the_command_is_still_read(tmp_path: Path) -> None:
    for arguments in (
        (tmp_path / "o.json", "--task", "m3d-kap", "--data", tmp_path),
        ("--task", "m3d-kap", "--data", tmp_path, tmp_path / "o.json"),
        ("published", tmp_path / "o.json", "--task", "m3d-kap", "--data", tmp_path),
    ):
        assert "did you mean 'm3d-cap'" in convert(*arguments, code=2)


def test_a_source_that_is_none_is_named(tmp_path: Path) -> None:
    said = convert("cvs", tmp_path / "t.csv", tmp_path / "o.json", code=2)
    assert "expected a source: did you mean 'csv'?" in said


def test_a_pool_draws_the_same_for_the_same_row() -> None:
    pool = PromptPool(["a", "b", "c"], seed=3)
    drawn = [pool.pick(index, "image") for index in range(60)]
    assert drawn == [PromptPool(["a", "b", "c"], seed=3).pick(i, "image") for i in range(60)]
    assert {drawn.count(one) > 8 for one in "abc"} == {True}
    assert PromptPool(["a", "b"]).pick(9, "image") == "a"
    assert PromptPool().pick(0, "volume") == "Describe the findings of this scan."
    with pytest.raises(RecipeError, match="the pool of prompts is empty"):
        PromptPool([])
    maker = RecordMaker("studies", pool)
    with pytest.raises(DataError, match="a study holds images, found a volume") as raised:
        maker.make(Row(media=[Media("volume", "a.nii")], text="x"), file=Path("t.csv"), index=4)
    assert (raised.value.file, raised.value.index) == (Path("t.csv"), 4)
