"""`medm infer --image --prompt`: one question without files of records, and CSV."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from medm.errors import DataError
from medm.inference.batch import infer
from medm.inference.folder_records import file_record
from medm.inference.options import GenerationOptions, InferOptions
from tests.cli.runner import medm
from tests.inference.tiny import questions, read_output, save_image, save_tiny, write_records

RUN = ["--device", "cpu", "--workers", "0", "--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("question")
    save_tiny(folder)
    for number in range(2):
        save_image(folder / f"{number}.png", number)
    return folder


def test_the_reply_is_printed_and_is_that_of_a_record(world: Path, tmp_path: Path) -> None:
    content = [
        {"type": "image", "path": "0.png"},
        {"type": "image", "path": "1.png"},
        {"type": "text", "text": "\nAre they alike? <image>"},
    ]
    record = {"id": "a", "messages": [{"role": "user", "content": content}]}
    options = InferOptions(
        model=str(world / "model"), data=str(write_records(tmp_path, [record])), root=str(world),
        output=str(tmp_path / "out.jsonl"), workers=0, device="cpu",
        generation=GenerationOptions(max_new_tokens=4),
    )  # fmt: skip
    infer(options)
    (line,) = read_output(tmp_path / "out.jsonl")
    before = sorted(world.iterdir())
    done = medm(
        "infer", "--model", str(world / "model"), "--image", str(world / "0.png"),
        "--image", str(world / "1.png"), "--prompt", "Are they alike? <image>", *RUN,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.out == line["reply"] + "\n"
    assert "Not for clinical use" in done.err
    assert sorted(world.iterdir()) == before, "nothing is left behind"


def test_with_an_output_the_line_is_kept(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    command = ["infer", "--model", str(world / "model"), "--image", str(world / "0.png"),
               "--prompt", "What?", "--output", str(output), *RUN]  # fmt: skip
    assert medm(*command).code == 0
    (line,) = read_output(output)
    assert line["id"] == "0.png" and "reply" in line
    assert "1 of them by earlier runs" in medm(*command).err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "none.png", "--prompt", "?"], "none.png: no such file"),
        (["--image", "0.png"], "a prompt belongs to folder, or to image and volume"),
        (
            ["--image", "0.png", "--folder", ".", "--prompt", "?"],
            "found folder and image or volume",
        ),
        (
            ["--image", "0.png", "--prompt", "?", "--report-format", "dicom-sr"],
            "--report-format needs --reports or --output",
        ),
        (["--prompt", "?", "--output", "o.jsonl"], "expected one of data, folder, and image"),
    ],
)
def test_wrong_use_is_refused(
    world: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(world)
    done = medm("infer", "--model", "model", *arguments, *RUN)
    assert done.code != 0
    assert message in done.err
    assert not (world / "o.jsonl").exists()


def test_csv_has_id_reply_and_error(world: Path, tmp_path: Path) -> None:
    records = questions(world, 3)
    records[1]["image"] = "missing.png"
    records[2]["id"] = 'a "quoted", id'
    data, table = write_records(world, records), tmp_path / "out.csv"
    done = medm(
        "infer", "--model", str(world / "model"), "--data", str(data), "--output",
        str(tmp_path / "out.jsonl"), "--csv", str(table), *RUN,
    )  # fmt: skip
    assert done.code == 1
    lines = read_output(tmp_path / "out.jsonl")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [str(line["id"]) for line in lines]
    assert rows[0]["reply"] == lines[0]["reply"] and rows[0]["error"] == ""
    assert rows[1]["reply"] == "" and "missing.png" in rows[1]["error"]
    assert rows[2]["id"] == 'a "quoted", id'


def test_a_series_of_a_folder_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "ct").mkdir()
    for name in ("ct#3", "ct#1.2.840"):
        text, root = file_record([("volume", str(tmp_path / name))], "?", study=False)
        assert root == tmp_path and json.loads(text)["id"] == name
    for name in ("mr#3", "ct#"):
        with pytest.raises(DataError, match="no such file; expected a volume"):
            file_record([("volume", str(tmp_path / name))], "?", study=False)
