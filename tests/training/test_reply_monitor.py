"""Scores of replies while a language model is trained: those of `medm eval`, the best checkpoint by
one of them, and the table of samples."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers.integrations import WandbCallback

from medm.config import validate
from medm.errors import DataError, RecipeError
from medm.evaluation.options import EvalOptions
from medm.evaluation.runner import evaluate
from medm.inference.batch import infer
from medm.inference.options import InferOptions
from medm.models import kind_of_config
from medm.tasks.custom import Custom
from medm.training import callbacks
from medm.training.options import MonitorOptions
from medm.training.recipe import load_recipe
from medm.training.run import train
from medm.training.sample_table import SampleTable
from medm.training.task_monitor import TaskMonitor
from tests.inference.tiny import build_tiny, questions, read_output, save_image, write_records
from tests.tiny import lvlm_section, save_llm

TASK = {"name": "custom", "path": "held_out.json", "metrics": ["normalised-match", "token-f1"]}
ANSWERS = ("yyyy", "yyyy", "n")


def answered(folder: Path, count: int) -> list[dict[str, Any]]:
    """Questions about images, every fifth without one, and their answers."""
    records = questions(folder, count)
    for index, record in enumerate(records):
        record["conversations"].append({"from": "gpt", "value": ANSWERS[index % 3]})
    return records


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replies")
    save_llm("qwen2.5", folder / "llm")
    records = answered(folder, 10)
    write_records(folder, records, "train.json")
    write_records(folder, records[:5], "held_out.json")
    return folder


def recipe(world: Path, name: str, *, monitor: dict[str, Any], **train: Any) -> Path:
    source = {"path": str(world / "train.json"), "root": str(world)}
    content: dict[str, Any] = {
        "model": lvlm_section(world / "llm"),
        "data": {"train": [source], "eval": [source], "packing": True, "max_length": 256},
        "parts": {"llm": {"tune": "full", "lr": 2e-2, "gradient_checkpointing": True},
                  "image.connector": {"tune": "full", "lr": 2e-2}},
        "train": {
            "use_cpu": True, "max_steps": 9, "per_device_train_batch_size": 1, "save_steps": 3, "lr_scheduler_type": "constant",
            "eval_strategy": "steps", "eval_steps": 3, "logging_steps": 3, **train,
        },
        "monitors": [{"task": TASK, "data": str(world), "batch_size": 3, **monitor}],
        "output_dir": str(world / name),
    }  # fmt: skip
    path = world / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_best_checkpoint_by_replies_scores_as_in_the_evaluation(world: Path) -> None:
    """Packed rows with gradient checkpointing; replies are written in padded batches."""
    path = recipe(
        world, "best", monitor={"samples": 2, "max_new_tokens": 4}, load_best_model_at_end=True,
        metric_for_best_model="custom_token-f1", report_to="tensorboard",
    )  # fmt: skip
    assert train(load_recipe(path)).finished
    output = world / "best"
    state = json.loads((output / "checkpoint-9/trainer_state.json").read_text())
    entries = [entry for entry in state["log_history"] if "eval_custom_token-f1" in entry]
    assert [entry["step"] for entry in entries] == [3, 6, 9]
    assert state["best_metric"] == max(entry["eval_custom_token-f1"] for entry in entries) > 0
    options = {
        "model": str(output), "workers": 0, "device": "cpu", "generation": {"max_new_tokens": 4},
        "tasks": [{"task": {**TASK, "rounds": 0}, "data": str(world)}],
        "output_dir": str(world / "scores"),
    }  # fmt: skip
    reports = evaluate(validate(EvalOptions, options, source="test"))
    assert reports is not None
    kept = next(entry for entry in entries if entry["step"] == state["best_global_step"])
    for result in reports[0].scores.results:
        assert kept[f"eval_custom_{result.name}"] == pytest.approx(result.value), result.name

    rows = read_output(output / f"samples/custom-{state['best_global_step']}.jsonl")
    predictions = read_output(world / "scores/custom/predictions.jsonl")
    assert [row["reply"] for row in rows] == [line["reply"] for line in predictions[:2]]
    assert [row["id"] for row in rows] == ["q0", "q1"]
    assert [row["answer"] for row in rows] == list(ANSWERS[:2])
    assert rows[1]["question"].startswith("What is seen here exactly")
    [events] = output.rglob("events.out.tfevents.*")
    assert b"samples/custom" in events.read_bytes()
    assert b"eval/custom_token-f1" in events.read_bytes()
    log = (output / "loss.jsonl").read_text()
    assert "custom_token-f1" in log
    assert "reply" not in log


def test_replies_are_written_in_mixed_precision(world: Path) -> None:
    """Frozen weights in bfloat16, trained ones in float32: only autocast brings them together."""
    path = recipe(world, "mixed", monitor={"samples": 1, "max_new_tokens": 2}, bf16=True)
    overrides = ["model.dtype=bfloat16", "train.max_steps=3", "parts.llm={tune: lora, r: 2}"]
    assert train(load_recipe(path, overrides)).finished
    assert len(read_output(world / "mixed/samples/custom-3.jsonl")) == 1


@pytest.mark.parametrize("family", ["qwen2.5", "phi"])
def test_replies_are_those_of_batch_inference(tmp_path: Path, family: str) -> None:
    """Rows of unlike lengths; a template without an end token ends at a sequence of tokens."""
    model, processor = build_tiny(tmp_path, family=family)
    # What a published model brings counts in neither.
    for config in (model.generation_config, model.language_model.generation_config):
        config.repetition_penalty, config.no_repeat_ngram_size = 5.0, 2
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    write_records(tmp_path, answered(tmp_path, 11), "held_out.json")
    monitor = TaskMonitor(
        options(tmp_path, max_new_tokens=12), kind_of_config(model.config), processor
    )
    records = monitor.answers(monitor.open(model))
    infer(
        validate(
            InferOptions,
            {
                "model": str(tmp_path / "model"), "data": str(tmp_path / "held_out.json"),
                "root": str(tmp_path), "output": str(tmp_path / "out.jsonl"), "workers": 0,
                "device": "cpu", "generation": {"max_new_tokens": 12},
            },
            source="test",
        )
    )  # fmt: skip
    replies = {line["id"]: line["reply"] for line in read_output(tmp_path / "out.jsonl")}
    assert {record["id"]: record["prediction"] for record in records} == replies
    assert len(set(replies.values())) > 3


def options(folder: Path, **changes: Any) -> MonitorOptions:
    content = {"task": TASK, "data": str(folder), "batch_size": 4, **changes}
    return validate(MonitorOptions, content, source="test")


def test_a_reply_ends_where_inference_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end token, the end sequence of a template, or the longest length; padding is no reply."""
    model, processor = build_tiny(tmp_path)
    save_image(tmp_path / "0.png", 0)
    answerer = kind_of_config(model.config).answerer(
        model, processor, frozenset({"text"}), batch_size=4, max_new_tokens=4
    )
    stop, words = processor.tokenizer.eos_token_id, processor.tokenizer("a b c d").input_ids
    model.config.end_sequence = words[1:3]
    rows = [[*words[:1], stop, 7, 7], [*words[:3], 7], [*words[:1], 9, 9, 9]]

    def generate(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        assert kwargs["max_new_tokens"] == 4
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    task = Custom(path="held_out.json", metrics=[{"name": "token-f1"}])
    write_records(tmp_path, answered(tmp_path, 1), "held_out.json")
    [sample] = task.samples(tmp_path)
    item = SimpleNamespace(sample=sample, pixels=[], question=None)
    lines = answerer.answer([item] * 3)  # type: ignore[list-item]
    assert [(line["tokens"], line["finished"]) for line in lines] == [
        (2, True),
        (3, True),
        (4, False),
    ]


def test_items_and_options_that_do_not_fit_are_refused_before_the_run(
    world: Path, tmp_path: Path
) -> None:
    def refused(error: type[Exception], message: str, *overrides: str, **monitor: Any) -> None:
        with pytest.raises(error, match=message):
            train(load_recipe(recipe(world, "refused", monitor=monitor), list(overrides)))

    best = ["train.load_best_model_at_end=true", "train.metric_for_best_model=custom_token-f2"]
    refused(RecipeError, "custom has no metric 'token-f2'.*token-f1", *best)
    best[1] = "train.metric_for_best_model=custom_closed-unparsed"
    refused(RecipeError, "smaller values are better; set train.greater_is_better: false", *best)

    turns = [{"from": "human", "value": "<volume>\nWhat?"}, {"from": "gpt", "value": "no"}]
    (world / "v.npy").write_bytes(b"")
    write_records(world, [{"id": "v", "volume": "v.npy", "conversations": turns}], "volumes.json")
    volumes = {**TASK, "path": "volumes.json"}
    refused(RecipeError, "custom, item v has volumes; the model reads image", task=volumes)
    refused(RecipeError, "m3d-seg needs masks", task="m3d-seg", split="test")
    refused(DataError, "none.json", task={**TASK, "path": "none.json"})
    grouped = {**TASK, "group_by": ["organ"]}
    refused(DataError, "group_by: no record has 'organ'", task=grouped)
    external = {**TASK, "metrics": ["meteor-java"]}
    refused(RecipeError, "no metric that can be computed during the training", task=external)
    refused(RecipeError, r"monitors\.0\.data: /no/such: no such folder", data="/no/such")


def test_a_table_in_weights_and_biases_and_a_disk_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a stand-in for the package: its run gets a table of the columns."""
    logged: list[tuple[dict[str, Any], bool]] = []
    run = SimpleNamespace(log=lambda values, *, commit: logged.append((values, commit)))
    module = SimpleNamespace(run=run, Table=lambda *, columns, data: (columns, data))
    monkeypatch.setitem(sys.modules, "wandb", module)
    tracker = WandbCallback.__new__(WandbCallback)
    (tmp_path / "samples").write_text("a file where the folder should be")
    row = {"id": "1", "question": "a | b\nc", "reply": "no", "answer": "yes"}
    SampleTable("custom", tmp_path, [tracker]).write([row], 3)
    columns = ["id", "question", "reply", "answer"]
    assert logged == [({"samples/custom": (columns, [["1", "a | b\nc", "no", "yes"]])}, False)]
    assert "samples/custom-3.jsonl cannot be written" in caplog.text


def test_a_score_that_is_not_defined_stops_the_run_with_the_names_that_there_are(
    world: Path,
) -> None:
    """One class alone has no sensitivity and specificity."""
    task = {**TASK, "metrics": ["sensitivity-specificity", "token-f1"]}
    records = [
        {"id": str(n), "conversations": [{"from": "human", "value": "?"}], "answer": "yes"}
        for n in range(2)
    ]
    write_records(world, records, "one_class.json")
    path = recipe(
        world, "undefined", monitor={"task": {**task, "path": "one_class.json"}},
        metric_for_best_model="custom_specificity", load_best_model_at_end=True,
    )  # fmt: skip
    with pytest.raises(RecipeError, match="custom_specificity is not defined at step 3; there are"):
        train(load_recipe(path))


def test_a_stop_at_an_evaluation_that_is_not_the_best_is_saved(world: Path) -> None:
    """`save_strategy: best` takes the request to save back."""
    path = recipe(world, "stopped", monitor={"max_new_tokens": 1}, save_strategy="best",
                  metric_for_best_model="custom_token-f1")  # fmt: skip
    seen: list[int] = []
    own = TaskMonitor.evaluate

    def evaluate_and_stop(self: TaskMonitor, model: Any, step: int) -> dict[str, float]:
        seen.append(step)
        return {**own(self, model, step), "eval_custom_token-f1": 1.0 / step}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskMonitor, "evaluate", evaluate_and_stop)
        patch.setattr(callbacks.Interruption, "on_step_end", stop_at(6))
        assert not train(load_recipe(path)).finished
    assert seen == [3, 6]
    assert (world / "stopped/checkpoint-6/trainer_state.json").exists()


def stop_at(step: int) -> Any:
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            self.raised = control.should_save = control.should_training_stop = True

    return on_step_end
