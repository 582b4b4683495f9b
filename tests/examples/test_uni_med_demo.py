"""The demonstration: what is asked, when a model is trained anew, and its table by hand."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from medm.config import parse_value
from medm.evaluation.options import EvalTaskOptions
from medm.evaluation.runner import build_task
from medm.metrics import METRICS
from medm.training.recipe import differences, load_recipe, resolved

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "uni_med_demo"
TASKS = ("vqa", "cls", "rec", "reg", "caption")
MEDM = """#!/usr/bin/env bash
echo "$*" >>calls.txt
case $1 in
  train) name=$(basename "$2" .yaml)
    mkdir -p work_dirs/uni_med_demo/$name/checkpoint-1
    [ -e killed ] && exit 75
    touch work_dirs/uni_med_demo/$name/config.json ;;
  eval) while [ "$1" != --output ]; do shift; done
    mkdir -p "$2/custom" && echo asked >>"$2/custom/predictions.jsonl" ;;
esac
"""


def test_held_out_records_are_one_file_a_task_without_what_is_fetched(tmp_path):
    common = {
        "image": ["a.png"],
        "answer": "x",
        "conversations": [],
        "question_type": "lesion",
        "source_volume": "v",
    }
    records = [
        {"id": str(i), "task": task, "split": split, **common}
        for i, (task, split) in enumerate([("rec", "test"), ("rec", "extra"), ("vqa", "test")])
    ]
    dump(tmp_path / "tasks_test.json", records)
    dump(
        tmp_path / "tasks_train.json",
        [{"id": f"{task} {n}", "task": task} for task in TASKS for n in range(130)],
    )
    dump(tmp_path / "pictures.json", [{"file": "a.png", "boxes": {"lesion": [56, 112, 57, 224]}}])
    command = [sys.executable, str(DEMO / "split.py"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.glob("test_*")) == [
        "test_rec.json",
        "test_vqa.json",
    ]
    (record,) = read(tmp_path / "test_rec.json")
    assert record["id"] == "0"
    assert record["image"] == ["images/a.png"]
    assert record["source_volume"] == "v"
    assert record["box"] == [0.25, 0.5, 57 / 224, 1.0]
    assert "box" not in read(tmp_path / "test_vqa.json")[0]
    training = tmp_path / "demo_train.json"
    ids = [record["id"] for record in read(training)]
    assert len(ids) == len(set(ids)) == 130 + 130 + 80 + 80 + 80
    os.utime(training, (0, 0))
    subprocess.run(command, check=True, capture_output=True)
    assert training.stat().st_mtime == 0  # the same again: a training that reads it may go on


def test_every_task_is_scored_with_metrics_that_exist():
    script = (DEMO / "run.sh").read_text(encoding="utf-8")
    jobs = dict(re.findall(r'"(\w+) \[([\w,-]+)\]"', script))
    recipe = load_recipe(ROOT / "recipes" / "uni-med-demo" / "experts.yaml")
    assert set(jobs) == set(recipe.model.tasks)
    assert all(name in METRICS for names in jobs.values() for name in names.split(","))
    options = {
        key: parse_value(value.strip('"'))
        for key, value in re.findall(r"--option (\w+_by)=(\S+)", script)
    }
    options |= {"name": "custom", "path": "test_vqa.json", "metrics": jobs["vqa"].split(",")}
    block = EvalTaskOptions.model_validate({"task": options, "data": "."})
    assert build_task(block).cluster_by == "source_volume"


def test_the_baseline_differs_in_the_gate_alone():
    experts, dense = (
        resolved(load_recipe(ROOT / "recipes" / "uni-med-demo" / f"{name}.yaml"))
        for name in ("experts", "dense")
    )
    changed = [line.partition(":")[0] for line in differences(experts, dense)]
    assert changed == ["model.branches.image.connector.gate"]


class Demo:
    """run.sh in a folder of its own, with a `medm` that only says what it was asked, and a `python`
    that does nothing."""

    def __init__(self, folder):
        self.folder = folder
        self.data = folder / "work_dirs" / "quickstart" / "data"
        for directory in ("examples/uni_med_demo", "recipes/uni-med-demo", "bin", self.data):
            (folder / directory).mkdir(parents=True)
        (folder / "examples/uni_med_demo/run.sh").write_bytes((DEMO / "run.sh").read_bytes())
        for name in ("dense", "experts"):
            (folder / f"recipes/uni-med-demo/{name}.yaml").write_text(name)
        for name in ("demo_train.json", "made_from.txt", *(f"test_{task}.json" for task in TASKS)):
            (self.data / name).write_text("1")
        for name, text in (("medm", MEDM), ("python", "#!/bin/sh\n")):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def run(self, **environment):
        """The calls of `medm` that this run made: (train, its arguments) and (eval, model/task)."""
        (self.folder / "calls.txt").write_text("")
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        command = ["bash", str(self.folder / "examples/uni_med_demo/run.sh")]
        done = subprocess.run(
            command, env={**os.environ, "PATH": path, **environment}, capture_output=True, text=True
        )
        self.status, self.errors = done.returncode, done.stderr
        calls = [line.split() for line in (self.folder / "calls.txt").read_text().splitlines()]
        return [
            " ".join([Path(words[1]).stem, *words[2:]]) for words in calls if words[0] == "train"
        ]

    def asked(self, model, task):
        """How often a model was asked the questions of a task since its answers were last
        removed."""
        file = (
            self.folder / f"work_dirs/uni_med_demo/scores/{model}/{task}/custom/predictions.jsonl"
        )
        return file.read_text().count("asked")


@pytest.fixture
def demo(tmp_path):
    return Demo(tmp_path)


def test_a_second_run_trains_nothing_and_keeps_the_answers(demo):
    assert demo.run() == ["dense", "experts"], demo.errors
    assert demo.run() == []
    assert {demo.asked(model, task) for model in ("dense", "experts") for task in TASKS} == {2}
    assert not list(demo.folder.glob("work_dirs/uni_med_demo/*/checkpoint-*"))


def test_a_try_of_two_steps_is_not_taken_for_the_model(demo):
    assert demo.run(TRAIN="train.max_steps=2") == [
        "dense train.max_steps=2",
        "experts train.max_steps=2",
    ]
    assert demo.run() == ["dense", "experts"]
    assert demo.asked("dense", "rec") == 1


def test_other_data_recipes_or_questions_drop_what_was_made_from_them(demo):
    demo.run()
    (demo.folder / "recipes/uni-med-demo/experts.yaml").write_text("changed")
    assert demo.run() == ["experts"]
    assert (demo.asked("dense", "vqa"), demo.asked("experts", "vqa")) == (2, 1)
    (demo.data / "demo_train.json").write_text("2")
    assert demo.run() == ["dense", "experts"]
    assert demo.asked("dense", "vqa") == 1

    (demo.data / "test_reg.json").write_text("2")
    assert demo.run() == []
    counts = [demo.asked("dense", "vqa"), demo.asked("dense", "reg"), demo.asked("experts", "reg")]
    assert counts == [2, 1, 1]  # the answers about the others stay


def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(demo):
    (demo.folder / "killed").touch()
    assert demo.run() == ["dense"]
    assert demo.status == 75
    (demo.folder / "killed").unlink()
    assert demo.run() == ["dense --resume", "experts"]


QUESTIONS = {
    "vqa": [
        ("a", "plane", "axial"),
        ("a", "plane", "coronal"),
        ("b", "plane", "coronal"),
        ("b", "plane", "sagittal"),
    ],
    "cls": [
        ("a", "region", "head"),
        ("a", "region", "head"),
        ("b", "region", "chest"),
        ("b", "region", "chest"),
    ],
    "rec": [("a", "lesion", ""), ("b", "lesion", ""), ("a", "left lung", "")],
    "reg": [("a", "lesion", "lesion"), ("b", "left lung", "left lung")],
    "caption": [("a", "caption", "Axial CT."), ("b", "caption", "Axial CT.")],
}
BOXES = ([0.004, 0.0, 0.504, 0.5], [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0])
SAID = {
    "dense": {
        "vqa": ["Axial.", "axial", "axial", ""],
        "cls": ["head", "head", "head", "head"],
        "rec": ["{<0><0><50><25>}", "somewhere", "{<0><0><100><50>}"],
        "reg": ["lesion", "lesion"],
        "caption": ["Axial CT.", "No."],
    },
    "experts": {
        "vqa": ["axial", "coronal", "coronal", "axial"],
        "cls": ["head", "head", "chest", "chest"],
        "rec": ["{<0><0><50><50>}", "{<50><50><75><75>}", "{<0><0><100><100>}"],
        "reg": ["lesion", "left lung"],
        "caption": ["Axial CT.", "Axial CT."],
    },
}
TRAINED_ON = {
    ("vqa", "plane"): ["axial", "axial", "coronal"],
    ("cls", "region"): ["chest"],
    ("rec", "lesion"): ["{<0><0><50><99>}", "{<0><0><50><50>}", "{<0><0><50><49>}"],
    ("rec", "left lung"): ["{<0><0><100><25>}"],
    ("reg", "lesion"): ["lesion", "lesion"],
    ("reg", "left lung"): ["left lung"],
    ("caption", "caption"): ["Axial CT."],
}


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("uni_med_demo_report", DEMO / "report.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(
            DEMO
        )  # the scripts of the folder import each other, as they do when one is run
        spec.loader.exec_module(module)
    yield module
    for name in (spec.name, "split"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def results(report, tmp_path_factory):
    """report.py on a few replies about the volumes a and b."""
    folder = tmp_path_factory.mktemp("report")
    boxes = iter(BOXES)
    for task, asked in QUESTIONS.items():
        records = [
            {"task": task, "source_volume": volume, "question_type": kind, "answer": answer}
            for volume, kind, answer in asked
        ]
        dump(
            folder / f"test_{task}.json",
            [{**r, "box": next(boxes)} if task == "rec" else r for r in records],
        )
        for model in SAID:
            scores = folder / "scores" / model / task / "custom"
            scores.mkdir(parents=True)
            lines = [
                json.dumps({"index": i, "reply": reply})
                for i, reply in enumerate(SAID[model][task])
            ]
            (scores / "predictions.jsonl").write_text("\n".join(reversed(lines)), encoding="utf-8")
    for model in SAID:
        (folder / model).mkdir()
        losses = [{"loss": 4.0, "step": 1}, {"loss": 0.25, "step": 7}]
        (folder / model / "loss.jsonl").write_text(
            "\n".join(map(json.dumps, losses)), encoding="utf-8"
        )
    training = [
        {"task": task, "question_type": kind, "conversations": [{"value": "?"}, {"value": reply}]}
        for (task, kind), replies in TRAINED_ON.items()
        for reply in replies
    ]
    dump(folder / "demo_train.json", training)
    assert report.main([str(folder), str(folder)]) == 0
    return folder


def row(results, task, measure):
    (found,) = [
        r
        for r in read(results / "results.json")["rows"]
        if (r["task"], r["measure"]) == (task, measure)
    ]
    return found


def test_intervals_and_tests_draw_volumes(results):
    vqa = row(results, "vqa", "accuracy")
    bounds = {model: [vqa[model][key] for key in ("value", "low", "high")] for model in SAID}
    assert bounds["dense"] == [0.25, 0.0, 0.5]  # 1 of 2 about a, 0 of 2 about b
    assert bounds["experts"] == [0.75, 0.5, 1.0]
    assert [vqa["difference"][key] for key in ("difference", "low", "high")] == [
        0.5,
        0.5,
        0.5,
    ]  # in each volume
    assert vqa["difference"]["p_value"] == pytest.approx(
        0.5, abs=0.06
    )  # two of the four exchanges of whole volumes
    assert (vqa["constant"], vqa["n"], vqa["volumes"]) == (
        0.25,
        4,
        2,
    )  # "axial" was most frequent in training


def test_classes_count_alike(results):
    macro = row(results, "cls", "macro-F1")
    assert macro["dense"]["value"] == pytest.approx(
        1 / 3
    )  # head: 2 * 2 / (2 * 2 + 2 false), chest: none found
    assert macro["experts"]["value"] == 1.0
    assert macro["constant"] == pytest.approx(1 / 3)
    assert row(results, "cls", "accuracy")["dense"]["value"] == 0.5


def test_boxes_are_scored_against_the_exact_box_and_the_best_constant_one(results):
    overlap, hits = row(results, "rec lesions", "IoU"), row(results, "rec lesions", "IoU >= 0.5")
    half = 0.496 * 0.25 / (0.5 * 0.25 + 0.5 * 0.5 - 0.496 * 0.25)
    assert overlap["dense"]["value"] == pytest.approx(half / 2)
    assert overlap["experts"]["value"] == pytest.approx((0.496 / 0.504 + 0.25) / 2)
    assert overlap["constant"] == pytest.approx(
        0.496 / 0.504 / 2
    )  # {<0><0><50><50>} fits the other two best
    assert hits["dense"]["value"] == 0.0  # 0.494; exactly a half of the box in steps of a hundredth
    assert hits["experts"]["value"] == 0.5


def test_a_constant_answer_is_not_told_the_answer(results):
    assert (
        row(results, "reg", "accuracy")["constant"] == 0.5
    )  # the question type of `reg` is the name that is asked for


def test_a_single_volume_has_neither_interval_nor_test(results):
    lungs = row(results, "rec lungs", "IoU")
    assert (lungs["dense"]["value"], lungs["dense"]["low"], lungs["volumes"]) == (0.5, None, 1)
    table = [
        re.split(r" *\| *", line)[1:-1]
        for line in (results / "results.md").read_text().splitlines()
    ]
    (cells,) = [cells[2:] for cells in table if cells[:2] == ["rec lungs", "IoU"]]
    assert cells == ["0.50 (-)", "1.00 (-)", "+0.50 (-)", "-", "0.25", "1", "1"]


def test_what_the_table_does_not_show_stands_under_it(results):
    notes = (results / "results.md").read_text()
    assert "- dense: 7 steps, loss 4.00 at the first and 0.25 at the last" in notes
    assert "count as IoU 0: dense 1, experts 0 of 3." in notes


def test_answers_that_are_missing_are_not_passed_over(report, results, tmp_path):
    scores = tmp_path / "scores" / "dense" / "vqa" / "custom"
    scores.mkdir(parents=True)
    (scores / "predictions.jsonl").write_text('{"index": 0, "reply": "axial"}')
    with pytest.raises(SystemExit, match="answers 1 of 4 questions; run medm eval again"):
        report.main([str(tmp_path), str(results)])


def dump(file, content):
    file.write_text(json.dumps(content), encoding="utf-8")


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))
