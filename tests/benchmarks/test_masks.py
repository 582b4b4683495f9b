"""The peer of the mask cells is SAM 2 of transformers, and draws the same masks."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cells import masks
from benchmarks.harness import GateError

SMALL = {
    "hidden_size": 16,
    "embed_dim_per_stage": [16, 32, 64, 128],
    "num_attention_heads_per_stage": [1, 1, 2, 2],
    "blocks_per_stage": [1, 1, 2, 1],
    "global_attention_blocks": [3],
}


def test_both_draw_the_same_masks_and_the_gate_sees_a_difference() -> None:
    load = masks._Workload(images=2, masks=2, side=64, channels=[128, 64, 32, 16], **SMALL)
    assert "4 masks" in load.check_same()
    calls = []
    load.head.encoder.register_forward_hook(lambda *_: calls.append(1))
    assert load.run_ours() == load.run_published() == 4
    assert len(calls) == 2 + 4  # an image once; an image for each of its two masks
    original = load.stock.no_memory_embedding
    load.stock.no_memory_embedding = torch.nn.Parameter(original + 1)
    with pytest.raises(GateError, match="logits differ"):
        load.check_same()
    load.stock.no_memory_embedding = original
    load.prompts[1] = load.prompts[0]
    with pytest.raises(GateError, match="nothing is proven"):
        load.check_same()
