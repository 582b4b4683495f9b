"""Scores of tasks during the training of a model of studies: those of `medm eval`, without effect
on the weights, and the best checkpoint by one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from medm.config import validate
from medm.errors import RecipeError
from medm.evaluation.options import EvalOptions
from medm.evaluation.runner import evaluate
from medm.models.blip.build import BlipKind
from medm.tasks.base import FAILED
from medm.training import task_monitor
from medm.training.options import MonitorOptions
from medm.training.recipe import load_recipe
from medm.training.run import train
from medm.training.task_monitor import TaskMonitor
from tests.models.blip.tiny import make, section
from tests.models.dual_encoder.tiny import save_tokenizer

REPORTS = ("a chest radiograph", "normal", "effusion of the left", "a mass of the brain", "mass")
LABELS = {"name": "study-labels", "path": "annotation.json", "label_names": ["effusion", "mass"]}
TASKS = [LABELS, {"name": "mimic-cxr", "images": "all"}, {"name": "study-retrieval"}]
KEYS = ("study-labels_auroc", "mimic-cxr_bleu-coco-4", "study-retrieval_image-to-text-R@1")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five studies in R2Gen's layout, one of them broken in the validation split, and a tokenizer."""
    folder = tmp_path_factory.mktemp("monitor")
    save_tokenizer(folder / "tokenizer")
    (folder / "images").mkdir()
    for index in range(10):
        noise = np.random.default_rng(index).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"images/{index}.png")
    (folder / "images/broken.png").write_bytes(b"no image")
    rows = [
        {"id": f"s{n}", "report": REPORTS[n], "label_index": [n % 2, int(n > 2)],
         "image_path": [f"{n}.png", f"{n + 5}.png"][: 1 + n % 2]}
        for n in range(5)
    ]  # fmt: skip
    held_out = [*rows[:4], {**rows[4], "image_path": ["broken.png"]}]
    (folder / "annotation.json").write_text(json.dumps({"train": rows, "val": held_out}))
    train_rows = [
        {"image": f"images/{n}.png", "report": REPORTS[n],
         "labels": {"effusion": n % 2, "mass": int(n > 2)}}
        for n in range(4)
    ]  # fmt: skip
    (folder / "train.json").write_text(json.dumps(train_rows))
    return folder


def recipe(world: Path, name: str, **changes: Any) -> Path:
    terms = {"itc": "itc", "text": "language-modeling", "labels": "multilabel"}
    source = {"path": str(world / "train.json"), "root": str(world)}
    parts = ("image.encoder", "image.projection", "text.encoder", "text.projection",
             "text.decoder", "temperature")  # fmt: skip
    content: dict[str, Any] = {
        "model": section(str(world / "tokenizer"), heads=["itc", "lm", "labels"], image={"views": 2}),
        "data": {"train": [source], "eval": [source]},
        "objective": {"terms": {key: {"objective": one} for key, one in terms.items()}},
        "parts": {part: {"tune": "full", "lr": 1e-2} for part in parts},
        "train": {
            "use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1,
            "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
            "dataloader_num_workers": 0, "per_device_eval_batch_size": 2,
        },
        "monitors": [{"task": task, "data": str(world), "batch_size": 2} for task in TASKS],
        "output_dir": str(world / name),
    }  # fmt: skip
    content["monitors"] = changes.pop("monitors", content["monitors"])
    content["train"] |= changes
    path = world / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def history(folder: Path) -> list[dict[str, float]]:
    """The evaluations of a run."""
    state = json.loads((folder / "checkpoint-2/trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "eval_loss" in entry]


def test_the_scores_are_those_of_the_evaluation_and_choose_the_best_weights(world: Path) -> None:
    """The best of two evaluations is kept, and scores are those of `medm eval` on its weights."""
    path = recipe(
        world, "best", metric_for_best_model=KEYS[0], load_best_model_at_end=True,
        greater_is_better=True,
    )  # fmt: skip
    assert train(load_recipe(path)).finished
    entries = history(world / "best")
    best = max(entry[f"eval_{KEYS[0]}"] for entry in entries)
    state = json.loads((world / "best/checkpoint-2/trainer_state.json").read_text())
    assert state["best_metric"] == best
    kept = next(entry for entry in entries if entry["step"] == state["best_global_step"])
    options = {
        "model": str(world / "best"), "workers": 0, "device": "cpu",
        "tasks": [
            {"task": {**task, "rounds": 0}, "data": str(world), "split": "val"} for task in TASKS
        ],
        "output_dir": str(world / "scores"),
    }  # fmt: skip
    reports = evaluate(validate(EvalOptions, options, source="test"))
    assert reports is not None
    for report, key in zip(reports, KEYS, strict=True):
        found = {result.name: result.value for result in report.scores.results}
        assert kept[f"eval_{key}"] == pytest.approx(found[key.partition("_")[2]]), key
        assert report.scores.failed == 1  # a file is no image


def test_ranks_share_the_items_and_weights_are_not_touched(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = make(section(str(world / "tokenizer"), image={"views": 2}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = validate(
        MonitorOptions, {"task": LABELS, "data": str(world), "batch_size": 2}, source="test"
    )
    monitor = TaskMonitor(options, BlipKind(), processor)
    whole = monitor.scores(monitor.answers(monitor.open(model)))
    shards: list[dict[str, Any]] = []

    def gather(shard: dict[str, Any]) -> list[dict[str, Any]]:
        shards.append(shard)
        return [other, *shards]  # the second rank sees the answers of the first

    other: dict[str, Any] = {f"s{n}": {FAILED: "not answered yet"} for n in range(1, 5, 2)}
    monkeypatch.setattr(task_monitor, "all_gather_objects", gather)
    monkeypatch.setattr(task_monitor, "world_size", lambda: 2)
    for number in range(2):
        monkeypatch.setattr(task_monitor, "rank", lambda number=number: number)
        found = monitor.scores(monitor.answers(monitor.open(model)))
    assert found == whole
    assert [sorted(shard) for shard in shards] == [["s0", "s2", "s4"], ["s1", "s3"]]
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_scores_that_the_model_cannot_give_are_refused(world: Path) -> None:
    path = recipe(world, "refused")
    changed = yaml.safe_load(path.read_text())

    def refused(monitor: dict[str, Any], message: str, *overrides: str) -> None:
        changed["monitors"] = [{"data": str(world), **monitor}]
        path.write_text(yaml.safe_dump(changed))
        with pytest.raises(RecipeError, match=message):
            train(load_recipe(path, list(overrides)))

    refused({"task": {"name": "study-retrieval", "rerank": 2}}, "study-retrieval needs matches")
    limited = {"task": "mimic-cxr", "max_new_tokens": 9}
    refused(limited, "max_new_tokens is for language models, and this one is 'blip'")
    refused({"task": {**LABELS, "label_names": ["a", "mass"]}}, "scores a, which model.labels does")
    refused({"task": "medqa"}, "medqa has no split 'val'")
    refused(
        {"task": {"name": "zero-shot", "card": "pcam"}}, "zero-shot needs a model that scores texts"
    )
    best = ["train.metric_for_best_model=study-labels_auroc", "train.load_best_model_at_end=true"]
    refused({"task": LABELS, "split": "test"}, "study-labels scores its test split", *best)
    refused({"task": "iu-xray"}, "study-labels_auroc is of no monitor", *best)
