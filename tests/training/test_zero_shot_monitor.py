"""Zero-shot scores during a training: those of `medm eval`, on one process and on two, and without
effect on the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from medm.config import validate
from medm.errors import DataError, RecipeError
from medm.evaluation.options import EvalOptions
from medm.evaluation.runner import evaluate
from medm.training.recipe import load_recipe
from medm.training.run import train
from tests.launch import needs_compiler, on_two_processes
from tests.models.dual_encoder.tiny import save_tokenizer, section
from tests.tasks.layouts import put_csv

TASK = {"name": "zero-shot", "card": "breast-us"}
PARTS = ("image.encoder", "image.projection", "text.encoder", "text.projection", "scale")
KEYS = ("accuracy", "balanced-accuracy", "macro-f1", "sensitivity", "specificity", "auroc")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pairs, a tokenizer, and the set `breast-us` of five files, one of them broken."""
    folder = tmp_path_factory.mktemp("monitor")
    save_tokenizer(folder / "tokenizer")
    for index in range(5):
        noise = np.random.default_rng(index).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    pairs = [{"image": f"{n}.png", "caption": text} for n, text in
             enumerate(("normal", "mass", "effusion", "a chest radiograph"))]  # fmt: skip
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "broken.png").write_bytes(b"no image")
    files = ["0.png", "1.png", "broken.png", "3.png", "4.png"]
    labels = ["benign", "malignant", "benign", "malignant", "malignant"]
    put_csv(
        folder / "test.csv",
        [{"image": file, "label": label} for file, label in zip(files, labels, strict=True)],
    )
    return folder


def recipe(world: Path, name: str, *, monitored: bool = True, **changes: Any) -> Path:
    source = {"path": str(world / "pairs.json"), "root": str(world)}
    content: dict[str, Any] = {
        "model": section(str(world / "tokenizer")),
        "data": {"train": [source], "eval": [source]},
        "objective": {"name": "contrastive"},
        "parts": {part: {"tune": "full", "lr": 1e-2} for part in PARTS},
        "train": {
            "use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 2,
            "logging_steps": 1, "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 1,
            "dataloader_num_workers": 0, "per_device_eval_batch_size": 2,
        },
        "output_dir": str(world / name),
    }  # fmt: skip
    if monitored:
        content["monitors"] = [{"task": TASK, "data": str(world), "batch_size": 2}]
    content["train"] |= changes
    path = world / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def history(folder: Path) -> list[dict[str, float]]:
    """The evaluations of a run."""
    state = json.loads((folder / "checkpoint-2/trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "eval_loss" in entry]


def by_evaluation(world: Path, model: Path) -> dict[str, float]:
    """The scores of `medm eval` on a trained model."""
    options = {
        "model": str(model),
        "tasks": [{"task": {**TASK, "rounds": 0}, "data": str(world)}],
        "output_dir": str(model / "scores"),
    }
    (report,) = evaluate(validate(EvalOptions, options, source="test")) or [None]
    assert report is not None
    return {result.name: result.value for result in report.scores.results}


def require_equal(world: Path, folder: Path) -> None:
    expected = by_evaluation(world, folder)
    first, last = history(folder)
    for key in KEYS:
        assert last[f"eval_zero-shot-breast-us_{key}"] == pytest.approx(expected[key]), key
    assert first.keys() == last.keys() | {"epoch"}


def test_the_scores_are_those_of_the_evaluation_and_weights_are_not_touched(world: Path) -> None:
    assert train(load_recipe(recipe(world, "with"))).finished
    require_equal(world, world / "with")
    assert train(load_recipe(recipe(world, "without", monitored=False))).finished
    for file in (world / "with").glob("*.safetensors"):
        one, other = load_file(file), load_file(world / "without" / file.name)
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_the_best_evaluation_may_be_chosen_by_a_score(world: Path) -> None:
    path = recipe(
        world, "best", metric_for_best_model="zero-shot-breast-us_accuracy",
        load_best_model_at_end=True, greater_is_better=True, save_steps=1,
    )  # fmt: skip
    assert train(load_recipe(path)).finished
    state = json.loads((world / "best/checkpoint-2/trainer_state.json").read_text())
    scores = [entry["eval_zero-shot-breast-us_accuracy"] for entry in history(world / "best")]
    assert state["best_metric"] == max(scores)


def test_two_ranks_score_as_one_does(world: Path) -> None:
    on_two_processes("medm", "train", str(recipe(world, "ddp", per_device_train_batch_size=1)))
    require_equal(world, world / "ddp")


@needs_compiler
def test_two_ranks_score_under_zero3(world: Path) -> None:
    path = recipe(world, "zero3", per_device_train_batch_size=1, deepspeed="zero3")
    on_two_processes("medm", "train", str(path))
    require_equal(world, world / "zero3")


def test_a_recipe_without_evaluations_or_for_another_kind_is_refused(world: Path) -> None:
    path = recipe(world, "refused")
    assert len(load_recipe(path).monitors) == 1
    with pytest.raises(RecipeError, match=r"train\.eval_strategy is no; set it to steps or epoch"):
        load_recipe(path, ["train.eval_strategy=no"])
    with pytest.raises(RecipeError, match=r"of no monitor; expected zero-shot-breast-us_accuracy"):
        load_recipe(path, ["train.metric_for_best_model=zero-shot-pcam_accuracy"])
    content = yaml.safe_load(path.read_text())
    [monitor] = content["monitors"]
    for monitors, message in (
        ([monitor, monitor], "zero-shot-breast-us stands twice"),
        ([{**monitor, "samples": 2}], "zero-shot has no replies; leave samples out"),
        ([{**monitor, "max_new_tokens": 2}], "max_new_tokens is for language models"),
    ):
        path.write_text(yaml.safe_dump({**content, "monitors": monitors}))
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)
    content["monitors"] = [{"task": "medqa", "data": "d"}]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match="medqa needs a model that answers during"):
        load_recipe(path)


def test_a_set_that_is_not_there_stops_the_run_before_the_first_step(
    world: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"'test\.csv' is missing"):
        train(load_recipe(recipe(world, "missing"), [f"monitors.0.data={tmp_path}"]))
