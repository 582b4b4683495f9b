"""The demonstration of knowledge: what is said of a slice, when a model is trained anew, and the
table by hand."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from medm.data.check import check
from medm.data.options import SourceOptions
from medm.data.studies import Studies
from medm.evaluation.options import EvalOptions
from medm.evaluation.runner import build_task
from medm.models.knowledge_files import read_graph
from medm.training.recipe import differences, load_recipe, resolved
from tests.examples.scripts import scripts

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "motor_demo"
MODELS = ("plain", "knowledge", "shuffled")
MEDM = """#!/usr/bin/env bash
echo "$*" >>calls.txt
folder=$(sed 's/.*output_dir=\\([^ ]*\\).*/\\1/' <<<"$*")
case $1 in
  train)
    [ -e killed ] && mkdir -p "$folder/checkpoint-1" && exit 75
    touch "$folder/config.json" ;;
  eval) while [ "$1" != --output ]; do shift; done
    mkdir -p "$2/study-labels" && touch "$2/study-labels/results.json" ;;
esac
"""


@pytest.fixture(scope="module")
def studies() -> Iterator[ModuleType]:
    with scripts("motor_demo", "quickstart"):
        import studies

        yield studies


@pytest.fixture(scope="module")
def report() -> Iterator[ModuleType]:
    with scripts("motor_demo", "quickstart"):
        import report

        yield report


def picture(volume: str, plane: str, index: int, **answers: str) -> dict[str, Any]:
    return {
        "file": f"{volume}_{plane}_{index}.png",
        "volume": volume,
        "split": "train",
        "plane": plane,
        "index": index,
        "answers": {"plane": plane, **answers},
    }


HEAD = picture("head-mr-1", "axial", 12, modality="MR", region="head", level="middle")
ABDOMEN = picture("abdomen-ct-2", "axial", 10, modality="CT", region="abdomen")
SPINE = picture("spine-mr-1", "sagittal", 20, modality="MR", region="spine")


def test_organs_are_known_from_masks_and_regions_and_unknown_elsewhere(
    studies: ModuleType,
) -> None:
    found = {one["volume"]: studies.Masks(one["volume"]).organs(one) for one in (HEAD, SPINE)}
    absent = dict.fromkeys(("aorta", "liver", "lungs", "spleen", "vertebrae"), 0)
    assert found["head-mr-1"] == {**absent, "brain": 1}
    unknown = dict.fromkeys(("aorta", "liver", "lungs", "spleen"))
    assert found["spine-mr-1"] == {**unknown, "brain": 0, "vertebrae": 1}
    marked = studies.Masks("abdomen-ct-2")
    organs = marked.organs(ABDOMEN)
    area = {name: int(mask[10].sum()) for name, mask in marked.marked.items()}
    assert {name for name, state in organs.items() if state} == {
        name for name, pixels in area.items() if pixels
    } | {"vertebrae"}
    assert marked.state("liver", "coronal", 0) == 0  # all slices are labeled
    # Where only some are, a coronal cut can show an organ and not rule it out.
    assert studies.Masks("abdomen-ct-1").state("liver", "coronal", 0) is None


def test_a_report_says_what_is_known_and_equal_facts_are_equal_reports(
    studies: ModuleType,
) -> None:
    record = studies.study(HEAD, {"brain": 1, "lungs": 0, "aorta": None})
    assert record["report"] == "Axial MR of the head, middle third of the brain. Visible: brain."
    assert record["labels"] == {"brain": 1, "lungs": 0, "aorta": None}
    assert record["triplets"] == [
        ["head", "imaged by", "MR"], ["brain", "seen in", "head"],
        ["brain", "cut at", "middle third"],
    ]  # fmt: skip
    assert record["patient"] == "head-mr-1"
    other = {**HEAD, "index": 13, "file": "other.png"}
    assert studies.study(other, {"brain": 1})["report"] == record["report"]


def test_records_are_studies_that_the_recipe_reads(studies: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    pictures = [HEAD, ABDOMEN, {**SPINE, "split": "test"}]
    from PIL import Image

    for one in pictures:
        Image.new("L", (8, 8), 100).save(tmp_path / "images" / one["file"])
    (tmp_path / "pictures.json").write_text(json.dumps(pictures))
    assert studies.main([str(tmp_path)]) == 0
    written = tmp_path / "studies_train.jsonl"
    done = check([SourceOptions(path=str(written), root=str(tmp_path))], Studies())
    assert (done.num_bad, done.records) == (0, 2)
    os.utime(written, (0, 0))
    studies.main([str(tmp_path)])
    assert written.stat().st_mtime == 0, "the same again: a training that reads it may go on"


def test_the_models_differ_in_knowledge_alone_and_the_control_in_its_names(
    studies: ModuleType,
) -> None:
    plain, knowledge, shuffled = (
        resolved(load_recipe(ROOT / "recipes" / "motor-demo" / f"{name}.yaml")) for name in MODELS
    )
    changed = [line.partition(":")[0] for line in differences(knowledge, shuffled)]
    assert changed == ["model.knowledge.0.shuffle"]
    assert {name: block for name, block in knowledge["parts"].items() if name != "knowledge"} == (
        plain["parts"]
    )
    for section in ("data", "train", "objective"):
        assert plain[section] == knowledge[section]
    assert knowledge["model"] | {"knowledge": []} == plain["model"]
    assert plain["model"]["labels"] == list(studies.ORGANS)
    graph = read_graph(str(DEMO / "graph.json"))
    assert set(studies.ORGANS) <= set(graph.nodes)
    assert graph.shuffled(1).nodes != graph.nodes
    assert sorted(graph.shuffled(1).nodes) == sorted(graph.nodes)


def test_both_tasks_are_built_from_the_suite() -> None:
    import yaml

    content = yaml.safe_load((DEMO / "scores.yaml").read_text()) | {"model": "m"}
    tasks = [build_task(one) for one in EvalOptions.model_validate(content).tasks]
    assert [task.cluster_by for task in tasks] == ["patient", "patient"]


class Demo:
    """run.sh in a folder of its own, with a `medm` that only says what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, data = folder, folder / "work_dirs" / "quickstart" / "data"
        for directory in ("examples/motor_demo", "recipes/motor-demo", "bin", data):
            (folder / directory).mkdir(parents=True)
        for name in ("run.sh", "graph.json", "scores.yaml"):
            copy = folder / "examples/motor_demo" / name
            copy.write_bytes((DEMO / name).read_bytes())
        for name in MODELS:
            (folder / f"recipes/motor-demo/{name}.yaml").write_text(name)
        for split in ("train", "test"):
            (data / f"studies_{split}.jsonl").write_text("1")
        for name, text in (("medm", MEDM), ("python", "#!/bin/sh\n")):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def run(self, **environment: str) -> list[str]:
        """The commands of `medm` that this run made: what was trained, or scored."""
        (self.folder / "calls.txt").write_text("")
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        self.done = subprocess.run(
            ["bash", str(self.folder / "examples/motor_demo/run.sh")],
            env={**os.environ, "PATH": path, **environment},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        calls = []
        for line in (self.folder / "calls.txt").read_text().splitlines():
            words = line.split()
            folder = next(
                word for word in words if word.startswith(("output_dir=", "work_dirs/motor_demo"))
            )
            calls.append(f"{words[0]} {folder.rpartition('/')[2]}")
        return calls


def test_each_model_is_trained_with_each_seed_once(tmp_path: Path) -> None:
    demo = Demo(tmp_path)
    first = demo.run()
    assert demo.done.returncode == 0, demo.done.stderr
    expected = [f"{model}-{seed}" for seed in (1, 2, 3) for model in MODELS]
    assert first == [f"{job} {name}" for name in expected for job in ("train", "eval")]
    assert demo.run() == []
    (tmp_path / "recipes/motor-demo/shuffled.yaml").write_text("changed")
    assert demo.run() == [
        f"{job} shuffled-{seed}" for seed in (1, 2, 3) for job in ("train", "eval")
    ]
    (tmp_path / "examples/motor_demo/scores.yaml").write_text("changed")
    assert demo.run() == [f"eval {name}" for name in expected]
    assert len(demo.run(TRAIN="train.max_steps=2")) == 18


def test_a_run_that_was_stopped_resumes(tmp_path: Path) -> None:
    demo = Demo(tmp_path)
    (tmp_path / "killed").touch()
    assert demo.run() == ["train plain-1"]
    assert demo.done.returncode == 75
    (tmp_path / "killed").unlink()
    demo.run()
    assert "--resume" in (tmp_path / "calls.txt").read_text().splitlines()[0]
    assert not list(tmp_path.glob("work_dirs/motor_demo/*/checkpoint-*"))


AXES = {"right": [1.0, 0.0], "wrong": [0.0, 1.0]}
REPORTS = ["A.", "A.", "B.", "B."]


def world(report: ModuleType, folder: Path, found: dict[str, list[bool]]) -> list[Any]:
    """Four studies of the volumes a and b, and for each model which images find their report."""
    records = [
        {
            "report": text,
            "patient": "a" if place % 2 == 0 else "b",
            "labels": {organ: place % 2 if organ == "lungs" else None for organ in report.ORGANS},
        }
        for place, text in enumerate(REPORTS)
    ]
    (folder / "studies_test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    texts = {"A.": AXES["right"], "B.": AXES["wrong"]}
    for model, hits in found.items():
        for seed in report.SEEDS:
            run = folder / f"{model}-{seed}"
            for task in ("study-retrieval", "study-labels"):
                (run / "scores" / task).mkdir(parents=True)
            vectors, labels = [], []
            for place, (text, hit) in enumerate(zip(REPORTS, hits, strict=True)):
                own, other = texts[text], texts["B." if text == "A." else "A."]
                vectors.append(
                    {"index": place, "embedding": own if hit else other, "text_embeddings": [own]}
                )
                labels.append({"index": place, "scores": dict.fromkeys(report.ORGANS, place % 2)})
            for task, lines in (("study-retrieval", vectors), ("study-labels", labels)):
                text = "".join(json.dumps(line) + "\n" for line in reversed(lines))
                (run / "scores" / task / "predictions.jsonl").write_text(text)
            losses = [{"loss": 4.0, "step": 1}, {"loss": 0.5, "step": 64}]
            (run / "loss.jsonl").write_text("\n".join(map(json.dumps, losses)))
    assert report.main([str(folder), str(folder)]) == 0
    rows: list[Any] = json.loads((folder / "results.json").read_text())["rows"]
    return rows


def test_the_table_and_its_claims_by_hand(report: ModuleType, tmp_path: Path) -> None:
    found = {
        "plain": [True, False, False, False],  # one of two in volume a, none in b
        "knowledge": [True, True, True, True],
        "shuffled": [True, True, True, False],
    }
    rows = {row["measure"]: row for row in world(report, tmp_path, found)}
    first = rows["image to report, R@1"]
    bounds = {
        name: [one[k] for k in ("value", "low", "high")] for name, one in first["values"].items()
    }
    assert bounds == {
        "plain": [0.25, 0.0, 0.5], "knowledge": [1.0, 1.0, 1.0], "shuffled": [0.75, 0.5, 1.0],
    }  # fmt: skip
    assert first["chance"] == 0.5
    assert first["seeds"]["plain"] == [0.25] * 3
    better = first["differences"]["knowledge - plain"]
    assert [better[k] for k in ("value", "low", "high")] == [0.75, 0.5, 1.0]
    page = (tmp_path / "results.md").read_text()
    assert (
        "image to report, R@1: `knowledge` scores higher than `plain`, +0.75 (+0.50 to +1.00)."
    ) in page
    assert (
        "image to report, R@1: no difference between `knowledge` and `shuffled` is shown, "
        "+0.25 (+0.00 to +0.50)."
    ) in page
    organs = rows["organs, AUROC"]
    assert [organs["values"][model]["value"] for model in MODELS] == [1.0] * 3
    assert "plain: 64 steps, loss 4.00 to 0.50" in page


def test_a_lower_score_is_said_to_be_lower(report: ModuleType) -> None:
    value = report.Value(-0.2, -0.3, -0.1)
    row = report.Row("R@1", {}, {}, 0.5, {"knowledge - plain": value})
    said = report.sentence(row, "knowledge - plain")
    assert said == "R@1: `knowledge` scores lower than `plain`, -0.20 (-0.30 to -0.10)."


def test_predictions_that_are_missing_or_failed_are_not_passed_over(
    report: ModuleType, tmp_path: Path
) -> None:
    file = tmp_path / "predictions.jsonl"
    file.write_text('{"index": 0, "scores": {}}\n{"index": 1, "error": "damaged"}\n')
    for expected in (2, 3):
        with pytest.raises(SystemExit, match="2 of"):
            report.in_order(file, expected)


def test_an_undefined_draw_is_left_out_of_an_interval(report: ModuleType) -> None:
    drawn = np.array([0.1, np.nan, 0.3])
    assert report.interval(0.2, drawn).high == pytest.approx(0.295)
