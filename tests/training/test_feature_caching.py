"""A frozen encoder runs once a file, and training does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import medm.models
from medm.config import validate
from medm.encoders.siglip import SiglipEncoder
from medm.errors import DataError, RecipeError
from medm.models.lvlm.options import LVLMOptions
from medm.training.feature_caching import encoder_fingerprint
from medm.training.recipe import Recipe
from medm.training.run import train
from tests import tiny


def recipe(folder: Path, **changes: Any) -> Recipe:
    images = folder / "images"
    if not images.exists():
        tiny.save_llm("smollm2", folder / "llm")
        images.mkdir()
        records = []
        for i in range(6):
            Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)).save(images / f"{i}.png")
            turns = [
                {"from": "human", "value": "<image>\nBright?"},
                {"from": "gpt", "value": "Yes." if i > 2 else "No."},
            ]
            records.append({"id": i, "image": f"{i}.png", "conversations": turns})
        records.append(
            {
                "id": "text",
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
            }
        )
        (folder / "train.json").write_text(json.dumps(records))
    section = {
        "model": tiny.lvlm_section(folder / "llm", family="smollm2"),
        "data": {
            "train": [{"path": str(folder / "train.json"), "root": str(images)}],
            **changes.pop("data", {}),
        },
        "parts": {"image.connector": {"tune": "full", "lr": 1e-2}},
        "train": {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 2,
            "save_strategy": "no",
            "use_cpu": True,
        },
        **changes,
    }
    return validate(Recipe, section, source="test")


def test_on_and_off_give_the_same_weights_and_the_encoder_runs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = SiglipEncoder.forward

    def counting(self: SiglipEncoder, pixels: torch.Tensor) -> Any:
        seen.append(len(pixels))
        return original(self, pixels)

    monkeypatch.setattr(SiglipEncoder, "forward", counting)
    train(recipe(tmp_path, output_dir=str(tmp_path / "off")))
    assert sum(seen) >= 12
    seen.clear()
    data = {"cache_features": str(tmp_path / "cache")}
    train(recipe(tmp_path, output_dir=str(tmp_path / "on"), data=data))
    assert seen == [6], "every file once, in one batch, and never again"
    off, on = (load_file(tmp_path / name / "model.safetensors") for name in ("off", "on"))
    assert off.keys() == on.keys()
    assert all(torch.allclose(off[name], on[name], atol=1e-6) for name in off)
    seen.clear()
    train(recipe(tmp_path, output_dir=str(tmp_path / "again"), data=data))
    assert not seen, "a second run finds what the first kept"


def test_a_bad_file_stops_the_run_or_leaves_its_records_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = {"cache_features": str(tmp_path / "cache")}
    first = recipe(tmp_path, output_dir=str(tmp_path / "out"), data=data)
    damaged = tmp_path / "images" / "2.png"
    Image.effect_noise((16, 16), 90).save(damaged)
    content = damaged.read_bytes()
    damaged.write_bytes(
        content[:80] + bytes(60) + content[140:]
    )  # the check looks at the beginning and the end
    with pytest.raises(
        DataError,
        match=r"features of image: 1 of 6 files cannot be read; the first: .*2\.png.*skip",
    ):
        train(first)
    (tmp_path / "images" / "4.png").unlink()
    (tmp_path / "images" / "5.png").write_bytes(
        damaged.read_bytes()
    )  # the same content, so read once
    data |= {"bad_records": "skip", "bad_records_limit": None}
    outcome = train(recipe(tmp_path, output_dir=str(tmp_path / "out"), data=data))
    assert outcome.finished
    said = [line for line in caplog.messages if line.startswith("no features of image")]
    assert len(said) == 1
    assert "2.png: the image is truncated or damaged" in said[0]
    left_out = [line for line in caplog.messages if line.startswith("left out")]
    assert len(left_out) == 2, (
        "once a run, not once an epoch; the check left out the one whose file is missing"
    )
    assert all(
        "train.json, record 2, field 'image'" in line or "record 5" in line for line in left_out
    )
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["records"]["left_out_by_check"] == 1
    assert run["records"]["bad"] == 2
    with pytest.raises(
        DataError, match=r"3 of 7 training records are bad \(42\.9%\), more than .*_limit = 0\.4"
    ):
        train(
            recipe(
                tmp_path, output_dir=str(tmp_path / "other"), data=data | {"bad_records_limit": 0.4}
            )
        )


def test_other_weights_are_another_encoder() -> None:
    encoders = [SiglipEncoder(architecture=tiny.VIT) for _ in range(2)]
    names = [encoder_fingerprint(encoder) for encoder in encoders]
    encoders[1].load_state_dict(encoders[0].state_dict())
    assert names[0] != names[1]
    assert encoder_fingerprint(encoders[1]) == names[0]
    assert encoder_fingerprint(encoders[1].half()) != names[0]


def test_a_stage_finds_the_features_of_the_stage_that_it_starts_from(tmp_path: Path) -> None:
    """An encoder that was opened from a saved model is the one that was built from its published
    weights."""
    section = tiny.lvlm_section(tiny.save_llm("smollm2", tmp_path / "llm"), family="smollm2")
    built, processor = medm.models.build(validate(LVLMOptions, section, source="test"))
    built.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    opened, _ = medm.models.load(str(tmp_path / "model"))
    first, second = (model.branch("image").encoder for model in (built, opened))
    assert encoder_fingerprint(first) == encoder_fingerprint(second)


def test_augmentation_and_kept_features_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cached features cannot be augmented"):
        recipe(
            tmp_path,
            output_dir="x",
            data={"cache_features": "c", "augment": {"image": {"rotate": 5.0}}},
        )
