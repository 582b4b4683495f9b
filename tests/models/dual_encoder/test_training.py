"""A recipe trains a dual encoder; what it saved opens, and a stopped run continues bit for bit."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from medm.data.options import SourceOptions
from medm.data.shard_writing import write_shards
from medm.data.shards import ShardFile
from medm.models import load
from medm.models.dual_encoder.modeling import MAX_LOG_SCALE, DualEncoder
from medm.training.recipe import Recipe, load_recipe
from medm.training.run import train
from tests.models.dual_encoder.tiny import save_tokenizer, section

CAPTIONS = ("a chest radiograph", "normal", "effusion of the left", "a mass of the brain")


def write_world(folder: Path) -> Path:
    """Eight pairs, each with two captions, and a tokenizer."""
    save_tokenizer(folder / "tokenizer")
    for index in range(8):
        noise = np.random.default_rng(index).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    records = [
        {"image": f"{n}.png", "captions": [CAPTIONS[n % 4], CAPTIONS[(n + 1) % 4]]}
        for n in range(8)
    ]
    (folder / "train.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("pairs"))


def recipe(world: Path, out: Path, *, steps: int = 4, **changes: Any) -> Recipe:
    content: dict[str, Any] = {
        "model": section(
            str(world / "tokenizer"), logit_scale=99.0, chunk=2, image={"patch_dropout": 0.5}
        ),
        "data": {"train": [{"path": str(world / "train.json"), "root": str(world)}]},
        "objective": {"name": "contrastive"},
        "parts": {
            "image.encoder": {"tune": "full", "lr": 1e-3},
            "image.projection": {"tune": "full"},
            "text.encoder": {"tune": "lora", "r": 2},
            "text.projection": {"tune": "full"},
            "scale": {"tune": "full", "lr": 0.5},
        },
        "train": {
            "use_cpu": True, "max_steps": steps, "per_device_train_batch_size": 4,
            "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3,
        },
        "output_dir": str(out),
    }  # fmt: skip
    for key, value in changes.items():
        content[key] = content[key] | value
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(content))
    return load_recipe(file)


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    outcome = train(recipe(world, world / "trained"))
    assert outcome.finished
    assert outcome.steps == 4
    assert outcome.loss is not None
    assert math.isfinite(outcome.loss)
    return world / "trained"


def test_a_trained_folder_opens_without_a_warning(
    trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trainer sets `use_cache` of the config, which a dual encoder does not have."""
    caplog.set_level("WARNING", logger="medm")
    load(str(trained))
    assert not [record.getMessage() for record in caplog.records]


def test_a_trained_model_opens_by_auto_classes(world: Path, trained: Path) -> None:
    model = AutoModel.from_pretrained(trained).eval()
    assert isinstance(model, DualEncoder)
    processor = AutoProcessor.from_pretrained(trained)
    inputs = processor(["normal", "a mass"], images=[str(world / f"{n}.png") for n in range(2)])
    with torch.no_grad():
        output = model(**inputs)
    assert output.image_embeds.shape == output.text_embeds.shape == (2, 20)
    assert model.scale.logit_scale.item() <= MAX_LOG_SCALE
    assert model.config.adapters == {} or "text.encoder" in model.config.adapters


def test_every_part_is_trained_and_the_scale_is_held(trained: Path) -> None:
    first = load_file(next(trained.glob("checkpoint-2/*.safetensors")))
    last = load_file(next(trained.glob("checkpoint-4/*.safetensors")))
    parts = ("image.encoder", "image.readout.projection", "text.projection", "lora_B")
    for part in parts:
        assert any(not torch.equal(first[k], last[k]) for k in first if part in k), part
    assert all(0 <= one["scale.logit_scale"] <= MAX_LOG_SCALE + 1e-6 for one in (first, last))


