"""Vision towers out of whole vision-language models, and out of medm's own, through the `path` of
an encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    Gemma3Config,
    InternVLConfig,
    LlavaConfig,
    LlavaNextConfig,
    Qwen2_5_VLConfig,
)

from medm.config import validate
from medm.errors import CheckpointError, RecipeError
from medm.models import build, load
from medm.models.export.export import export
from medm.models.lvlm.options import LVLMOptions
from medm.models.published import weights
from medm.models.vision import build_encoder, encoder_options
from tests.tiny import lvlm_section, save_llm

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP = VISION | {"model_type": "clip_vision_model"}
SIGLIP = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
INTERNVIT = VISION | {"image_size": [16, 16], "patch_size": [8, 8], "model_type": "internvl_vision"}
LLAMA, QWEN2 = TEXT | {"model_type": "llama"}, TEXT | {"model_type": "qwen2"}
GEMMA3 = TEXT | {"model_type": "gemma3_text", "head_dim": 16}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": 32,
}

VLMS: dict[str, Any] = {
    "medgemma": lambda: Gemma3Config(
        text_config=GEMMA3, vision_config=SIGLIP, mm_tokens_per_image=4
    ),
    "llava": lambda: LlavaConfig(text_config=LLAMA, vision_config=CLIP),
    "llava-next": lambda: LlavaNextConfig(text_config=LLAMA, vision_config=CLIP),
    "internvl": lambda: InternVLConfig(text_config=QWEN2, vision_config=INTERNVIT),
}
OWN_ENCODER = {"medgemma": "siglip", "llava": "clip", "llava-next": "clip"}
PIXELS = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def save_vlm(
    name: str,
    folder: Path,
    *,
    layout: str = "published",
    vision: Mapping[str, Any] | None = None,
) -> Any:
    """A tiny model of random weights in two shards, in the names of the published folders or of
    transformers 5. `vision` replaces sizes of its tower.
    """
    torch.manual_seed(0)
    config = VLMS[name]()
    for key, value in (vision or {}).items():
        setattr(config.vision_config, key, value)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder, max_shard_size="40KB")
    index = folder / "model.safetensors.index.json"
    assert index.is_file()
    if layout == "published" and name in OWN_ENCODER:
        _rename(folder, "vision_tower.", "vision_tower.vision_model.")
    elif layout == "saved by transformers 4.52":
        _rename(folder, "vision_tower.", "model.vision_tower.")
    return model


def _rename(folder: Path, old: str, new: str) -> None:
    """Another beginning of the tower's names, in every shard and in the index."""

    def renamed(name: str) -> str:
        return new + name.removeprefix(old) if name.startswith(old) else name

    for shard in folder.glob("*.safetensors"):
        tensors = {renamed(name): tensor for name, tensor in load_file(shard).items()}
        save_file(tensors, shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"] = {renamed(name): file for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content), encoding="utf-8")


class Reads:
    """Stands for `safe_open` and notes the tensors that are read."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        noted = self.names

        class Handle:
            def __enter__(self) -> Handle:
                self.inner = safe_open(*args, **keywords).__enter__()
                return self

            def __exit__(self, *reason: Any) -> None:
                self.inner.__exit__(*reason)

            def keys(self) -> Any:
                return self.inner.keys()

            def get_tensor(self, name: str) -> Any:
                noted.append(name)
                return self.inner.get_tensor(name)

        return Handle()


@torch.no_grad()
@pytest.mark.parametrize("layout", ["published", "transformers 5", "saved by transformers 4.52"])
@pytest.mark.parametrize("name", VLMS)
def test_a_recipe_takes_the_tower_of_a_whole_model(
    name: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_vlm(name, tmp_path, layout=layout)
    reads = Reads()
    monkeypatch.setattr(weights, "safe_open", reads)
    states = model.model.vision_tower(PIXELS, output_hidden_states=True).hidden_states
    front = 0 if name == "medgemma" else 1
    for block in ({"name": "hf-vision"}, {"name": OWN_ENCODER.get(name, "hf-vision")}):
        reads.names.clear()
        encoder, preprocess = build_encoder(
            encoder_options({**block, "path": str(tmp_path), "layer": -2}, source="test")
        )
        torch.testing.assert_close(
            encoder(PIXELS).tokens, states[-2][:, front:], atol=1e-6, rtol=1e-5
        )
        assert preprocess["size"] == [16, 16]
        # Of the LLM and the projector no tensor is read, and of the tower each once.
        assert reads.names and all("vision_tower." in read for read in reads.names)
        assert (
            len(reads.names) == len(set(reads.names)) == len(model.model.vision_tower.state_dict())
        )


def test_a_tower_of_another_family_is_named(tmp_path: Path) -> None:
    save_vlm("medgemma", tmp_path)
    with pytest.raises(
        RecipeError, match="gemma3 model with a vision tower of type 'siglip_vision_model'"
    ):
        build_encoder(encoder_options({"name": "clip", "path": str(tmp_path)}, source="test"))


@pytest.mark.parametrize("name", ["hf-vision", "clip", "siglip"])
def test_the_tower_of_lingshu_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    """Lingshu is Qwen2.5-VL: no grid of patches of one size comes out of its tower."""
    config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=QWEN_VISION)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    reason = (
        "packs patches of images of any size"
        if name == "hf-vision"
        else "qwen2_5_vl model with a vision tower"
    )
    with pytest.raises(RecipeError, match=reason):
        build_encoder(encoder_options({"name": name, "path": str(tmp_path)}, source="test"))


def test_a_model_without_a_tower_in_its_tensors_is_named(tmp_path: Path) -> None:
    save_vlm("llava", tmp_path)
    _rename(tmp_path, "vision_tower.", "tower_of_another_name.")
    with pytest.raises(
        CheckpointError, match=r"a llava model, none of whose \d+ tensors begins with"
    ):
        build_encoder(encoder_options({"name": "clip", "path": str(tmp_path)}, source="test"))


TOWERS: dict[str, dict[str, Any]] = {
    "dinov3_vit": {"num_register_tokens": 2},
    "dinov2": {"mlp_ratio": 2},
    "aimv2_vision_model": {},
    "vit": {},
    "internvl_vision": {"image_size": [16, 16], "patch_size": [8, 8]},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", TOWERS)
def test_an_lvlm_keeps_its_tower_and_gives_it_to_the_next_recipe(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower: Any = AutoModel.from_config(
        AutoConfig.for_model(kind, **{**VISION, **TOWERS[kind]})
    ).eval()
    tower.save_pretrained(tmp_path / "published")
    llm = save_llm("qwen2.5", tmp_path / "llm")
    section = lvlm_section(llm, encoder="hf-vision", path=str(tmp_path / "published"), layer=-2)
    section["branches"]["image"]["encoder"].pop("architecture")
    model, processor = build(validate(LVLMOptions, section, source="test"))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    again, _ = load(str(tmp_path / "model"))
    expected = model.eval().branch("image").encoder(PIXELS).tokens
    assert torch.equal(again.branch("image").encoder(PIXELS).tokens, expected)

    proof = export(str(tmp_path / "model"), str(tmp_path / "tower"), form="encoder")
    assert str(proof) == "the same features, bit for bit"
    block = {"name": "hf-vision", "path": str(tmp_path / "tower"), "layer": -2}
    encoder, preprocess = build_encoder(encoder_options(block, source="test"))
    assert torch.equal(encoder(PIXELS).tokens, expected)
    assert preprocess == processor.preprocess["image"].model_dump()


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_norm_and_pooled_vector_travel_with_an_exported_encoder(name: str, tmp_path: Path) -> None:
    llm = save_llm("qwen2.5", tmp_path / "llm")
    torch.manual_seed(0)
    section = lvlm_section(llm, encoder=name, norm="after", pooled=True)
    model, processor = build(validate(LVLMOptions, section, source="test"))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    export(str(tmp_path / "model"), str(tmp_path / "tower"), form="encoder")
    block = {"name": name, "path": str(tmp_path / "tower"), "norm": "after", "pooled": True}
    encoder, _ = build_encoder(encoder_options(block, source="test"))
    found, expected = encoder(PIXELS), model.eval().branch("image").encoder(PIXELS)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.pooled, expected.pooled, atol=1e-6, rtol=1e-5)
