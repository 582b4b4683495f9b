"""Every family through one encoder: transformers' own hidden states, norm and pooled vector, from
published folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, InternVLConfig, InternVLModel

from medm.encoders.clip import CLIPEncoder
from medm.encoders.hf_vision import HFVisionEncoder, pixel_shuffle
from medm.encoders.siglip import SiglipEncoder
from medm.errors import CheckpointError, RecipeError
from medm.models.vision import build_encoder, encoder_options

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "clip_vision_model": {},
    "siglip_vision_model": {},
    "siglip2_vision_model": {"num_patches": 4},
    "vit": {},
    "deit": {},
    "vit_msn": {},
    "ijepa": {},
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"mlp_ratio": 2},
    "dinov3_vit": {"num_register_tokens": 4},
    "aimv2_vision_model": {},
    "internvl_vision": {"image_size": [16, 16], "patch_size": [8, 8]},
}
PREFIX = {
    "clip_vision_model": 1,
    "vit": 1,
    "deit": 2,
    "vit_msn": 1,
    "dinov2": 1,
    "dinov2_with_registers": 5,
    "dinov3_vit": 5,
    "internvl_vision": 1,
}
WITHOUT_POOLED = {"vit_msn", "ijepa", "internvl_vision"}
NORM_FOR_POOLING = {"clip_vision_model"}
"""Families whose `last_hidden_state` is not behind the final norm."""


def published(kind: str, folder: Path) -> Any:
    """A tiny random tower, saved as it is published, all of its parameters random."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **FAMILIES[kind]})
    tower: Any = AutoModel.from_config(config).eval()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tower.save_pretrained(folder)
    return tower


def stock(tower: Any, pixels: torch.Tensor) -> Any:
    """transformers' own output."""
    if tower.config.model_type == "siglip2_vision_model":
        size = tower.config.patch_size
        grid = (pixels.shape[2] // size, pixels.shape[3] // size)
        # As its image processor makes patches: the channels fastest.
        patches = pixels.unfold(2, size, size).unfold(3, size, size)  # (B, C, rows, columns, h, w)
        patches = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        return tower(
            patches,
            pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long),
            spatial_shapes=torch.tensor([grid] * len(pixels)),
            output_hidden_states=True,
        )
    return tower(pixels, output_hidden_states=True)


def opened(folder: Path, **options: Any) -> HFVisionEncoder:
    block = {"name": "hf-vision", "path": str(folder), **options}
    encoder, _ = build_encoder(encoder_options(block, source="test"))
    assert isinstance(encoder, HFVisionEncoder)
    return encoder


PIXELS = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_layer_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    tower = published(kind, tmp_path)
    states, front = stock(tower, PIXELS).hidden_states, PREFIX.get(kind, 0)
    for layer, blocks in ((-1, 3), (-2, 2), (1, 1)):
        encoder = opened(tmp_path, layer=layer, tokens="prefix_patch")
        found = encoder(PIXELS)
        torch.testing.assert_close(found.tokens, states[blocks], atol=1e-6, rtol=1e-5)
        assert (found.prefix, found.grid) == (front, (2, 2))
        patches = opened(tmp_path, layer=layer)(PIXELS)
        torch.testing.assert_close(patches.tokens, states[blocks][:, front:], atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_norm_and_the_pooled_vector_are_those_of_transformers(
    kind: str, tmp_path: Path
) -> None:
    tower = published(kind, tmp_path)
    expected = stock(tower, PIXELS)
    normed = expected.last_hidden_state
    if kind in NORM_FOR_POOLING:
        normed = tower.post_layernorm(normed)
    after = opened(tmp_path, norm="after", tokens="prefix_patch")(PIXELS)
    torch.testing.assert_close(after.tokens, normed, atol=1e-6, rtol=1e-5)
    assert after.pooled is None
    if kind in WITHOUT_POOLED:
        # I-JEPA's class can be built with a pooler, which no published folder has.
        reason = r"missing: tower\.pooler" if kind == "ijepa" else f"{kind} has no pooled vector"
        with pytest.raises((RecipeError, CheckpointError), match=reason):
            opened(tmp_path, pooled=True)
        return
    for norm, tokens in (("before", expected.hidden_states[-1]), ("after", normed)):
        encoder = opened(tmp_path, norm=norm, tokens="prefix_patch", pooled=True)
        found = encoder(PIXELS)
        torch.testing.assert_close(found.pooled, expected.pooler_output, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found.tokens, tokens, atol=1e-6, rtol=1e-5)
        assert found.pooled.shape == (2, encoder.pooled_dim)


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "aimv2_vision_model"])
def test_another_size_gives_another_grid(kind: str, tmp_path: Path) -> None:
    tower, pixels = published(kind, tmp_path), torch.rand(1, 3, 32, 24)
    found = opened(tmp_path)(pixels)
    assert found.grid == (4, 3)
    asked = ("clip_vision_model", "siglip_vision_model", "vit", "deit", "vit_msn", "ijepa")
    more = {"interpolate_pos_encoding": True} if kind in asked else {}
    expected = (
        stock(tower, pixels) if not more else tower(pixels, output_hidden_states=True, **more)
    )
    torch.testing.assert_close(
        found.tokens, expected.hidden_states[-1][:, PREFIX.get(kind, 0) :], atol=1e-6, rtol=1e-5
    )


