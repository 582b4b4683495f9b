"""A tower that stops at the chosen layer: the published tower's states there, and no block behind
it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from medm.encoders.clip import CLIPEncoder
from medm.encoders.siglip import SiglipEncoder

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.mark.parametrize(("layer", "blocks"), [(-1, 4), (-2, 3), (1, 1)])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_blocks_behind_the_layer_are_not_built_and_the_tokens_are_the_whole_towers(
    kind: str, layer: int, blocks: int
) -> None:
    torch.manual_seed(0)
    whole: Any
    encoder: Any
    if kind == "clip":
        whole, encoder = (
            CLIPVisionModel(CLIPVisionConfig(**SIZES)),
            CLIPEncoder(architecture=SIZES, layer=layer),
        )
    else:
        whole = SiglipVisionModel(SiglipVisionConfig(**SIZES, vision_use_head=False))
        encoder = SiglipEncoder(architecture=SIZES, layer=layer)
    weights = {
        f"tower.{name.removeprefix('vision_model.')}": value
        for name, value in whole.state_dict().items()
    }
    missing, _ = encoder.load_state_dict(weights, strict=False)
    assert not missing
    assert len(encoder.tower.encoder.layers) == blocks
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        states = whole(pixels, output_hidden_states=True).hidden_states[blocks]
        found = encoder(pixels).tokens
    torch.testing.assert_close(
        found, states[:, 1:] if kind == "clip" else states, atol=1e-6, rtol=1e-6
    )