def test_a_stopped_run_continues_bit_for_bit(world: Path, trained: Path) -> None:
    out = world / "resumed"
    content = yaml.safe_load((world / "trained.yaml").read_text()) | {"output_dir": str(out)}
    (world / "resumed.yaml").write_text(yaml.safe_dump(content))
    given = load_recipe(world / "resumed.yaml")
    assert train(given).finished
    for path in [*out.glob("*.safetensors"), out / "config.json"]:
        path.unlink()
    shutil.rmtree(out / "checkpoint-4")
    outcome = train(given, resume=True)
    assert outcome.steps == 4
    for file in trained.glob("*.safetensors"):
        expected, found = load_file(file), load_file(out / file.name)
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_a_run_killed_in_the_middle_of_a_shard_continues_bit_for_bit(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten pairs in shards of 3, 3, 3 and 1; batches of 4 end inside of them, and captions are
    drawn."""
    monkeypatch.setattr("medm.data.sampling.OPEN_SHARDS", 1)
    lines = [
        {"image": f"{n % 8}.png", "captions": [CAPTIONS[(n + k) % 4] for k in range(3)]}
        for n in range(10)
    ]
    (world / "ten.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    manifest = world / "shards" / "ten.shards.json"
    source = {"path": str(world / "ten.jsonl"), "root": str(world)}
    write_shards(manifest, [SourceOptions.model_validate(source)], samples=3)
    data = {"train": [{"path": str(manifest)}]}
    whole, killed = (world / name for name in ("whole", "killed"))
    given = recipe(world, whole, steps=6, data=data)
    workers = given.train.model_copy(update={"dataloader_num_workers": 1})
    assert train(given.model_copy(update={"train": workers})).finished

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    opened: list[int] = []
    open_media = ShardFile.open_media

    def until(file: ShardFile, index: int, name: str) -> Any:
        opened.append(index)
        return kill() if len(opened) > 28 else open_media(file, index, name)  # 10 by the check

    given = recipe(world, killed, steps=6, data=data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardFile, "open_media", until)
        with pytest.raises(KeyboardInterrupt):
            train(given)
    assert sorted(path.name for path in killed.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    shutil.rmtree(killed / "checkpoint-4")  # 8 of 10 pairs: inside of a shard
    assert train(given, resume=True).steps == 6
    for file in whole.glob("*.safetensors"):
        expected, found = load_file(file), load_file(killed / file.name)
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_another_run_begins_with_the_trained_model(world: Path, trained: Path) -> None:
    model = section(str(world / "tokenizer"), text={"max_length": 6})
    content = {
        **yaml.safe_load((world / "trained.yaml").read_text()),
        "model": model,
        "init_from": str(trained),
        "output_dir": str(world / "second"),
        "parts": {"text.projection": {"tune": "full"}, "scale": {"tune": "full"}},
    }
    (world / "second.yaml").write_text(yaml.safe_dump(content))
    assert train(load_recipe(world / "second.yaml")).finished
    before = load_file(next(trained.glob("*.safetensors")))
    after = load_file(next((world / "second").glob("*.safetensors")))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert {name.split(".")[0] for name in moved} <= {"text", "scale"}
    assert all(name.startswith(("text.projection", "scale")) for name in moved)
    assert AutoProcessor.from_pretrained(world / "second").max_length == 6


def test_equal_captions_of_a_batch_are_counted_as_the_recipe_says(world: Path) -> None:
    """Four pairs of two captions: at least two of each batch are equal."""
    records = [{"image": f"{n}.png", "caption": CAPTIONS[n % 2]} for n in range(8)]
    (world / "two.json").write_text(json.dumps(records))
    source = {"train": [{"path": str(world / "two.json"), "root": str(world)}]}
    found = {}
    for mode in ("negative", "ignore", "positive"):
        given = recipe(world, world / mode, steps=1, data=source, objective={"same_label": mode})
        found[mode] = train(given).loss
    assert found["negative"] is not None and found["ignore"] is not None
    assert found["ignore"] < found["negative"] - 0.3
    assert found["positive"] not in (found["ignore"], found["negative"])
