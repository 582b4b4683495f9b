"""EVA-CLIP: the layout of `eva_vit_g.pth` loads strict, and equals a straight-line computation."""

import pytest
import torch
from torch.nn import functional as F

from medm.encoders.eva_clip import EVACLIPEncoder
from medm.errors import CheckpointError
from tests.encoders.published import load_published

DIM, MLP, HEADS, DEPTH = 24, 40, 3, 4
SIZES = {
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 3,
    "hidden_size": DIM,
    "intermediate_size": MLP,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
}


def published_shapes(dim=DIM, mlp=MLP, depth=DEPTH, cells=4, patch=8):
    shapes = {
        "cls_token": (1, 1, dim), "pos_embed": (1, cells + 1, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,), "norm.bias": (dim,), "head.weight": (10, dim), "head.bias": (10,),
    }  # fmt: skip
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.norm1.weight": (dim,), f"blocks.{i}.norm1.bias": (dim,),
            f"blocks.{i}.attn.q_bias": (dim,), f"blocks.{i}.attn.v_bias": (dim,),
            f"blocks.{i}.attn.qkv.weight": (3 * dim, dim),
            f"blocks.{i}.attn.proj.weight": (dim, dim), f"blocks.{i}.attn.proj.bias": (dim,),
            f"blocks.{i}.norm2.weight": (dim,), f"blocks.{i}.norm2.bias": (dim,),
            f"blocks.{i}.mlp.fc1.weight": (mlp, dim), f"blocks.{i}.mlp.fc1.bias": (mlp,),
            f"blocks.{i}.mlp.fc2.weight": (dim, mlp), f"blocks.{i}.mlp.fc2.bias": (dim,),
        }  # fmt: skip
    return shapes


def random_state(**sizes):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * 0.3
        for name, shape in published_shapes(**sizes).items()
    }


def straight_line(state, pixels, blocks):
    def norm(x, name):
        return F.layer_norm(x, (DIM,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    x = (
        F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8)
        .flatten(2)
        .mT
    )
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    for i in range(blocks):
        q_bias, v_bias = state[f"blocks.{i}.attn.q_bias"], state[f"blocks.{i}.attn.v_bias"]
        bias = torch.cat([q_bias, torch.zeros(DIM), v_bias])
        qkv = norm(x, f"blocks.{i}.norm1") @ state[f"blocks.{i}.attn.qkv.weight"].T + bias
        q, k, v = qkv.view(*x.shape[:2], 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        out = ((q * (DIM // HEADS) ** -0.5) @ k.mT).softmax(-1) @ v
        out = out.transpose(1, 2).reshape(x.shape)
        x = x + out @ state[f"blocks.{i}.attn.proj.weight"].T + state[f"blocks.{i}.attn.proj.bias"]
        y = F.gelu(
            norm(x, f"blocks.{i}.norm2") @ state[f"blocks.{i}.mlp.fc1.weight"].T
            + state[f"blocks.{i}.mlp.fc1.bias"]
        )
        x = x + y @ state[f"blocks.{i}.mlp.fc2.weight"].T + state[f"blocks.{i}.mlp.fc2.bias"]
    return x


def test_the_block_before_the_last_equals_a_straight_line_computation():
    state, pixels = random_state(), torch.randn(2, 3, 16, 16)
    encoder = EVACLIPEncoder(architecture=SIZES, tokens="cls_patch", ln_vision="none")
    report = load_published(encoder, state)
    # The last block, the final norm and the classifier are of no use, and said to be so.
    assert {name.split(".")[0] for name in report.ignored} == {"norm", "head", "blocks"}
    assert all(
        name.startswith(f"blocks.{DEPTH - 1}.")
        for name in report.ignored
        if name.startswith("blocks")
    )
    expected = straight_line(state, pixels, DEPTH - 1)
    torch.testing.assert_close(encoder(pixels).tokens, expected, atol=1e-5, rtol=1e-5)


def test_the_norm_that_was_never_loaded_has_no_weights():
    state, pixels = random_state(), torch.randn(2, 3, 16, 16)
    encoder = EVACLIPEncoder(architecture=SIZES)
    load_published(encoder, state)
    expected = F.layer_norm(straight_line(state, pixels, DEPTH - 1)[:, 1:], (DIM,))
    torch.testing.assert_close(encoder(pixels).tokens, expected, atol=1e-5, rtol=1e-5)


def test_the_learned_norm_comes_from_the_file_or_not_at_all():
    state = {f"visual_encoder.{name}": value for name, value in random_state().items()}
    encoder = EVACLIPEncoder(architecture=SIZES, ln_vision="learned")
    with pytest.raises(CheckpointError, match=r"2 missing: ln_vision\.bias, ln_vision\.weight"):
        load_published(encoder, state)
    norm = {"ln_vision.weight": torch.full((DIM,), 2.0), "ln_vision.bias": torch.full((DIM,), -1.0)}
    load_published(encoder, state | norm)
    plain = EVACLIPEncoder(architecture=SIZES)
    load_published(plain, state | norm)
    pixels = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(
        encoder(pixels).tokens, plain(pixels).tokens * 2 - 1, atol=1e-5, rtol=1e-5
    )


def test_published_shapes_load_strict():
    with torch.device("meta"):
        encoder = EVACLIPEncoder(architecture={})
        shapes = published_shapes(dim=1408, mlp=6144, depth=40, cells=256, patch=14)
        load_published(encoder, {name: torch.empty(shape) for name, shape in shapes.items()})
    assert len(encoder.blocks) == 39
    assert encoder.grid((224, 224)) == (16, 16)
    assert encoder.dim == 1408


def test_positions_of_another_size_are_cubic_and_leave_the_class_token():
    encoder = EVACLIPEncoder(architecture=SIZES)
    placed = encoder._positions_for((3, 5))
    table = encoder.positions[:, 1:].mT.reshape(1, DIM, 2, 2)
    expected = F.interpolate(table, size=(3, 5), mode="bicubic", align_corners=False).flatten(2).mT
    assert torch.equal(placed, torch.cat([encoder.positions[:, :1], expected], dim=1))
    assert encoder(torch.randn(1, 3, 24, 40)).grid == (3, 5)
