"""A recipe run from its file to a model folder, with a real data set of a dozen images and tiny
parts."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

from medm.errors import CheckpointError, DataError, MedmError, RecipeError
from medm.models import load
from medm.models.manifest import read_manifest
from medm.models.provenance import read_concepts
from medm.training import checkpoints, run
from medm.training.card import write_record
from medm.training.recipe import load_recipe
from medm.training.run import publish, train
from tests import tiny

QUESTIONS = ("Which plane is shown?", "Is there a lesion?")


def write_world(folder: Path) -> Path:
    """A tiny language model, twelve images, annotation files and a recipe."""
    tiny.save_llm("qwen2.5", folder / "llm")
    (folder / "images").mkdir()
    rng, records = np.random.default_rng(0), []
    for index in range(12):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(
            folder / "images" / f"{index}.png"
        )
        turns = [
            {"from": "human", "value": f"<image>\n{QUESTIONS[index % 2]}"},
            {"from": "gpt", "value": ("axial", "no")[index % 2]},
        ]
        records.append({"id": str(index), "image": [f"{index}.png"], "conversations": turns})
    (folder / "train.json").write_text(json.dumps(records[:8]))
    (folder / "eval.json").write_text(json.dumps(records[8:]))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("run"))


def recipe(world: Path, output_dir: Path, **changes: Any) -> Any:
    content: dict[str, Any] = {
        "model": tiny.lvlm_section(world / "llm"),
        "data": {
            "train": [{"path": str(world / "train.json"), "root": str(world / "images")}],
            "eval": [{"path": str(world / "eval.json"), "root": str(world / "images")}],
        },
        "parts": {"llm": {"tune": "lora", "r": 4, "lr": 1e-3}, "image.connector": {"tune": "full", "lr": 1e-2}},
        "train": {
            "use_cpu": True, "max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 1,
            "eval_strategy": "steps", "eval_steps": 2,
        },
        "output_dir": str(output_dir),
    }  # fmt: skip
    for section, values in changes.items():
        content[section] = (
            content[section] | values if isinstance(content.get(section), dict) else values
        )
    path = output_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(content))
    return load_recipe(path)


@pytest.mark.parametrize("key", ["path", "root"])
def test_a_missing_file_or_folder_is_said_before_weights_are_read(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(
        "medm.training.run.build", lambda *_, **__: pytest.fail("weights were read")
    )
    source = {"path": str(world / "train.json"), "root": str(world / "images"), key: "/no/such"}
    with pytest.raises(RecipeError, match=f"^data.train.0.{key}: /no/such: no such"):
        train(recipe(world, tmp_path / "out", data={"train": [source]}))


def weighted(world: Path) -> dict[str, Any]:
    """Two sources of unequal size, drawn by weight."""
    records = json.loads((world / "train.json").read_text())
    for name, part in (("few", records[:3]), ("many", records[3:])):
        (world / f"{name}.json").write_text(json.dumps(part))
    images = str(world / "images")
    return {
        "train": [
            {"path": str(world / f"{name}.json"), "root": images, "weight": weight}
            for name, weight in (("few", 3), ("many", 1))
        ]
    }


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    outcome = train(recipe(world, world / "trained", data=weighted(world)))
    assert outcome.finished
    assert outcome.steps == 6
    return outcome.output_dir


def test_the_folder_opens_and_says_where_it_comes_from(world: Path, trained: Path) -> None:
    model, processor = load(str(trained))
    assert set(model.config.adapters) == {"llm"}
    assert list(processor.branches) == ["image"]
    present = {path.name for path in trained.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "README.md",
        "recipe.yaml",
        "run.json",
        "loss.jsonl",
        "loss.png",
    } <= present
    assert not [name for name in present if name.startswith(".tmp")]
    assert "concepts.json" not in present  # no record has a mask
    card = (trained / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: medm\ntags: [medical, vision-language]\n---\n# ")
    assert "Not for clinical use" in card
    assert (
        "\n\nA medical vision-language model trained with medm. It can be wrong, can invent "
        "findings, and carries the biases of its\ndata. It was not validated on any clinical "
        'task.\n\n## Use\n\n```python\nimport medm\n\nmodel = medm.load("path/to/this/folder")\n'
    ) in card
    assert 'model.ask("What is seen?", image="image.png"' in card
    assert load_recipe(trained / "recipe.yaml") == recipe(world, trained, data=weighted(world))
    run = json.loads((trained / "run.json").read_text())
    train_file = world / "few.json"
    assert run["data"][str(train_file)] == hashlib.sha256(train_file.read_bytes()).hexdigest()
    assert (
        run["versions"]["torch"] == torch.__version__.split("+")[0]
        or run["versions"]["torch"] == torch.__version__
    )
    assert run["scores"].keys() == {"training loss", "held-out loss"}
    assert 0 < run["trainable"] < run["parameters"]


def test_what_a_run_saved_opens_without_a_warning(
    trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers' Trainer sets fields on the config while it trains; none may look unknown
    later."""
    for folder in (trained, trained / "checkpoint-6"):
        load(str(folder))
        assert "use_cache" not in json.loads((folder / "config.json").read_text())
    assert [record.message for record in caplog.records if record.name.startswith("medm")] == []


