"""Scoring on benchmarks: a model's or any program's answers, compared, reported, and honest about
what is missing."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from medm.config import validate
from medm.errors import CheckpointError, DataError, DeviceError, MedmError, RecipeError
from medm.evaluation.cases import Case, choose_cases, render_thumbnails
from medm.evaluation.options import EvalOptions
from medm.evaluation.prediction_files import fields_given, read_predictions
from medm.evaluation.report import group_table
from medm.evaluation.runner import evaluate
from medm.evaluation.task_report import TaskReport
from medm.metrics.base import MetricResult
from medm.tasks import TASKS
from medm.tasks.base import PredictedMask, Scores
from medm.tasks.custom import Custom
from medm.types import Media, Sample, Turn
from tests.cli.runner import medm
from tests.inference.tiny import read_output, save_image, save_tiny, write_records
from tests.tasks import layouts

ROOT = Path(__file__).parents[2]
ANSWERS = ["left lung", "right lung", "heart", "no", "yes", "liver"]


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six items of two organs, with images; one question tries to be markup."""
    folder = tmp_path_factory.mktemp("benchmark")
    records = []
    for index, answer in enumerate(ANSWERS):
        save_image(folder / f"{index}.png", index)
        text = "<image>\nIs it <b>bold</b> & bad?" if index == 0 else f"<image>\nQuestion {index}?"
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
        records.append(
            {
                "id": f"i{index}",
                "image": f"{index}.png",
                "organ": "ab"[index % 2],
                "conversations": turns,
            }
        )
    write_records(folder, records, "test.json")
    return folder


def section(benchmark: Path, out: Path, **task: Any) -> dict[str, Any]:
    settings = {
        "name": "custom",
        "path": "test.json",
        "metrics": ["exact-match", "bleu"],
        "group_by": ["organ"],
        "rounds": 50,
    }
    return {
        "tasks": [{"task": settings, "data": str(benchmark), **task}],
        "output_dir": str(out),
        "cases": 2,
    }


def run(content: dict[str, Any]) -> TaskReport:
    reports = evaluate(validate(EvalOptions, content, source="test"))
    assert reports is not None
    return reports[0]


