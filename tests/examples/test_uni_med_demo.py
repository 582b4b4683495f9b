"""The demonstration: what is asked, when a model is trained anew, and its table by hand."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    common = {"image": ["a.png"], "answer": "x", "conversations": [], "question_type": "lesion", "source_volume": "v"}
    records = [
        {"id": str(i), "task": task, "split": split, **common}
        for i, (task, split) in enumerate([("rec", "test"), ("rec", "extra"), ("vqa", "test")])
    ]
    dump(tmp_path / "tasks_test.json", records)
    dump(tmp_path / "tasks_train.json", [{"id": f"{task} {n}", "task": task} for task in TASKS for n in range(130)])
    dump(tmp_path / "pictures.json", [{"file": "a.png", "boxes": {"lesion": [56, 112, 57, 224]}}])
    command = [sys.executable, str(DEMO / "split.py"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.glob("test_*")) == ["test_rec.json", "test_vqa.json"]
    (record,) = read(tmp_path / "test_rec.json")
    assert record["id"] == "0"
    assert record["image"] == ["images/a.png"]
    assert record["volume"] == "v"
    assert record["box"] == [0.25, 0.5, 57 / 224, 1.0]
    assert "box" not in read(tmp_path / "test_vqa.json")[0]
    first = (tmp_path / "demo_train.json").read_bytes()
    ids = [record["id"] for record in json.loads(first)]
    assert len(ids) == len(set(ids)) == 130 + 130 + 120 + 100 + 100
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "demo_train.json").read_bytes() == first


def test_every_task_is_scored_with_metrics_that_exist():
    script = (DEMO / "run.sh").read_text(encoding="utf-8")
    jobs = dict(re.findall(r'"(\w+) \[([\w,-]+)\]"', script))
    recipe = load_recipe(ROOT / "recipes" / "uni-med-demo" / "experts.yaml")
    assert set(jobs) == set(recipe.model.tasks)
    assert all(name in METRICS for names in jobs.values() for name in names.split(","))


def test_the_baseline_differs_in_the_gate_alone():
    experts, dense = (
        resolved(load_recipe(ROOT / "recipes" / "uni-med-demo" / f"{name}.yaml")) for name in ("experts", "dense")
    )
    changed = [line.partition(":")[0] for line in differences(experts, dense)]
    assert changed == ["model.branches.image.connector.gate"]


class Demo:
    """run.sh in a folder of its own, with a `medm` that only says what it was asked, and a `python` that does nothing."""

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
        done = subprocess.run(command, env={**os.environ, "PATH": path, **environment}, capture_output=True, text=True)
        self.status, self.errors = done.returncode, done.stderr
        calls = [line.split() for line in (self.folder / "calls.txt").read_text().splitlines()]
        return [" ".join([Path(words[1]).stem, *words[2:]]) for words in calls if words[0] == "train"]

    def asked(self, model, task):
        """How often a model was asked the questions of a task since its answers were last removed."""
        file = self.folder / f"work_dirs/uni_med_demo/scores/{model}/{task}/custom/predictions.jsonl"
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
    assert demo.run(TRAIN="train.max_steps=2") == ["dense train.max_steps=2", "experts train.max_steps=2"]
    assert demo.run() == ["dense", "experts"]
    assert demo.asked("dense", "rec") == 1


def test_other_data_or_another_recipe_trains_anew_and_drops_the_answers(demo):
    demo.run()
    (demo.folder / "recipes/uni-med-demo/experts.yaml").write_text("changed")
    assert demo.run() == ["experts"]
    assert (demo.asked("dense", "vqa"), demo.asked("experts", "vqa")) == (2, 1)
    (demo.data / "demo_train.json").write_text("2")
    assert demo.run() == ["dense", "experts"]
    assert demo.asked("dense", "vqa") == 1


def test_other_questions_drop_the_answers_of_their_task_alone(demo):
    demo.run()
    (demo.data / "test_reg.json").write_text("2")
    assert demo.run() == []
    assert (demo.asked("dense", "vqa"), demo.asked("dense", "reg"), demo.asked("experts", "reg")) == (2, 1, 1)


def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(demo):
    (demo.folder / "killed").touch()
    assert demo.run() == ["dense"]
    assert demo.status == 75
    (demo.folder / "killed").unlink()
    assert demo.run() == ["dense --resume", "experts"]


def dump(file, content):
    file.write_text(json.dumps(content), encoding="utf-8")


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))
