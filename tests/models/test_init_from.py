"""A stage that starts from another one: what its recipe writes holds, what it does not write stays
as it was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import medm.models
from medm.config import validate
from medm.errors import RecipeError
from medm.llms.base import read_template
from medm.models.lvlm.options import LVLMOptions
from tests import tiny
from tests.encoders.tiny import TINY_ENCODERS, VIT

M3D: dict[str, Any] = {
    "encoder": TINY_ENCODERS["m3d-clip"].block,
    "connector": {"name": "spatial-pooling"},
    "preprocess": {"convention": "m3d"},
}
SLICES: dict[str, Any] = {
    "encoder": TINY_ENCODERS["slices"].block,
    "connector": {"name": "attention-pooling", "heads": 2},
    "preprocess": {"size": [3, 16, 16]},
}


def options(llm: Path, volume: dict[str, Any], **llm_options: Any) -> LVLMOptions:
    section = {
        "llm": {"name": "llama-3.2", "path": str(llm), **llm_options},
        "branches": {"volume": volume},
    }
    return validate(LVLMOptions, section, source="test")


def saved(llm: Path, folder: Path, volume: dict[str, Any], **llm_options: Any) -> str:
    model, processor = medm.models.build(options(llm, volume, **llm_options))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_the_second_stage_speaks_and_sees_as_its_recipe_says(
    llms: dict[str, Path], tmp_path: Path
) -> None:
    llm = llms["llama-3.2"]
    first = saved(llm, tmp_path, M3D, chat_template="plain")
    volume = M3D | {"preprocess": {"convention": "medm-vl", "orientation": "LPS"}}
    model, processor = medm.models.build(
        options(llm, volume, chat_template="vicuna"), init_from=first
    )
    assert processor.chat_template == read_template("vicuna")
    seen = processor.preprocess["volume"]
    assert (seen.convention, seen.scale, seen.windows) == ("medm-vl", "hu", [[-1000.0, 1000.0]])
    assert (seen.orientation, seen.size) == ("LPS", [8, 16, 16])
    # The processor alone is adapted in the same way.
    alone = medm.models.processor_of(options(llm, volume, chat_template="vicuna"), init_from=first)
    assert (alone.chat_template, alone.preprocess) == (
        processor.chat_template,
        processor.preprocess,
    )
    # The same as a build from the published parts with this recipe.
    fresh = medm.models.build(options(llm, volume, chat_template="vicuna"))[1]
    assert seen == fresh.preprocess["volume"]
    assert (
        model.generation_config.eos_token_id
        == medm.models.load(first)[0].generation_config.eos_token_id
    )
    model.save_pretrained(tmp_path / "second")
    processor.save_pretrained(tmp_path / "second")
    again = medm.models.load(str(tmp_path / "second"))[1]
    assert (again.chat_template, again.preprocess) == (
        processor.chat_template,
        processor.preprocess,
    )


def test_what_a_recipe_does_not_write_stays(llms: dict[str, Path], tmp_path: Path) -> None:
    first = saved(llms["llama-3.2"], tmp_path, M3D, chat_template="plain")
    _, processor = medm.models.build(
        options(llms["llama-3.2"], M3D | {"preprocess": {}}), init_from=first
    )
    assert processor.chat_template == read_template("plain")
    assert processor.preprocess["volume"].convention == "m3d"


def test_a_reply_may_also_end_where_the_new_template_ends_it(
    llms: dict[str, Path], tmp_path: Path
) -> None:
    llm = llms["phi3"]
    section = {
        "llm": {"name": "phi3", "path": str(llm), "chat_template": "vicuna"},
        "branches": {"volume": M3D},
    }
    model, processor = medm.models.build(validate(LVLMOptions, section, source="test"))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    native = tmp_path / "native.jinja"
    native.write_text(tiny.PHI3)
    section["llm"]["chat_template"] = str(native)
    model, processor = medm.models.build(
        validate(LVLMOptions, section, source="test"), init_from=str(tmp_path)
    )
    end = processor.tokenizer.convert_tokens_to_ids("<|end|>")
    assert processor.chat.end_of_reply() == end
    assert end in model.generation_config.eos_token_id


def test_a_size_that_the_model_was_not_built_for_is_refused(
    llms: dict[str, Path], tmp_path: Path
) -> None:
    first = saved(llms["llama-3.2"], tmp_path, M3D)
    with pytest.raises(
        RecipeError, match=r"volume\.preprocess\.size: \[8, 32, 32\].*takes \[8, 16, 16\]"
    ):
        medm.models.build(
            options(llms["llama-3.2"], M3D | {"preprocess": {"size": [8, 32, 32]}}), init_from=first
        )


def test_an_encoder_around_another_one_is_compared_by_what_is_inside(
    llms: dict[str, Path], tmp_path: Path
) -> None:
    llm = llms["llama-3.2"]
    first = saved(llm, tmp_path, SLICES)
    # The second stage names published weights, which the first one's folder replaces.
    inner = {
        "name": "siglip",
        "path": "somewhere/siglip",
        "architecture": VIT | {"image_size": 16, "patch_size": 8},
    }
    model, _ = medm.models.build(
        options(llm, SLICES | {"encoder": {"name": "slices", "encoder": inner}}), init_from=first
    )
    weights = medm.models.load(first)[0].state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(RecipeError, match=r"volume\.encoder\.encoder\.layer -1, not -2"):
        medm.models.build(
            options(
                llm, SLICES | {"encoder": {"name": "slices", "encoder": inner | {"layer": -2}}}
            ),
            init_from=first,
        )


@pytest.mark.parametrize("encoder", ["slices", "i3d-resnet"])
def test_a_convention_replaces_what_an_encoder_was_published_with(
    llms: dict[str, Path], encoder: str
) -> None:
    volume = {
        "encoder": TINY_ENCODERS[encoder].block,
        "connector": {"name": "linear"},
        "preprocess": {"convention": "m3d", "size": [4, 16, 16]},
    }
    seen = medm.models.build(options(llms["llama-3.2"], volume))[1].preprocess["volume"]
    assert (seen.scale, seen.windows, seen.stretch) == ("0-1", None, True)
    own = {"slices": [0.5], "i3d-resnet": "SRA"}[encoder]  # what belongs to the encoder stays
    assert own in (seen.mean, seen.orientation)
