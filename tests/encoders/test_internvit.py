"""InternViT in both published layouts, against transformers, up to the tokens of the LLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration

from medm.connectors.pixel_shuffle import PixelShuffleConnector
from medm.encoders.internvit import InternViTEncoder, stock_names
from medm.errors import CheckpointError, RecipeError
from medm.models.published.weights import load_module
from medm.models.vision import build_encoder, encoder_options
from tests.encoders.internvit import original_config, original_projector, original_tower

TEXT = {
    "model_type": "qwen2", "hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32,
}  # fmt: skip
PIXELS = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 4 - 2


def stock_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    vision = InternViTEncoder.architecture_from(original_config(**changes))
    config = InternVLConfig(text_config=TEXT, vision_config=vision, image_token_id=31)
    model = InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():  # fresh biases, scales and positions are constants
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tower_of(model: Any) -> dict[str, Tensor]:
    return dict(model.model.vision_tower.state_dict())


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_normalization": True, "norm_type": "rms_norm", "qkv_bias": False}],
    ids=["300M", "6B"],
)
@pytest.mark.parametrize("layout", ["tower", "whole", "hf"])
def test_features_and_projected_tokens_are_those_of_transformers(
    changes: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    model, config = stock_model(**changes), original_config(**changes)
    tower, projector = tower_of(model), model.model.multi_modal_projector.state_dict()
    if layout == "tower":
        write(tmp_path, config, original_tower(tower))
    elif layout == "whole":
        names = {f"vision_model.{name}": tensor for name, tensor in original_tower(tower).items()}
        whole = {"model_type": "internvl_chat", "vision_config": config, "llm_config": TEXT}
        others = {"language_model.lm_head.weight": torch.zeros(2, 2)}
        write(tmp_path, whole, {**names, **original_projector(projector), **others})
    else:
        model.save_pretrained(tmp_path)
    block = {"name": "internvit", "path": str(tmp_path)}
    encoder, preprocess = build_encoder(encoder_options(block, source="test"))
    assert preprocess["size"] == [16, 16] and preprocess["mean"] == [0.485, 0.456, 0.406]
    seen = encoder(PIXELS)
    expected = model.model.vision_tower(pixel_values=PIXELS).last_hidden_state
    torch.testing.assert_close(seen.tokens, expected[:, 1:], atol=1e-5, rtol=1e-5)
    assert seen.grid == (4, 4)

    connector = PixelShuffleConnector(in_dim=24, out_dim=20, grid=seen.grid)
    original = original_projector(projector)
    for published in (original, {f"multi_modal_projector.{k}": v for k, v in projector.items()}):
        report = load_module(
            connector, published, source="test", key_map=PixelShuffleConnector.key_map
        )
        assert sorted(report.loaded) == sorted(published)
        found = connector(seen)
        image = model.get_image_features(PIXELS, vision_feature_layer=-1)
        image = getattr(image, "pooler_output", image)
        torch.testing.assert_close(found, image.reshape(found.shape), atol=1e-5, rtol=1e-5)


def test_the_fused_projection_is_cut_by_rows_and_keeps_its_name() -> None:
    fused = torch.arange(18.0).reshape(9, 2)
    renamed, published = stock_names({"encoder.layers.3.attn.qkv.weight": fused})
    front = "encoder.layer.3.attention."
    assert renamed[f"{front}q_proj.weight"].tolist() == fused[:3].tolist()
    assert renamed[f"{front}k_proj.weight"].tolist() == fused[3:6].tolist()
    assert renamed[f"{front}v_proj.weight"].tolist() == fused[6:].tolist()
    assert set(published.values()) == {"encoder.layers.3.attn.qkv.weight"}


def test_a_missing_or_unknown_tensor_stops_the_load(tmp_path: Path) -> None:
    tensors = original_tower(tower_of(stock_model()))
    block = {"name": "internvit", "path": str(tmp_path)}
    for change, message in (
        ({"encoder.layers.1.ls1": None}, "1 missing: .*lambda_1"),
        ({"embeddings.extra": torch.ones(24)}, "1 unexpected: .*embeddings.extra"),
    ):
        changed = {**tensors, **change}
        write(tmp_path, original_config(), {k: v for k, v in changed.items() if v is not None})
        with pytest.raises(CheckpointError, match=message):
            build_encoder(encoder_options(block, source="test"))


def test_earlier_layers_and_a_class_token(tmp_path: Path) -> None:
    model = stock_model()
    write(tmp_path, original_config(), original_tower(tower_of(model)))
    block = {"name": "internvit", "path": str(tmp_path), "layer": -2, "tokens": "cls_patch"}
    encoder, _ = build_encoder(encoder_options(block, source="test"))
    with torch.no_grad():
        states = model.model.vision_tower(pixel_values=PIXELS, output_hidden_states=True)
        torch.testing.assert_close(
            encoder(PIXELS).tokens, states.hidden_states[-2], atol=1e-5, rtol=1e-5
        )


def test_sizes_without_a_config_and_of_another_tower() -> None:
    sizes = InternViTEncoder.architecture_from({})
    with torch.device("meta"):
        encoder = InternViTEncoder(architecture=sizes)
    assert sum(p.numel() for p in encoder.parameters()) == 304_012_288
    assert (encoder.dim, encoder.grid((448, 448))) == (1024, (32, 32))
    assert InternViTEncoder.architecture_from({"model_type": "intern_vit_6b"})["use_qk_norm"]
    with pytest.raises(RecipeError, match=r"found 'dinov2'\. Other towers: hf-vision"):
        InternViTEncoder.architecture_from({"model_type": "dinov2"})
    crop = {"do_center_crop": True, "crop_size": 448, "size": 448, "resample": 3}
    fields = InternViTEncoder.preprocess_from(crop, sizes)
    assert (fields["fit"], fields["size"], fields["interpolation"]) == (
        "squash", [448, 448], "bicubic",
    )  # fmt: skip