@torch.no_grad()
def test_native_aimv2_takes_any_grid() -> None:
    architecture = {**SIZES, "model_type": "aimv2_vision_model", "is_native": True}
    encoder, pixels = HFVisionEncoder(architecture=architecture).eval(), torch.rand(1, 3, 32, 24)
    found = encoder(pixels)
    assert found.grid == (4, 3)
    states = encoder.tower(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found.tokens, states[-1])


def test_a_tower_that_does_not_interpolate_says_so(tmp_path: Path) -> None:
    published("aimv2_vision_model", tmp_path)
    with pytest.raises(
        ValueError, match="does not interpolate the positions of aimv2_vision_model"
    ):
        opened(tmp_path).grid((32, 32))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dinov2_with_registers", "dinov3_vit", "clip_vision_model"])
def test_class_token_and_registers_are_told_apart(kind: str, tmp_path: Path) -> None:
    published(kind, tmp_path)
    everything = opened(tmp_path, tokens="prefix_patch")(PIXELS).tokens
    class_and_patches = opened(tmp_path, tokens="cls_patch")(PIXELS)
    assert class_and_patches.prefix == 1
    torch.testing.assert_close(class_and_patches.tokens[:, 0], everything[:, 0])
    torch.testing.assert_close(class_and_patches.tokens[:, 1:], everything[:, PREFIX[kind] :])
    class_alone = opened(tmp_path, tokens="cls")(PIXELS)
    torch.testing.assert_close(class_alone.tokens, everything[:, :1])
    assert (class_alone.prefix, class_alone.grid) == (1, (0,))


@torch.no_grad()
def test_pixel_shuffle_is_that_of_internvl(tmp_path: Path) -> None:
    text = {
        "model_type": "qwen2",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "vocab_size": 8,
    }
    vision = SIZES | FAMILIES["internvl_vision"]
    model = InternVLModel(InternVLConfig(text_config=text, vision_config=vision))
    cells = torch.rand(2, 4, 6, 24)
    expected = model.pixel_shuffle(cells, scale_factor=0.5)
    assert torch.equal(pixel_shuffle(cells.flatten(1, 2), rows=4, factor=2), expected.flatten(1, 2))
    published("internvl_vision", tmp_path)
    encoder = opened(tmp_path, pixel_shuffle=2)
    found = encoder(PIXELS)
    assert (encoder.dim, found.grid, found.tokens.shape) == (96, (1, 1), (2, 1, 96))
    with pytest.raises(ValueError, match=r"divides by pixel_shuffle 2, found \(24, 16\)"):
        encoder.grid((24, 16))
    with pytest.raises(RecipeError, match="pixel_shuffle 2 joins patches"):
        opened(tmp_path, pixel_shuffle=2, tokens="cls_patch")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 4}, "layers 1 to 3 and -3 to -1"),
        ({"layer": 0}, "layers 1 to 3 and -3 to -1"),
        ({"layer": -2, "norm": "after"}, "belong to the last of the 3 blocks"),
        ({"layer": -2, "pooled": True}, "belong to the last of the 3 blocks"),
    ],
)
def test_layers_that_do_not_exist_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    published("vit", tmp_path)
    with pytest.raises(RecipeError, match=message):
        opened(tmp_path, **options)


