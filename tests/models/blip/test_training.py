"""A recipe trains the kind `blip`; a killed run continues bit for bit, and the folder opens."""

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

from medm.data.check import check
from medm.data.options import SourceOptions
from medm.data.studies import Studies
from medm.errors import RecipeError
from medm.models.blip.modeling import MedmBlip
from medm.training.recipe import Recipe, load_recipe
from medm.training.run import train
from tests.models.blip.tiny import knowledge, make, section
from tests.models.dual_encoder.tiny import save_tokenizer

REPORTS = ("a chest radiograph", "normal", "effusion of the left", "a mass of the brain")


def write_world(folder: Path) -> Path:
    """Eight studies of one or two images, half of them with labels, and a tokenizer."""
    save_tokenizer(folder / "tokenizer")
    for index in range(8):
        noise = np.random.default_rng(index).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    records = [
        {
            "images": [f"{n}.png", f"{(n + 1) % 8}.png"][: 1 + n % 2],
            "report": REPORTS[n % 4],
            "triplets": [["mass", "of", "brain"]] if n % 4 == 3 else [],
            "labels": {"effusion": int(n % 4 == 2), "mass": None if n % 2 else 0},
        }
        for n in range(8)
    ]
    (folder / "train.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("studies"))


def recipe(world: Path, out: Path, **changes: Any) -> Recipe:
    terms = {"itc": "itc", "itm": "itm", "text": "language-modeling", "labels": "multilabel"}
    content: dict[str, Any] = {
        "model": section(
            str(world / "tokenizer"), alpha_steps=3, knowledge=knowledge(world)
        ),
        "data": {"train": [{"path": str(world / "train.json"), "root": str(world)}]},
        "objective": {"terms": {name: {"objective": one} for name, one in terms.items()}},
        "parts": {
            part: {"tune": "full", "lr": 1e-3}
            for part in (
                "image.encoder", "image.projection", "text.encoder", "text.projection",
                "text.decoder", "itm", "temperature", "knowledge",
            )
        },
        "train": {
            "use_cpu": True, "max_steps": 4, "per_device_train_batch_size": 4,
            "save_steps": 2, "logging_steps": 1,
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
    assert outcome.loss is not None
    assert math.isfinite(outcome.loss)
    return world / "trained"


def test_the_check_reads_the_records_with_the_processor(world: Path) -> None:
    processor = make(section(str(world / "tokenizer")))[1]
    source = SourceOptions(path=str(world / "train.json"), root=str(world))
    report = check([source], Studies(processor), preview=True)
    assert (report.num_bad, report.records) == (0, 8)
    assert "".join(segment.text for segment in report.preview).startswith("[CLS]")


def test_checkpoints_hold_the_training_state_and_the_final_folder_does_not(trained: Path) -> None:
    tensors = load_file(next(trained.glob("checkpoint-4/*.safetensors")))
    assert tensors["queue.filled"].item() == 6
    assert tensors["queue.next"].item() == 4  # 16 studies through 6 places
    assert tensors["steps"].item() == tensors["batches"].item() == 4
    assert tensors["knowledge.memory.source.filled"].item() == 4
    assert "momentum.graph.source.global_node" in tensors
    weight = "text_projection.weight"
    assert not torch.equal(tensors[f"momentum.{weight}"], tensors[weight])
    final = load_file(trained / "model.safetensors")
    names = {name.partition(".")[0] for name in final}
    assert not names & {"momentum", "queue", "steps", "batches"}
    assert not [name for name in final if name.startswith("knowledge.memory.source.")]
    assert "knowledge.graph.source.global_node" in final
    first = load_file(next(trained.glob("checkpoint-2/*.safetensors")))
    for part in (
        "image.encoder",
        "crossattention",
        "decoder.attention",
        "itm",
        "temperature",
        "knowledge",
    ):
        assert any(not torch.equal(first[k], final[k]) for k in final if part in k), part


def test_a_killed_run_continues_bit_for_bit(world: Path, trained: Path) -> None:
    """Queue, momentum copy, memory and the draws of negatives are those of the run in one piece."""
    out = world / "resumed"
    content = yaml.safe_load((world / "trained.yaml").read_text()) | {"output_dir": str(out)}
    (world / "resumed.yaml").write_text(yaml.safe_dump(content))
    given = load_recipe(world / "resumed.yaml")
    assert train(given).finished
    for path in [*out.glob("*.safetensors"), out / "config.json"]:
        path.unlink()
    shutil.rmtree(out / "checkpoint-4")
    assert train(given, resume=True).steps == 4
    for name in ("model.safetensors", "checkpoint-4/model.safetensors"):
        expected, found = load_file(trained / name), load_file(out / name)
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_a_trained_model_opens_by_auto_classes_and_writes(world: Path, trained: Path) -> None:
    model = AutoModel.from_pretrained(trained).eval()
    assert isinstance(model, MedmBlip)
    for slow, fast in model._pairs():
        torch.testing.assert_close(slow, fast)
    processor = AutoProcessor.from_pretrained(trained)
    memory = model._memory()
    assert memory is not None
    assert not any(bool(buffer.clamp(min=0).any()) for buffer in memory.buffers())
    assert processor.labels == ["effusion", "mass"]
    inputs = processor(["normal", "a mass"], images=[str(world / f"{n}.png") for n in range(2)])
    with torch.no_grad():
        output = model(**inputs, outputs=frozenset({"label_logits", "itc_logits_image"}))
        texts = model.generate(inputs["pixels"], num_beams=2, max_length=8)
    assert output.label_logits.shape == output.itc_logits_image.shape == (2, 2)
    assert output.loss_sum is None
    assert texts.shape[0] == 2
    assert isinstance(processor.decode(texts[0]), str)


def test_cached_features_give_the_weights_of_a_frozen_encoder_that_runs(world: Path) -> None:
    """Image and momentum copy read the same features; the encoder runs once a file."""
    trained = {}
    parts = {"image.encoder": {"tune": "frozen"}}
    for name, data in (("pixels", {}), ("cached", {"cache_features": str(world / "features")})):
        given = recipe(world, world / name, data=data, parts=parts)
        assert train(given).steps == 4
        trained[name] = load_file(world / name / "checkpoint-4" / "model.safetensors")
    pixels, cached = trained["pixels"], trained["cached"]
    assert pixels.keys() == cached.keys()
    for name in pixels:
        torch.testing.assert_close(cached[name], pixels[name], atol=1e-6, rtol=1e-5, msg=name)
    frozen = make(section(str(world / "tokenizer"), knowledge=knowledge(world)))[0]
    assert frozen.encoders()["image"].num_tokens == 5


def test_zero3_is_refused_with_the_reason(world: Path) -> None:
    with pytest.raises(RecipeError, match="its momentum copy is a mean of whole weights"):
        train(recipe(world, world / "zero3", train={"deepspeed": "zero3"}))