def without_weights(folder: Path) -> str:
    """A model folder that says what it is; whatever would be read beyond that is missing."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "medm-lvlm"}')
    (folder / "processor_config.json").write_text("{}")
    return str(folder)


def write_predictions(file: Path, texts: list[str]) -> Path:
    file.write_text(
        "".join(json.dumps({"id": f"i{i}", "text": text}) + "\n" for i, text in enumerate(texts))
    )
    return file


def test_predictions_of_another_program(benchmark: Path, tmp_path: Path) -> None:
    texts = ["left lung", "left lung", "heart", "no", "no", ""]
    file = write_predictions(tmp_path / "other.jsonl", texts)
    report = run(section(benchmark, tmp_path / "out", predictions=str(file)))
    by_name = {result.name: result for result in report.scores.results}
    assert by_name["exact-match"].value == pytest.approx(3 / 6)
    groups = report.scores.groups["organ"]
    assert {value: results[0].value for value, results in groups.items()} == {
        "a": pytest.approx(2 / 3),
        "b": pytest.approx(1 / 3),
    }
    assert "1 of 6 items have no answer" in report.scores.notes[0]
    assert [case.score for case in report.worst] == [0.0, 0.0]
    assert not {case.id for case in report.worst} & {case.id for case in report.random}

    folder = tmp_path / "out" / "custom"
    results = json.loads((folder / "results.json").read_text())
    assert results["scores"][0]["per_item"] == [1, 0, 1, 1, 0, 0]
    assert results["scores"][0]["signature"] == by_name["exact-match"].signature
    assert results["predictions"] == str(file)
    text = (folder / "report.md").read_text()
    assert "| exact-match | 0.500 |" in text
    assert "Not for clinical use" in text
    assert "## By organ" in text
    page = (folder / "report.html").read_text()
    assert "<b>bold</b>" not in page
    assert "<script" not in page
    for image in {image for case in [*report.worst, *report.random] for image in case.images}:
        assert (folder / image).stat().st_size > 500
        assert f'src="{image}"' in page
    assert "[custom](custom/report.md)" in (tmp_path / "out" / "summary.md").read_text()


def test_questions_about_one_scan_are_drawn_and_compared_together(
    benchmark: Path, tmp_path: Path
) -> None:
    good = write_predictions(
        tmp_path / "good.jsonl", ["left lung", "x", "heart", "x", "yes", "x"]
    )  # right on organ a
    bad = write_predictions(tmp_path / "bad.jsonl", ["x"] * 6)
    content = section(benchmark, tmp_path / "out", predictions=str(good), against=str(bad))
    content["tasks"][0]["task"] |= {"cluster_by": "organ", "group_by": ["organ"]}
    report = run(content)
    exact = report.scores.results[0]
    assert "|cluster:organ" in exact.signature
    assert (exact.low, exact.high) == (0, 1)  # two groups: one is all right, the other all wrong
    assert any("2 groups of 6 items" in note for note in report.scores.notes)
    assert (
        report.comparisons[0].p_value == 1
    )  # exchanging two whole groups cannot tell chance from skill
    assert report.comparisons[0].clusters == 2
    results = json.loads((tmp_path / "out" / "custom" / "results.json").read_text())
    assert (results["scores"][0]["cluster_by"], results["scores"][0]["clusters"]) == ("organ", 2)
    text = (tmp_path / "out" / "custom" / "report.md").read_text()
    assert "| 6 in 2 |" in text
    assert "1.000 (–, n 3 in 1)" in text  # a single group says nothing about scatter
    content["tasks"][0]["task"]["cluster_by"] = "patient"
    with pytest.raises(DataError, match="has no 'patient'"):
        run(content)


def test_markup_in_a_question_stays_text(benchmark: Path, tmp_path: Path) -> None:
    file = write_predictions(tmp_path / "other.jsonl", ["<img src=x>", *ANSWERS[1:]])
    run(section(benchmark, tmp_path / "out", predictions=str(file)))
    page = (tmp_path / "out" / "custom" / "report.html").read_text()
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; bad?" in page
    assert "&lt;img src=x&gt;" in page
    assert "\\<b>bold" in (tmp_path / "out" / "custom" / "report.md").read_text()


def test_two_systems_are_compared_on_the_same_items(benchmark: Path, tmp_path: Path) -> None:
    good = write_predictions(tmp_path / "good.jsonl", [*ANSWERS[:5], "x"])
    bad = write_predictions(tmp_path / "bad.jsonl", [*ANSWERS[:2], "x", "x", "x", "x"])
    run(section(benchmark, tmp_path / "a", predictions=str(bad)))
    report = run(section(benchmark, tmp_path / "b", predictions=str(good), against=str(bad)))
    exact = next(c for c in report.comparisons if c.name == "exact-match")
    assert (exact.first, exact.second) == (pytest.approx(5 / 6), pytest.approx(2 / 6))
    assert exact.difference == pytest.approx(0.5)
    defined = {result.name for result in report.scores.results if not math.isnan(result.value)}
    assert {c.name for c in report.comparisons} == defined == {"exact-match", "bleu-1", "bleu-2"}
    assert "## Comparison" in (tmp_path / "b" / "custom" / "report.md").read_text()
    with pytest.raises(DataError, match="no predictions to compare with"):
        run(
            section(
                benchmark, tmp_path / "b", predictions=str(good), against=str(tmp_path / "nowhere")
            )
        )


def test_a_model_answers_and_a_second_run_resumes(benchmark: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path)
    content = section(benchmark, tmp_path / "out") | {
        "model": str(model),
        "generation": {"max_new_tokens": 4},
        "device": "cpu",
        "workers": 0,
    }
    report = run(content)
    folder = tmp_path / "out" / "custom"
    replies = {line["id"]: line["reply"] for line in read_output(folder / "predictions.jsonl")}
    assert [case.reply for case in report.worst] == [replies[case.id] for case in report.worst]
    results = json.loads((folder / "results.json").read_text())
    assert results["generation"]["max_new_tokens"] == 4
    assert results["model_fingerprint"]
    stamp = (folder / "predictions.jsonl").read_bytes()
    run(content)
    assert (folder / "predictions.jsonl").read_bytes() == stamp
    with pytest.raises(RecipeError, match="another run"):
        run(content | {"generation": {"max_new_tokens": 5}})

    recipe = tmp_path / "eval.yaml"
    recipe.write_text(yaml.safe_dump(content))
    done = medm(
        "eval", str(recipe), "tasks.0.limit=4", "--output", str(tmp_path / "cli"), "--cases", "1"
    )
    assert done.code == 0, done.err
    assert "custom: 4 items" in done.out
    assert "exact-match" in done.out
    assert "only the first 4 items" in done.err


def items(count: int) -> list[Sample]:
    return [Sample((Turn("user", ("?",)),), id=f"i{i}", answer="a") for i in range(count)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"id": "i1", "index": 1, "reply": "B", "tokens": 3}\n{"index": 0, "reply": "A"}\n', {"i0": "A", "i1": "B"}),
        ('{"index": 0, "error": "no file"}\n{"index": 1, "reply": "B"}\n', {"i0": "", "i1": "B"}),
        ('{"i0": "A", "i1": "B"}', {"i0": "A", "i1": "B"}),
        ('["A", "B"]', {"i0": "A", "i1": "B"}),
        ('[{"question_id": "i0", "text": "A", "answer": "ref"}, {"question_id": "i1", "text": "B"}]', {"i0": "A", "i1": "B"}),
        ('{"id": "i0", "reply": "A"}\n', {"i0": "A"}),
        ('{"id": "i0", "text": "A"}\n', {"i0": "A"}),
        ('{"question_id": "i1", "answer": "A"}', {"i1": "A"}),
        ('{"id": "i0", "error": "no file"}\n', {"i0": ""}),
        ('{"i0": "A"}', {"i0": "A"}),
        (
            json.dumps([{"id": "i0", "answer": "ref", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "A"}]}]),
            {"i0": "A"},
        ),
    ],
)  # fmt: skip
def test_answers_in_many_forms(content: str, expected: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(content)
    found = read_predictions(file, items(2))
    assert {name: prediction.text for name, prediction in found.items()} == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('["A"]', "1 answers without ids for 2 items"),
        ('{"id": "i0", "text": "A"}\n{"id": "i0", "text": "B"}\n', "a second answer to item 'i0'"),
        ('{"index": 7, "reply": "A"}\n{"index": 0, "reply": "A"}\n', "an answer to item 7 of 2"),
        ('{"id": "i0", "score": 1}\n{"id": "i1", "text": "B"}\n', "no answer in it"),
        ('{"id": "i0",\n', "not valid JSON"),
    ],
)
def test_files_that_cannot_be_joined_say_why(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(content)
    with pytest.raises(DataError, match=words):
        read_predictions(file, items(2))


def test_numbers_of_masks_come_with_the_answers(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"id": "i0", "reply": "It is [SEG].", "dice": 0.5, "finished": true}\n')
    assert read_predictions(file, items(1))["i0"].numbers == {"dice": 0.5}


RLE = {"size": [2, 2], "counts": [1, 3]}


@pytest.mark.parametrize(
    ("fields", "masks"),
    [
        ({"mask": "a.png"}, (PredictedMask("a.png"),)),
        ({"mask": {"file": "a.nii", "value": 3}}, (PredictedMask("a.nii", 3),)),
        ({"mask": ["a.png", {"rle": RLE}]}, (PredictedMask("a.png"), PredictedMask(rle=RLE))),
        ({"mask": RLE}, (PredictedMask(rle=RLE),)),
        ({"mask": None, "text": "There is none."}, ()),
        (
            {
                "reply": "Both.",
                "spans": [
                    {"token": 0, "image": 1, "mask": "a.png", "voxels": 4},
                    {"token": 1, "image": 0, "rle": RLE},
                    {"token": 2, "phrase": "of no image"},
                ],
            },
            (PredictedMask("a.png", media=1), PredictedMask(rle=RLE, media=0)),
        ),
    ],
)
def test_masks_are_files_codes_and_spans(
    fields: dict[str, Any], masks: tuple[PredictedMask, ...], tmp_path: Path
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"id": "i0", **fields}) + "\n")
    found = read_predictions(file, items(1))["i0"]
    assert found.masks == masks
    assert found.folder == tmp_path
    assert ("masks" in fields_given(file)) == bool(masks)


@pytest.mark.parametrize("mask", [3, {"value": 3}, {"file": "a", "value": "liver"}, [None]])
def test_a_mask_of_another_form_is_refused(mask: object, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"id": "i0", "mask": mask}) + "\n")
    with pytest.raises(DataError, match=r"p\.jsonl.*record 0.*mask.*expected a file"):
        read_predictions(file, items(1))


def test_an_object_of_texts_may_use_any_id(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text('{"text": "A", "answer": "B"}')
    samples = [Sample((Turn("user", ("?",)),), id=name, answer="a") for name in ("text", "answer")]
    assert {name: given.text for name, given in read_predictions(file, samples).items()} == {
        "text": "A",
        "answer": "B",
    }


def test_a_limit_takes_files_of_all_answers_or_of_the_first(
    benchmark: Path, tmp_path: Path
) -> None:
    full = write_predictions(tmp_path / "full.jsonl", ANSWERS)
    report = run(
        section(benchmark, tmp_path / "a", predictions=str(full), against=str(full), limit=2)
    )
    assert (report.n, report.scores.results[0].value, report.comparisons[0].n) == (2, 1.0, 2)
    assert "only the first 2 items" in report.scores.notes[-1]
    for count in (2, 6):
        bare = tmp_path / f"{count}.json"
        bare.write_text(json.dumps(ANSWERS[:count]))
        assert (
            run(section(benchmark, tmp_path / "b", predictions=str(bare), limit=2))
            .scores.results[0]
            .value
            == 1
        )
    (tmp_path / "4.json").write_text(json.dumps(ANSWERS[:4]))
    with pytest.raises(DataError, match="4 answers without ids for 6 items"):
        run(section(benchmark, tmp_path / "b", predictions=str(tmp_path / "4.json"), limit=2))


def test_a_missing_image_is_named_before_anything_is_answered(
    benchmark: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(benchmark, copy)
    (copy / "1.png").unlink()
    (copy / "4.png").unlink()
    content = section(copy, tmp_path / "out") | {"model": without_weights(tmp_path / "model")}
    with pytest.raises(DataError, match=r"2 of 6 images and volumes .* the first is '1\.png'"):
        run(content)
    assert not (tmp_path / "out").exists()
    file = write_predictions(
        tmp_path / "p.jsonl", ANSWERS
    )  # answers of another program need no image
    assert run(section(copy, tmp_path / "out", predictions=str(file))).scores.results[0].value == 1


def test_errors_are_counted_apart_from_empty_replies(benchmark: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    lines = [{"id": f"i{i}", "reply": text} for i, text in enumerate(ANSWERS[:4])]
    lines += [{"id": "i4", "reply": " "}, {"id": "i5", "error": "the file is cut"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = run(section(benchmark, tmp_path / "out", predictions=str(file)))
    assert (report.scores.empty, report.scores.failed) == (1, 1)
    assert report.scores.results[0].value == pytest.approx(4 / 6)
    assert "1 of 6 items could not be answered because of an error" in report.scores.notes[1]
    assert "the file is cut" in report.scores.notes[1]
    results = json.loads((tmp_path / "out" / "custom" / "results.json").read_text())
    assert (results["empty_replies"], results["inference_errors"]) == (1, 1)


def test_masks_come_as_files_and_a_model_is_refused(tmp_path: Path) -> None:
    layouts.m3d_seg(tmp_path / "data")
    content: dict[str, Any] = {
        "tasks": [{"task": {"name": "m3d-seg", "rounds": 5}, "data": str(tmp_path / "data")}],
        "output_dir": str(tmp_path / "out"),
        "cases": 0,
    }
    model = without_weights(tmp_path / "model")
    with pytest.raises(
        RecipeError, match=r"m3d-seg: needs masks; model \S+/model gives text. Give --predictions"
    ):
        run(content | {"model": model})
    shutil.move(tmp_path / "data", tmp_path / "away")  # the benchmark is not even looked at
    with pytest.raises(RecipeError, match="m3d-seg: needs masks"):
        run(content | {"model": model})
    shutil.move(tmp_path / "away", tmp_path / "data")
    ids = ["0000/1/masks/mask_0.npy", "0003/1/masks/mask_0.npy", "0003/1/masks/mask_1.npy"]
    truth = np.load(tmp_path / "data" / ids[0])
    half = truth[0] * 0.9  # probabilities, and one slice of two is left out
    half[3] = 0.2
    np.save(tmp_path / "right.npy", truth)
    np.save(tmp_path / "half.npy", half)
    file = tmp_path / "p.jsonl"
    lines = [
        {"id": ids[0], "mask": "right.npy"},
        {"id": ids[1], "reply": "It is [SEG].", "mask": "half.npy"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    content["tasks"][0]["predictions"] = str(file)
    report = run(content)
    by_name = {result.name: result for result in report.scores.results}
    assert by_name["dice"].per_item == [1, pytest.approx(2 / 3), 0]
    assert report.scores.empty == 1  # the item that no mask came for
    np.save(tmp_path / "half.npy", half[:2])
    with pytest.raises(
        DataError, match=r"half\.npy.*the mask is \(2, 16, 16\), the reference \(8, 16, 16\)"
    ):
        run(content)


def test_what_cannot_be_evaluated_says_why(benchmark: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="model: needed to answer custom"):
        run(section(benchmark, tmp_path / "out"))
    foreign = write_predictions(tmp_path / "p.jsonl", ["a"] * 9)
    with pytest.raises(DataError, match="3 of 9 predictions belong to no sample"):
        run(section(benchmark, tmp_path / "out", predictions=str(foreign)))
    done = medm("eval", "--task", "slake", "--data", str(tmp_path), "--predictions", str(foreign))
    assert done.code == 1
    assert "is missing in" in done.err
    assert medm("eval", "--task", "slak", "--data", ".", "--predictions", "x").code == 2
    assert "expected a recipe" in medm("eval").err


def test_nothing_answered_is_a_failure(benchmark: Path, tmp_path: Path) -> None:
    def status(lines: list[dict[str, Any]]) -> tuple[int, str]:
        file = tmp_path / "p.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        recipe = tmp_path / "eval.yaml"
        recipe.write_text(
            yaml.safe_dump(section(benchmark, tmp_path / "out", predictions=str(file)))
        )
        done = medm("eval", str(recipe), "--cases", "0")
        return done.code, done.err

    errors = [{"id": f"i{i}", "error": "the file is cut", "dice": 1.0} for i in range(6)]
    code, said = status(errors)
    assert code == 1
    assert "nothing was answered in custom (6 items)" in said
    results = json.loads(
        (tmp_path / "out" / "custom" / "results.json").read_text()
    )  # written all the same
    assert (results["answered"], results["inference_errors"], results["scores"][0]["value"]) == (
        0,
        6,
        0.0,
    )
    assert "nothing was answered" in (tmp_path / "out" / "summary.md").read_text()
    assert status(errors[:2])[0] == 1  # four items without a line, two with an error
    assert status([*errors[:5], {"id": "i5", "reply": "liver"}])[0] == 0
    assert (
        status([{"id": f"i{i}", "reply": ""} for i in range(6)])[0] == 0
    )  # a model that says nothing has answered
    assert (
        json.loads((tmp_path / "out" / "custom" / "results.json").read_text())["scores"][0]["value"]
        == 0
    )


def test_a_number_that_is_not_defined_is_explained_everywhere(
    benchmark: Path, tmp_path: Path
) -> None:
    file = write_predictions(tmp_path / "p.jsonl", ANSWERS)
    content = section(benchmark, tmp_path / "out", predictions=str(file), limit=1)
    content["tasks"][0]["task"] |= {"metrics": ["cider-d", "bleu"], "group_by": []}
    report = run(content)
    assert math.isnan(report.scores.results[0].value)
    reason = (
        "cider-d: undefined for one item: words are weighted by the number of items without them"
    )
    folder = tmp_path / "out" / "custom"
    results = json.loads((folder / "results.json").read_text())
    assert reason in results["notes"]
    assert results["scores"][0]["value"] is None
    assert results["scores"][0]["note"] == reason.removeprefix("cider-d: ")
    for page in (folder / "report.md", folder / "report.html", tmp_path / "out" / "summary.md"):
        assert reason in page.read_text(), page
    assert "bleu-3, bleu-4: undefined: no reference has 3 words" not in results["notes"]
    assert "bleu-4: undefined: no reference has 4 words" in results["notes"]


def with_records(folder: Path, change: dict[int, dict[str, Any]]) -> Path:
    """Three records, some of them changed."""
    records = []
    for index in range(3):
        answer = change.get(index, {}).get("answer_text", "lung")
        turns = [{"from": "human", "value": f"Question {index}?"}, {"from": "gpt", "value": answer}]
        extra = {key: value for key, value in change.get(index, {}).items() if key != "answer_text"}
        records.append({"id": f"i{index}", "conversations": turns} | extra)
    write_records(folder, records, "test.json")
    return folder


@pytest.mark.parametrize(
    ("change", "task", "words"),
    [
        (
            {2: {"id": "i0"}},
            {},
            r"1 ids stand for several items of custom, the first is 'i0' \(2 items\)",
        ),
        ({}, {"cluster_by": "patient"}, "has no 'patient', by which cluster_by groups"),
        (
            {0: {"organ": "a"}},
            {"group_by": ["organn"]},
            r"group_by: no record has 'organn'; the records have .*organ",
        ),
        (
            {},
            {"metrics": [{"name": "bertscore", "path": "/no/encoder"}]},
            "no encoder at /no/encoder",
        ),
        ({}, {"metrics": ["box-iou"]}, "item 0: no box can be read from the reference 'lung'"),
        (
            {1: {"answer_text": "B"}},
            {"metrics": ["choice-accuracy"]},
            "item 0: no choice can be read",
        ),
        (
            {},
            {"metrics": ["auroc"]},
            r"custom: needs scores; model \S+/model gives text. Give --predictions with lines",
        ),
        (
            {},
            {"metrics": ["auroc", "exact-match"]},
            r"custom: needs text and scores; model \S+/model gives text",
        ),
    ],
)
def test_what_stops_the_scoring_is_found_before_the_weights_are_looked_at(
    change: dict[int, dict[str, Any]], task: dict[str, Any], words: str, tmp_path: Path
) -> None:
    settings = {
        "name": "custom",
        "path": "test.json",
        "metrics": ["exact-match"],
        "rounds": 5,
        **task,
    }
    content = {
        "tasks": [{"task": settings, "data": str(with_records(tmp_path, change))}],
        "output_dir": str(tmp_path / "out"),
        "model": without_weights(tmp_path / "model"),
    }
    with pytest.raises(MedmError, match=words):
        run(content)
    assert not (tmp_path / "out").exists()


def test_model_device_and_output_are_looked_at_before_anything_is_answered(tmp_path: Path) -> None:
    settings = {"name": "custom", "path": "test.json", "metrics": ["exact-match"], "rounds": 5}
    data = str(with_records(tmp_path, {}))
    model = tmp_path / "model"
    content: dict[str, Any] = {
        "tasks": [{"task": settings, "data": data}],
        "output_dir": str(tmp_path / "out"),
        "model": str(model),
    }
    with pytest.raises(CheckpointError, match="model: no such model folder"):
        run(content)
    model.mkdir()
    with pytest.raises(
        CheckpointError, match=r"no config\.json in it; expected a model folder that medm saved"
    ):
        run(content)
    without_weights(model)
    with pytest.raises(DeviceError, match="expected auto, cpu, cuda or cuda:N"):
        run(content | {"device": "gpu"})
    (tmp_path / "file").write_text("")
    with pytest.raises(MedmError, match="file/custom: cannot be written"):
        run(content | {"output_dir": str(tmp_path / "file"), "device": "cpu"})
    content["tasks"][0]["against"] = str(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no predictions to compare with"):
        run(content)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "slake"], "--data: missing; give the folder with the files of 'slake'"),
        (["--task", "slake", "--data", "x"], "--model: missing; give a model folder that medm saved, or --predictions"),
        (["--task", "slake", "--data", "x", "--model", "m", "--limit", "0"], "--limit: expected greater than or equal"),
        (["--task", "slake", "--data", "x", "--model", "m", "--max-new-tokens", "0"], "--max-new-tokens: expected"),
        (["--task", "slake", "--data", "x", "--model", "m", "--option", "roundz=3"], "--task, --option: unknown key"),
    ],
)  # fmt: skip
def test_messages_name_what_was_typed(arguments: list[str], words: str) -> None:
    done = medm("eval", *arguments)
    assert done.code == 2
    assert words in done.err
    assert "tasks.0" not in done.err
    assert "None" not in done.err


def test_all_of_m3d_may_be_in_one_tree(tmp_path: Path) -> None:
    """The folders that M3D's own scripts read, which the suite is given as one."""
    layouts.m3d_cap(tmp_path / "M3D_Cap_npy")
    layouts.m3d_vqa(tmp_path / "M3D-VQA")
    layouts.m3d_seg(tmp_path / "M3D_Seg_npy")
    layouts.m3d_refseg(tmp_path / "M3D_RefSeg_npy")
    for path in (tmp_path / "M3D-VQA" / "ct_case").rglob(
        "*.npy"
    ):  # volumes of the questions are those of the reports
        target = tmp_path / "M3D_Cap_npy" / path.relative_to(tmp_path / "M3D-VQA")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
    for name in (
        "m3d-cap",
        "m3d-vqa-open",
        "m3d-vqa-closed",
        "m3d-rec",
        "m3d-reg",
        "m3d-seg",
        "m3d-refseg",
    ):
        samples = list(TASKS.get(name)(rounds=0).samples(tmp_path, "test"))
        assert len(samples) == layouts.LAYOUTS[name].count, name
        for sample in samples:
            for media in sample.media:
                assert (tmp_path / str(media.path)).is_file()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"MODEL": "m"}, ["--model=m"]),
        ({"PREDICTIONS": "p.jsonl"}, ["--predictions=p.jsonl", "GPUS=1"]),
    ],
)
def test_launchers_of_masks_take_a_model_or_predictions(
    variables: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "medm").write_text('#!/bin/sh\necho "$@" GPUS=$GPUS\n')
    (tmp_path / "medm").chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "eval" / "m3d-seg.sh"), "--limit", "2"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", **variables},
    )
    for word in ["launch eval --", "--task m3d-seg --data data/M3D", "--limit 2", *words]:
        assert word in done.stdout


