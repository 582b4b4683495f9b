"""A trained model is the start of one with other heads: what both have is loaded, and named."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medm.errors import CheckpointError
from tests.models.blip.tiny import knowledge, make, section
from tests.models.dual_encoder.tiny import TEXT, save_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a pretraining with all heads and a graph."""
    folder = tmp_path_factory.mktemp("pretraining")
    save_tokenizer(folder / "tokenizer")
    content = section(str(folder / "tokenizer"), knowledge=knowledge(folder)[:1])
    model, processor = make(content)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # no seed gives these
    for part in (model, processor):
        part.save_pretrained(folder / "trained")
    return folder


def finetuned(world: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """The state of a model that starts from the pretraining."""
    content = section(str(world / "tokenizer"), pretrained=str(world / "trained"), **changes)
    return make(content)[0].state_dict()


def same(state: dict[str, torch.Tensor], world: Path, beginning: str) -> set[bool]:
    held = load_file(world / "trained" / "model.safetensors")
    names = [name for name in state if name.startswith(beginning)]
    assert names, beginning
    return {name in held and torch.equal(state[name], held[name]) for name in names}


def test_towers_and_shared_heads_are_those_of_the_folder(
    world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"heads": ["lm", "labels"], "label_head": "linear", "labels": ["a", "b", "c"]}
    with caplog.at_level(logging.INFO, logger="medm"):
        state = finetuned(world, image={"views": 2, "fusion": "channels"}, **changes)
    assert not [name for name in state if name.startswith(("itm.", "knowledge.", "momentum."))]
    for beginning in ("image.encoder.", "image.norm.", "text.", "decoder."):
        assert same(state, world, beginning) == {True}, beginning
    assert same(state, world, "labels.") == {False}
    assert same(state, world, "image.join.") == {False}
    (line,) = [message for message in caplog.messages if "new weights" in message]
    assert (
        "new weights: image.join, labels; left out: image_projection, itm, knowledge.graph" in line
    )


def test_the_momentum_copy_starts_as_the_loaded_weights(world: Path) -> None:
    state = finetuned(world, heads=["itc", "itm"], labels=[])
    assert same(state, world, "itm.") == same(state, world, "image_projection.") == {True}
    copied = [name for name in state if name.startswith("momentum.image.")]
    assert copied
    for name in copied:
        assert torch.equal(state[name], state[name.removeprefix("momentum.")]), name


def test_knowledge_is_kept_where_the_recipe_names_it_and_new_where_the_folder_lacks_it(
    world: Path,
) -> None:
    state = finetuned(world, knowledge=knowledge(world))
    assert same(state, world, "knowledge.graph.") == {True}
    assert same(state, world, "knowledge.memory.fusion.") == {False}


def test_other_sizes_a_torn_head_and_other_folders_are_refused(world: Path) -> None:
    with pytest.raises(CheckpointError, match=r"of another shape: .*text\.embeddings"):
        finetuned(world, text={"architecture": TEXT | {"vocab_size": 90}})
    with pytest.raises(CheckpointError, match="expected a folder of the kind 'blip'"):
        make(section(str(world / "tokenizer"), pretrained=str(world / "tokenizer")))
    torn = world / "torn"
    torn.mkdir()
    (torn / "config.json").write_text((world / "trained" / "config.json").read_text())
    held = load_file(world / "trained" / "model.safetensors")
    del held["itm.bias"]
    save_file(held, torn / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: itm\.bias"):
        make(section(str(world / "tokenizer"), pretrained=str(torn)))
