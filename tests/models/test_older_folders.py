"""Model folders of an earlier medm, which did not know every field, and of a later one, which knows
more."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import medm.models
from medm.config import validate
from medm.errors import CheckpointError, DataError
from medm.models.lvlm.options import LVLMOptions
from medm.types import Media, Sample, Turn
from tests import tiny


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    section = tiny.lvlm_section(tiny.save_llm("smollm2", tmp_path / "llm"), family="smollm2")
    section["branches"]["image"]["connector"] = {
        "name": "moe",
        "route_by": "task",
        "num_experts": 2,
        "depth": 1,
    }
    section["tasks"] = ["vqa", "report"]
    model, processor = medm.models.build(validate(LVLMOptions, section, source="test"))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def logits(folder: Path) -> torch.Tensor:
    model, processor = medm.models.load(str(folder))
    sample = Sample((Turn("user", (Media("image"), "?")),), task="report")
    with torch.no_grad():
        batch = processor.pad(
            [
                processor.encode(
                    sample, {"image": [np.ones((3, 16, 16), np.float32)]}, generation=True
                )
            ]
        )
        return model(**batch).logits


def test_fields_that_have_a_default_may_be_missing(saved: Path) -> None:
    expected = logits(saved)

    def forget(config: dict[str, Any]) -> None:
        for key in ("adapters", "loss_on_full_logits", "llm"):
            del config[key]
        for part, kept in (
            ("encoder", {"name", "architecture"}),
            ("connector", {"name", "route_by", "num_experts", "depth", "tasks"}),
        ):
            entry = config["branches"]["image"][part]
            assert entry.keys() - kept
            config["branches"]["image"][part] = {key: entry[key] for key in kept}

    def unlearn(config: dict[str, Any]) -> None:
        del config["template_kwargs"], config["branches"]["image"]["known_tasks_only"]
        preprocess = config["branches"]["image"]["preprocess"]
        config["branches"]["image"]["preprocess"] = {
            key: preprocess[key] for key in ("kind", "size")
        }

    edit(saved, "config.json", forget)
    edit(saved, "processor_config.json", unlearn)
    assert torch.equal(logits(saved), expected)
    _, processor = medm.models.load(str(saved))
    with pytest.raises(DataError, match="expected one of vqa, report"):
        processor.encode(
            Sample((Turn("user", (Media("image"),)),), task="other"), {"image": [np.ones(1)]}
        )


@pytest.mark.parametrize("value", [True, False])
def test_the_older_name_of_a_field_is_read(
    saved: Path, value: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def rename(config: dict[str, Any]) -> None:
        del config["loss_on_full_logits"]
        config["full_logits"] = value

    edit(saved, "config.json", rename)
    with caplog.at_level(logging.WARNING, logger="medm"):
        model, processor = medm.models.load(str(saved))
    assert model.config.loss_on_full_logits is value
    assert not [line for line in caplog.messages if "no effect" in line]
    model.save_pretrained(saved.with_name("again"))
    processor.save_pretrained(saved.with_name("again"))
    written = json.loads((saved.with_name("again") / "config.json").read_text())
    assert written["loss_on_full_logits"] is value
    assert "full_logits" not in written
    assert medm.models.load(str(saved.with_name("again")))[0].config.loss_on_full_logits is value


@pytest.mark.parametrize(
    ("file", "place", "message"),
    [
        ("config.json", ("branches", "image"), "unknown key 'novel'"),
        (
            "config.json",
            ("branches", "image", "encoder"),
            r"encoder 'siglip' does not take .*'novel'.*a later medm",
        ),
        (
            "config.json",
            ("branches", "image", "connector"),
            r"connector 'moe' does not take .*'novel'.*a later medm",
        ),
        (
            "processor_config.json",
            ("branches", "image"),
            r"branches\.image: 1 problem.*\n.*unknown key 'novel'",
        ),
        ("processor_config.json", ("branches", "image", "preprocess"), "unknown key 'novel'"),
    ],
)
def test_a_part_that_says_more_than_is_known_is_refused(
    saved: Path, file: str, place: tuple[str, ...], message: str
) -> None:
    def add(config: dict[str, Any]) -> None:
        for key in place:
            config = config[key]
        config["novel"] = 1

    edit(saved, file, add)
    with pytest.raises(CheckpointError, match=message):
        medm.models.load(str(saved))


@pytest.mark.parametrize("field", ["encoder", "connector", "channels", "spatial", "placeholder_id"])
def test_what_a_branch_cannot_do_without_is_named(saved: Path, field: str) -> None:
    edit(saved, "config.json", lambda config: config["branches"]["image"].pop(field))
    with pytest.raises(CheckpointError, match=f"{field}: missing; this key is required"):
        medm.models.load(str(saved))


def test_other_fields_that_are_not_known_are_reported(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="medm"):
        medm.models.load(str(saved))
        assert not [line for line in caplog.messages if "no effect" in line]
        for file in ("config.json", "processor_config.json"):
            edit(saved, file, lambda config: config.update(novel=1))
        medm.models.load(str(saved))
    said = [line for line in caplog.messages if "novel is not known here and has no effect" in line]
    assert len(said) == 2