def test_groups_with_other_metrics_leave_gaps() -> None:
    def result(name: str, value: float) -> MetricResult:
        return MetricResult(name, value, 3, value, value, "s")

    header, rows = group_table("organ", {"a": [result("x", 0.5)], "b": [result("y", 1.0)]})
    assert header == ("organ", "n", "x", "y")
    first, second = "0.500 (0.500 to 0.500, n 3)", "1.000 (1.000 to 1.000, n 3)"
    assert rows == [("a", "3", first, ""), ("b", "3", "", second)]


def test_every_benchmark_has_its_launcher() -> None:
    folder = ROOT / "scripts" / "eval"
    spec = importlib.util.spec_from_file_location("write_launchers", folder / "write_launchers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = module.launchers()
    assert len(written) >= 20
    for name, text in written.items():
        assert (folder / name).read_text() == text, f"{name}: run scripts/eval/write_launchers.py"
        assert len(text.splitlines()) <= 10
    suites = module.suites()
    for name, text in suites.items():
        assert (folder / name).read_text() == text, f"{name}: run scripts/eval/write_launchers.py"
    sections = {
        name: yaml.safe_load((folder / f"{name}.yaml").read_text())
        for name in ("uni-med", "m3d-bench", "unimed-clip", "unibiomed")
    }
    checked = {
        name: validate(EvalOptions, part | {"model": "m"}, source=name)
        for name, part in sections.items()
    }
    assert len(checked["uni-med"].tasks) == 10
    (sets,) = checked["unimed-clip"].tasks
    assert len(TASKS.get("zero-shot")(card=sets.task.card).cards) == 21
    assert sets.data == "data/zero-shot"
    assert {block.task.name: block.data for block in checked["uni-med"].tasks}[
        "mimic-caption"
    ] == "data/mimic-cxr"
    shared = {"M3D": "m3d-", "CT-RATE": "ct-rate-", "slake": "slake-", "medmnist": "medmnist-"}
    for place, beginning in shared.items():  # one folder for each data set
        for name, text in written.items():
            assert not name.startswith(beginning) or f"DATA:-data/{place}}}" in text, name
    assert {block.data for block in checked["m3d-bench"].tasks} == {"data/M3D"}
    for name in (*written, *(name for name in suites if name.endswith(".sh"))):
        subprocess.run(["bash", "-n", str(folder / name)], check=True)


def test_folders_are_those_that_the_converter_reads() -> None:
    """One answer to where a benchmark lies: launchers, converter and recipes."""
    convert = (ROOT / "scripts" / "train" / "Uni-Med" / "convert.sh").read_text()
    folders = dict(re.findall(r"^(\w+)=\$\{\w+:-(data/[\w-]+)\}", convert, re.MULTILINE))
    pairs = re.findall(r'([a-z0-9-]+)="\$(\w+)"', convert)
    assert len(pairs) >= 12
    for task, variable in pairs:
        launcher = (ROOT / "scripts" / "eval" / f"{task}.sh").read_text()
        assert f"DATA=${{DATA:-{folders[variable]}}}" in launcher, task


def test_a_recipe_of_several_tasks_is_compared_with_another_run(
    benchmark: Path, tmp_path: Path
) -> None:
    file = write_predictions(tmp_path / "p.jsonl", ANSWERS)
    recipe = tmp_path / "eval.yaml"
    recipe.write_text(yaml.safe_dump(section(benchmark, tmp_path / "out", predictions=str(file))))
    done = medm("eval", str(recipe), "--against", str(file), "--cases", "0")
    assert done.code == 0, done.err
    assert "against" in done.out


def test_equally_bad_items_are_chosen_by_the_seed() -> None:
    records = [{"id": str(i), "prediction": "x", "answer": "y"} for i in range(40)]
    samples = [Sample((Turn("user", ("?",)),), id=str(i), answer="y") for i in range(40)]
    scores = Scores([MetricResult("m", 0, 40, 0, 0, "s", [0.0] * 40)])

    def worst(seed: int) -> list[str]:
        cases, _ = choose_cases(
            scores, records, samples, Custom(path="x", metrics=[]), count=4, seed=seed
        )
        return [case.id for case in cases]

    assert worst(0) == worst(0)
    assert len({tuple(worst(seed)) for seed in range(5)}) == 5


def test_thumbnails_of_volumes_and_of_files_that_are_gone(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.random.default_rng(0).random((8, 20, 20), dtype=np.float32))
    here = Sample((Turn("user", (Media("volume", "v.npy"), "?")),), id="a", answer="x")
    gone = Sample(
        (Turn("user", (Media("image", "none.png"), Media("volume", "v.npy"), "?")),),
        id="b",
        answer="x",
    )
    cases = [Case(str(s.id), "?", "x", "y", None, None, s) for s in (here, gone)]
    render_thumbnails(cases, tmp_path, tmp_path / "out")
    assert cases[0].images == cases[1].images == ["cases/000.png"]
    assert (tmp_path / "out" / "cases" / "000.png").is_file()
    assert cases[0].problem is None
    assert "none.png" in str(cases[1].problem)