def test_a_tower_without_a_class_token_refuses_it(tmp_path: Path) -> None:
    published("siglip_vision_model", tmp_path)
    with pytest.raises(RecipeError, match="siglip_vision_model has no class token"):
        opened(tmp_path, tokens="cls")


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"model_type": "swin"}, "swin"),
        ({"model_type": "bert"}, "not a ViT of one grid"),
        ({"model_type": "nonsense"}, "no model of type 'nonsense'"),
        ({}, "with a model_type"),
    ],
)
def test_what_is_no_vit_is_refused_by_name(architecture: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        HFVisionEncoder(architecture=architecture)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen2_5_vl", "vision_config": {}}, "qwen2_5_vl: it packs patches"),
        ({"model_type": "internvl_chat", "vision_config": {}}, "name the encoder internvit"),
    ],
)
def test_towers_without_a_grid_are_refused_with_the_reason(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        HFVisionEncoder.architecture_from(config)


def test_a_missing_or_misshaped_tensor_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    published("dinov2", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    norm = tensors.pop("encoder.layer.0.norm1.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing: tower.encoder.layer.0.norm1.weight"):
        opened(tmp_path)
    save_file(
        tensors | {"encoder.layer.0.norm1.weight": norm[:5].clone()},
        file,
        metadata={"format": "pt"},
    )
    with pytest.raises(
        CheckpointError, match=r"of another shape: tower.encoder.layer.0.norm1.weight \(5,\)"
    ):
        opened(tmp_path)
    save_file(
        tensors | {"encoder.layer.0.norm1.weight": norm, "adapter.a": norm.clone()},
        file,
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointError, match=r"1 unexpected: tower.adapter.a"):
        opened(tmp_path)


PREPROCESSORS = {
    "rad-dino": (
        {
            "do_center_crop": True,
            "crop_size": {"height": 32, "width": 32},
            "size": {"shortest_edge": 32},
            "image_mean": [0.5307] * 3,
            "image_std": [0.2583] * 3,
            "resample": 3,
        },
        {
            "size": [32, 32],
            "fit": "crop",
            "mean": [0.5307] * 3,
            "std": [0.2583] * 3,
            "interpolation": "bicubic",
        },
    ),
    "siglip": (
        {
            "size": {"height": 24, "width": 24},
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "resample": 2,
        },
        {
            "size": [24, 24],
            "fit": "squash",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bilinear",
        },
    ),
    "without normalization": (
        {"size": {"height": 24, "width": 24}, "do_normalize": False},
        {"size": [24, 24], "fit": "squash", "mean": [0.0] * 3, "std": [1.0] * 3},
    ),
    "shortest edge": ({"size": {"shortest_edge": 24}}, {"size": [24, 24], "fit": "crop"}),
    "an old integer": ({"size": 24, "do_center_crop": False}, {"size": [24, 24], "fit": "squash"}),
    "nothing published": ({}, {"size": [16, 16], "fit": "crop", "mean": [0.485, 0.456, 0.406]}),
}


@pytest.mark.parametrize("case", PREPROCESSORS)
def test_preprocessing_is_the_published_one(case: str, tmp_path: Path) -> None:
    described, expected = PREPROCESSORS[case]
    published("dinov2", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(described), encoding="utf-8")
    options = encoder_options({"name": "hf-vision", "path": str(tmp_path)}, source="test")
    _, found = build_encoder(options)
    assert {key: found[key] for key in expected} == expected


def test_the_image_processor_of_a_processor_config_is_read(tmp_path: Path) -> None:
    published("dinov2", tmp_path)
    inside = {
        "image_processor": {"size": {"height": 24, "width": 24}},
        "processor_class": "GotOcr2",
    }
    (tmp_path / "processor_config.json").write_text(json.dumps(inside), encoding="utf-8")
    _, found = build_encoder(
        encoder_options({"name": "hf-vision", "path": str(tmp_path)}, source="test")
    )
    assert found["size"] == [24, 24]


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "encoder_class"), [("clip", CLIPEncoder), ("siglip", SiglipEncoder)]
)
def test_clip_and_siglip_give_the_same_as_hf_vision(
    kind: str, encoder_class: Any, tmp_path: Path
) -> None:
    tower = published(f"{kind}_vision_model", tmp_path)
    expected = stock(tower, PIXELS)
    for norm in ("before", "after"):
        block = {
            "name": kind,
            "path": str(tmp_path),
            "tokens": "cls_patch",
            "norm": norm,
            "pooled": True,
        }
        encoder, _ = build_encoder(encoder_options(block, source="test"))
        assert isinstance(encoder, encoder_class)
        found = encoder(PIXELS)
        torch.testing.assert_close(found.pooled, expected.pooler_output, atol=1e-6, rtol=1e-5)
        other = opened(tmp_path, tokens="prefix_patch", norm=norm)(PIXELS)
        torch.testing.assert_close(found.tokens, other.tokens, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("encoder_class", [CLIPEncoder, SiglipEncoder])
def test_names_and_parameters_are_unchanged_without_norm_and_pooling(encoder_class: Any) -> None:
    names = encoder_class(architecture=SIZES).state_dict().keys()
    assert not [name for name in names if "post_layernorm" in name or ".head." in name]
    with_norm = encoder_class(architecture=SIZES, norm="after").state_dict().keys()
    assert sorted(with_norm - names) == ["tower.post_layernorm.bias", "tower.post_layernorm.weight"]
