"""ResNet and DenseNet as baselines of diagnosis: a recipe with labels alone steps, saves, opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModel, AutoProcessor

from medm.training.recipe import load_recipe
from medm.training.run import train
from tests.encoders.tiny import TINY_ENCODERS
from tests.models.dual_encoder.tiny import TEXT, save_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four labeled images without texts, and a tokenizer for the names of labels."""
    folder = tmp_path_factory.mktemp("studies")
    save_tokenizer(folder / "tokenizer")
    for index in range(4):
        noise = np.random.default_rng(index).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    records = [
        {"images": [f"{n}.png"], "labels": {"effusion": n % 2, "mass": None if n else 1}}
        for n in range(4)
    ]
    (folder / "train.json").write_text(json.dumps(records))
    return folder


@pytest.mark.parametrize("name", ["resnet", "densenet"])
def test_a_recipe_with_labels_alone_trains_and_opens(name: str, world: Path) -> None:
    content: dict[str, Any] = {
        "model": {
            "kind": "blip",
            "image": {"encoder": TINY_ENCODERS[name].block | {"image_size": 64}},
            "text": {"architecture": TEXT, "tokenizer": str(world / "tokenizer"), "max_length": 12},
            "heads": ["labels"],
            "labels": ["effusion", "mass"],
            "label_head": "linear",
        },
        "data": {"train": [{"path": str(world / "train.json"), "root": str(world)}]},
        "objective": {"terms": {"labels": {"objective": "multilabel"}}},
        "parts": {
            "image.encoder": {"tune": "full", "lr": 1e-2},
            "labels": {"tune": "full", "lr": 1e-2},
        },
        "train": {
            "use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 4,
            "gradient_checkpointing": True,
        },
        "output_dir": str(world / name),
    }  # fmt: skip
    file = world / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content))
    outcome = train(load_recipe(file))
    assert outcome.finished
    model = AutoModel.from_pretrained(world / name).eval()
    encoder = model.image.encoder
    norms = [one for one in encoder.modules() if hasattr(one, "running_mean")]
    assert norms
    assert all(not one.running_mean.any() for one in norms)  # statistics are not trained
    assert any((one.weight != 1).any() for one in norms)  # scales are
    processor = AutoProcessor.from_pretrained(world / name)
    pixels = processor(images=[str(world / "0.png")])["pixels"]
    with torch.no_grad():
        seen = model.encode_images(pixels)
        found = model(pixels=pixels).label_logits
        # A network without a class token gives the mean of its cells.
        torch.testing.assert_close(seen.vector, seen.tokens.mean(dim=1))
        torch.testing.assert_close(found, model.labels(seen.vector))