def test_folders_saved_before_use_cache_was_left_out_open_without_a_warning(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = (
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    )
    for name in names:
        shutil.copy(trained / name, tmp_path / name)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "use_cache": False, "from_the_future": 1})
    )
    load(str(tmp_path))
    (warning,) = [record.message for record in caplog.records if "not known here" in record.message]
    assert "from_the_future" in warning
    assert "use_cache" not in warning


def test_weights_that_changed_since_they_were_written_are_not_opened(
    trained: Path, tmp_path: Path
) -> None:
    for folder in (trained, trained / "checkpoint-6"):
        copy = tmp_path / folder.name
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("checkpoint-*"))
        load(str(copy))
        weights = bytearray((copy / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (copy / "model.safetensors").write_bytes(weights)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: the content changed"):
            load(str(copy))


def test_a_stopped_and_continued_run_writes_the_same_model(
    world: Path, trained: Path, tmp_path: Path
) -> None:
    """Through the command line, in a process of its own that gets SIGTERM: exit status 75, then
    --resume."""
    output = tmp_path / "trained"
    recipe(world, output, data=weighted(world))
    script = (
        "import os, signal, sys, transformers\nfrom medm.cli import main\nclass "
        "Stop(transformers.TrainerCallback):\n    def on_step_begin(self, args, state, control, "
        "**kwargs):\n        if state.global_step == 3 and '--resume' not in sys.argv: "
        "os.kill(os.getpid(), signal.SIGTERM)\nimport medm.training.run as run\nknown = "
        "run._callbacks\nrun._callbacks = lambda recipe: [*known(recipe), "
        "Stop()]\nmain(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, "train", str(output.with_suffix(".yaml"))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    stopped = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert stopped.returncode == 75, stopped.stderr
    assert not (output / "config.json").exists()
    assert checkpoints.folders(output)[0].name == "checkpoint-4"
    done = subprocess.run(
        [*command, "--resume"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    whole, again = load_file(trained / "model.safetensors"), load_file(output / "model.safetensors")
    assert whole.keys() == again.keys()
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


def test_a_signal_while_the_final_model_is_written_lets_it_be_finished(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put_in_place(folder: Path, output_dir: Path) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        publish(folder, output_dir)

    monkeypatch.setattr("medm.training.run.publish", put_in_place)
    settings = {"max_steps": 1, "save_strategy": "no", "eval_strategy": "no"}
    outcome = train(recipe(world, tmp_path / "out", train=settings))
    assert outcome.finished
    load(str(tmp_path / "out"))


def test_annotations_that_were_edited_are_not_resumed_with(world: Path, tmp_path: Path) -> None:
    records = json.loads((world / "train.json").read_text())
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(records))
    data = {"train": [{"path": str(path), "root": str(world / "images")}], "eval": []}
    settings = {"max_steps": 2, "eval_strategy": "no"}
    train(recipe(world, tmp_path / "out", data=data, train=settings))
    records[0]["conversations"][1]["value"] = "sagittal"
    path.write_text(json.dumps(records))
    with pytest.raises(
        RecipeError, match=r"checkpoint-2: .*mine\.json changed since it was written"
    ):
        train(recipe(world, tmp_path / "out", data=data, train=settings), resume=True)


def test_a_new_run_starts_from_a_lora_result_and_goes_on_with_its_adapter(
    world: Path, trained: Path, tmp_path: Path
) -> None:
    before = load_file(trained / "model.safetensors")
    outcome = train(
        recipe(
            world,
            tmp_path / "kept",
            init_from=str(trained),
            train={"max_steps": 1, "warmup_steps": 4},
        )
    )
    after = load_file(outcome.output_dir / "model.safetensors")
    assert (
        after.keys() == before.keys()
    )  # the learning rate of step 1 is 0: what was loaded is what is saved
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    parts = {"llm": {"tune": "full", "adapter": "merge"}}
    merged = train(
        recipe(
            world, tmp_path / "merged", init_from=str(trained), parts=parts, train={"max_steps": 1}
        )
    )
    assert not [
        name for name in load_file(merged.output_dir / "model.safetensors") if "lora" in name
    ]
    with pytest.raises(RecipeError, match="adapter: merge"):
        train(
            recipe(
                world, tmp_path / "refused", init_from=str(trained), parts={"llm": {"tune": "full"}}
            )
        )


def test_bad_records_stop_the_run_before_it_begins(world: Path, tmp_path: Path) -> None:
    records = json.loads((world / "train.json").read_text())
    records[3]["image"] = ["../outside.png"]
    records[5]["conversations"] = []
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(records))
    data = {"train": [{"path": str(path), "root": str(world / "images")}]}
    with pytest.raises(
        DataError, match=r"2 of 8 training records are bad; the first: .*bad\.json, record 3"
    ):
        train(recipe(world, tmp_path / "out", data=data))
    with pytest.raises(
        DataError, match=r"2 of 8 training records are bad \(25\.0%\), more than .*limit = 0\.1"
    ):
        train(recipe(world, tmp_path / "out", data=data | {"bad_records": "skip"}))
    data["bad_records_limit"] = 2
    skipped = recipe(
        world, tmp_path / "out", data=data | {"bad_records": "skip"}, train={"max_steps": 2}
    )
    assert train(skipped).finished
    counts = json.loads((tmp_path / "out" / "run.json").read_text())["records"]
    assert counts["left_out_by_check"] == 2


class At(TrainerCallback):
    """Does something once, at the end of a step."""

    def __init__(self, step: int, what: Callable[[], object]) -> None:
        self.step, self.what = step, what

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.what()


@pytest.fixture
def mine(world: Path, tmp_path: Path) -> dict[str, Any]:
    """The `data` section over images and annotations of this test's own."""
    shutil.copytree(world / "images", tmp_path / "images")
    shutil.copy(world / "train.json", tmp_path / "train.json")
    source = {"path": str(tmp_path / "train.json"), "root": str(tmp_path / "images")}
    return {"train": [source], "eval": [], "bad_records": "skip"}


def remove_images(folder: Path) -> None:
    (folder / "images").rename(folder / "away")


def rewrite_annotations(folder: Path) -> None:
    file = folder / "train.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:4]))


def damage_images(folder: Path) -> None:
    for file in (folder / "images").iterdir():
        file.write_bytes(file.read_bytes()[:40])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (remove_images, r"no such file.*was there when the run began.*--resume"),
        (rewrite_annotations, r"train\.json: the file changed after it was opened"),
        (
            damage_images,
            r"training records are bad \(\d+\.\d%\), more than data\.bad_records_limit = 0\.1; for example ",
        ),
    ],
    ids=["images gone", "annotations rewritten", "images damaged"],
)
def test_data_lost_during_the_run_stops_it(
    mine: dict[str, Any],
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Path], object],
    message: str,
) -> None:
    """Though bad records are skipped; before, the run went on to its end at loss 0."""
    monkeypatch.setattr("medm.data.dataset.RETRY_SECONDS", (0.0,))
    callbacks = run._callbacks
    monkeypatch.setattr(
        run, "_callbacks", lambda recipe: [*callbacks(recipe), At(2, lambda: fault(tmp_path))]
    )
    settings = {"max_steps": 40, "eval_strategy": "no", "save_steps": 50}
    with pytest.raises(MedmError, match=message):
        train(recipe(world, tmp_path / "out", data=mine, train=settings))
    logged = [
        json.loads(line) for line in (tmp_path / "out" / "loss.jsonl").read_text().splitlines()
    ]
    assert logged and all(entry.get("loss") != 0 for entry in logged)
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_first_record_is_logged_only_when_it_is_asked_for(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for level in ("INFO", "DEBUG"):
        with caplog.at_level(level, logger="medm"):
            train(recipe(world, tmp_path / level, train={"max_steps": 1, "eval_strategy": "no"}))
        assert (QUESTIONS[0] in caplog.text) == (level == "DEBUG")


def test_held_out_data_is_asked_for_when_it_is_to_be_measured(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.eval"):
        train(recipe(world, tmp_path / "out", data={"eval": []}))


def test_publishing_puts_the_config_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in between, the folder does not open; it never opens half new and half old."""
    output, folder = tmp_path / "out", tmp_path / "out" / ".tmp-model"
    folder.mkdir(parents=True)
    (output / "config.json").write_text("old")
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (output / name).write_text(
            "of an earlier model, and preferred to one file when a folder is opened"
        )
    for name in ("config.json", "model.safetensors", "processor_config.json"):
        (folder / name).write_text("new")
    moved = []
    replace = Path.replace

    def note(path: Path, target: Path) -> Path:
        moved.append((path.name, (output / "config.json").exists()))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", note)
    publish(folder, output)
    assert moved[-1] == ("config.json", False)
    assert sorted(moved[:-1]) == [("model.safetensors", False), ("processor_config.json", False)]
    assert (output / "config.json").read_text() == "new"
    assert {path.name for path in output.iterdir()} == {
        "config.json",
        "model.safetensors",
        "processor_config.json",
    }


class Interrupted(Exception):
    """The power goes."""


@pytest.mark.parametrize(
    "after", [0, 3, -2, -1], ids=["first file", "in the middle", "manifest", "config"]
)
@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), Interrupted()], ids=["error", "kill"]
)
def test_a_model_that_was_not_put_in_place_is_put_there_by_resume(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, error: Exception
) -> None:
    """No step is trained again, and no byte of the model is another."""
    given = recipe(
        world,
        tmp_path / "out",
        train={"max_steps": 1, "eval_strategy": "no", "save_strategy": "no"},
    )
    replace, hashes = Path.replace, {}

    def failing(path: Path, target: Path) -> Path:
        if path.parent.name == ".finished-model":
            hashes.setdefault("all", read_manifest(path.parent)["files"] if not hashes else None)
            order = sorted(
                path.parent.iterdir(),
                key=lambda path: (
                    ["manifest.json", "config.json"].index(path.name)
                    if path.name in ("manifest.json", "config.json")
                    else -1
                ),
            )
            done = len(hashes["all"]) + 1 - len(order)
            if done == (after if after >= 0 else len(hashes["all"]) + 1 + after):
                raise error
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises((CheckpointError, Interrupted)) as caught:
        train(given)
    assert isinstance(caught.value, Interrupted) or "--resume moves it" in str(caught.value)
    monkeypatch.setattr(Path, "replace", replace)
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(
        RecipeError,
        match=r"could not be put in place \(\.finished-model\); finish that with --resume",
    ):
        train(given)
    other = recipe(
        world,
        tmp_path / "other",
        train={"max_steps": 2, "eval_strategy": "no", "save_strategy": "no"},
    )
    with pytest.raises(RecipeError, match=r"of another recipe.*\n.*train\.max_steps: was 1, is 2"):
        train(other.model_copy(update={"output_dir": str(tmp_path / "out")}), resume=True)
    monkeypatch.setattr(run, "build", lambda *_, **__: pytest.fail("trained again"))
    outcome = train(given, resume=True)
    assert outcome.finished and outcome.steps == 1 and outcome.loss is not None
    for name, entry in hashes["all"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == entry["sha256"]
    load(str(tmp_path / "out"))
    assert not (tmp_path / "out" / ".finished-model").exists()


def test_the_folder_says_what_the_model_was_trained_to_name(world: Path, tmp_path: Path) -> None:
    records = json.loads((world / "train.json").read_text())
    for record in records:
        record["masks"] = [{"file": record["image"][0], "phrase": "Liver"}]
        record["conversations"][1]["value"] = "It is [SEG]."
    (tmp_path / "masks.json").write_text(json.dumps(records))
    train(
        recipe(
            world,
            tmp_path / "out",
            model={"control_tokens": ["[SEG]"]},
            data={"train": [{"path": str(tmp_path / "masks.json"), "root": str(world / "images")}]},
            parts={"llm": {"tune": "lora", "r": 4, "lr": 1e-3, "new_tokens": "train"}},
            train={"max_steps": 1, "eval_strategy": "no"},
        )
    )
    found = read_concepts(tmp_path / "out")
    assert found is not None
    assert found["concepts"] == {"liver": {"records": 8, "absent": 0}}
    assert "concepts.json" in read_manifest(tmp_path / "out")["files"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_is_refused_while_the_final_model_is_written(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    given = recipe(world, tmp_path / "out", train={"max_steps": 1, "eval_strategy": "no"})
    refused = []

    def write(folder: Path, **settings: Any) -> None:
        with pytest.raises(MedmError, match="another run is writing here") as caught:
            train(given, resume=resume)
        refused.append(caught.value)
        write_record(folder, **settings)

    monkeypatch.setattr(run, "write_record", write)
    assert train(given).finished
    assert len(refused) == 1
    load(str(tmp_path / "out"))


def test_a_disk_that_is_full_for_the_final_model_is_an_error_and_resume_ends_the_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipe(world, tmp_path / "out", train={"max_steps": 2, "eval_strategy": "no"})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(run, "write_record", full)
        with pytest.raises(
            CheckpointError, match=r"could not be written \(No space left on device\); make room"
        ):
            train(given)
    assert train(given, resume=True).finished
    load(str(tmp_path / "out"))


def occupied(folder: Path) -> None:
    (folder / "out" / "checkpoint-3").mkdir(parents=True)


def a_file(folder: Path) -> None:
    (folder / "out").write_text("")


def finished(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("prepare", "changes", "message"),
    [
        (occupied, {}, "holds checkpoint-3 of an earlier run"),
        (finished, {}, "holds a finished model"),
        (a_file, {}, r"output_dir: .*out cannot be written \(File exists\)"),
        (None, {"init_from": "/no/such"}, r"init_from: /no/such: no such folder"),
        (None, {"train": {"deepspeed": "zero4"}}, r"train\.deepspeed: 'zero4'"),
        (None, {"train": {"report_to": "swanlab"}}, r"train\.report_to: swanlab is not installed"),
        (None, {"train": {"lr_scheduler_type": "cosin"}}, r"did you mean 'cosine'"),
        (None, {"train": {"optim": "galore_adamw"}}, r"train\.optim: galore_adamw"),
        (None, {"train": {"liger": True}}, r"train\.liger"),
        (None, {"train": {"use_cpu": False, "require_gpu": True}}, r"train\.require_gpu"),
        (
            None,
            {"parts": {"llm": {"tune": "lora", "quantize": "4bit"}}},
            r"parts\.llm\.quantize: 4bit",
        ),
        (None, {"data": {"eval": []}}, r"data\.eval"),
        (None, {"train": {"arguments": {"optim_argz": "x"}}}, r"train\.arguments\.optim_argz"),
    ],
)
def test_what_can_be_known_is_said_before_weights_are_read(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[Path], None] | None,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(run, "build", lambda *_, **__: pytest.fail("weights were read"))
    if torch.cuda.is_available() and ("liger" in message or "gpu" in message):
        pytest.skip("there is a GPU")
    if prepare is not None:
        prepare(tmp_path)
    with pytest.raises(MedmError, match=message):
        train(recipe(world, tmp_path / "out", **changes))


def test_a_changed_recipe_is_said_before_weights_are_read(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 2, "eval_strategy": "no"}
    train(recipe(world, tmp_path / "out", train=settings))
    monkeypatch.setattr(run, "build", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(RecipeError, match=r"train\.seed: was 42, is 7"):
        train(recipe(world, tmp_path / "out", train=settings | {"seed": 7}), resume=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_recipe_for_gpus_runs_without_one_and_run_json_says_so(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"max_steps": 1, "eval_strategy": "no", "use_cpu": False, "bf16": True, "tf32": True}
    assert train(recipe(world, tmp_path / "out", train=settings)).finished
    assert len([line for line in caplog.messages if "this PyTorch sees no GPU" in line]) == 1
    found = json.loads((tmp_path / "out" / "run.json").read_text())
    assert found["device"] == "cpu"
    assert found["instead_of_the_recipe"].keys() == {"train.bf16", "train.tf32"}
    assert load_recipe(tmp_path / "out" / "recipe.yaml").train.bf16, (
        "the recipe is kept as it was written"
    )


def test_no_epoch_at_all_writes_the_model_as_it_was_put_together(
    world: Path, tmp_path: Path
) -> None:
    untrained = recipe(
        world, tmp_path / "untrained", train={"num_train_epochs": 0, "max_steps": -1}
    )
    outcome = train(untrained)
    assert outcome.finished
    assert (outcome.steps, outcome.loss) == (0, None)
    model, _ = load(str(outcome.output_dir))
    published = load_file(world / "llm" / "model.safetensors")
    written = model.language_model.get_input_embeddings().weight
    assert torch.equal(
        written[: len(published["model.embed_tokens.weight"])],
        published["model.embed_tokens.weight"],
    )
    weights = (outcome.output_dir / "model.safetensors").stat()
    with pytest.raises(RecipeError, match=r"finished model \(config\.json, model\.safetensors\)"):
        train(untrained)
    assert (outcome.output_dir / "model.safetensors").stat() == weights
    assert train(untrained, resume=True).finished  # the way to replace it
    assert (outcome.output_dir / "model.safetensors").stat().st_ino != weights.st_ino
