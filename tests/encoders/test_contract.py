"""What every registered encoder must do. A newcomer is tested by its line in the table and its line
in `tiny.py`."""

import json
import socket
from math import prod

import pytest
import torch

from medm.encoders import ENCODERS
from medm.encoders.plain_vit import PlainViT
from medm.encoders.vit import HFViTEncoder
from medm.training.parts import _checkpoint_activations
from tests.encoders.tiny import TINY_ENCODERS, build_encoder

pytestmark = pytest.mark.parametrize("name", ENCODERS.names())


def build(name, seed=0):
    torch.manual_seed(seed)
    return build_encoder(TINY_ENCODERS[name].block).eval()


def pixels_for(name, batch=2, seed=1):
    return torch.randn(
        batch, *TINY_ENCODERS[name].pixels, generator=torch.Generator().manual_seed(seed)
    )


def test_building_is_offline_random_and_repeatable(name, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("building an encoder must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    first, same, other = (build(name, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_shapes_are_the_arithmetic_of_the_grid(name):
    encoder, pixels = build(name), pixels_for(name)
    features = encoder(pixels)
    spatial = tuple(pixels.shape[2:])
    assert len(spatial) == encoder.axes == len(features.grid)
    assert features.grid == encoder.grid(spatial)
    assert features.prefix == encoder.prefix
    assert features.tokens.shape == (2, encoder.prefix + prod(features.grid), encoder.dim)
    if encoder.pooled_dim is None:
        assert features.pooled is None
    else:
        assert features.pooled.shape == (2, encoder.pooled_dim)


def test_the_channels_that_it_takes_are_said(name):
    """A recipe is refused by them before anything runs, so they must be the ones that the forward
    takes."""
    encoder, pixels = build(name), pixels_for(name, batch=1)
    assert encoder.channels
    for channels in encoder.channels:
        encoder(pixels[:, :1].expand(-1, channels, *pixels.shape[2:]))
    others = max(encoder.channels) + 1
    with pytest.raises((RuntimeError, ValueError)):
        encoder(pixels[:, :1].expand(-1, others, *pixels.shape[2:]))


def test_grid_refuses_another_number_of_axes(name):
    with pytest.raises(ValueError, match="expected an i"):
        build(name).grid((32,))


def test_the_image_changes_every_token(name):
    encoder = build(name)
    features = [encoder(pixels_for(name, seed=seed)).tokens for seed in (1, 2)]
    assert (features[0] != features[1]).any(dim=-1).all()


def test_gradient_reaches_every_parameter(name):
    encoder = build(name).train()
    features = encoder(pixels_for(name))
    loss = (features.tokens * torch.randn_like(features.tokens)).sum()
    if features.pooled is not None:
        loss = loss + (features.pooled * torch.randn_like(features.pooled)).sum()
    loss.backward()
    silent = [
        key
        for key, value in encoder.named_parameters()
        if value.grad is None or not value.grad.any()
    ]
    assert silent == []


def test_patch_dropout_keeps_some_patches_and_the_class_token(name):
    encoder, pixels = build(name), pixels_for(name)
    if not encoder.can_drop_patches:
        assert not isinstance(encoder, (HFViTEncoder, PlainViT))
        return
    whole = encoder(pixels)
    encoder.patch_dropout = 0.5
    assert torch.equal(encoder(pixels).tokens, whole.tokens)  # not in training
    features = encoder.train()(pixels)
    kept = int(prod(whole.grid) * 0.5)
    assert 0 < kept < prod(whole.grid)
    assert features.grid == (kept,)
    assert features.tokens.shape == (2, encoder.prefix + kept, encoder.dim)
    loss = (features.tokens * torch.randn_like(features.tokens)).sum()
    loss.backward()
    assert all(weight.grad is not None for weight in encoder.parameters())


def test_state_dict_round_trip(name):
    first, second = build(name, seed=0), build(name, seed=1)
    second.load_state_dict(first.state_dict(), strict=True)
    pixels = pixels_for(name)
    assert torch.equal(first(pixels).tokens, second(pixels).tokens)


def test_items_of_a_batch_do_not_see_each_other(name):
    encoder, pixels = build(name), pixels_for(name, batch=3)
    together = encoder(pixels).tokens
    alone = torch.cat([encoder(item[None]).tokens for item in pixels])
    # Other batch sizes take other kernels: float rounding is all that may differ.
    assert torch.allclose(together, alone, atol=1e-5 * together.abs().max().clamp(min=1).item())


def test_bf16_stays_bf16_and_close(name):
    encoder, pixels = build(name), pixels_for(name)
    exact = encoder(pixels).tokens
    rough = encoder.to(torch.bfloat16)(pixels.to(torch.bfloat16)).tokens
    assert rough.dtype == torch.bfloat16
    assert (
        torch.nn.functional.cosine_similarity(exact.flatten(), rough.float().flatten(), dim=0)
        > 0.99
    )


def test_preprocessing_is_plain_data(name):
    encoder_class, architecture = (
        ENCODERS.get(name),
        TINY_ENCODERS[name].block.get("architecture", {}),
    )
    described = encoder_class.preprocess_from(
        {}, encoder_class.architecture_from({}) | architecture, None
    )
    assert json.loads(json.dumps(described)) == described


def count_block_calls(encoder):
    """A list that grows with each run of a layer norm or a convolution."""
    calls = []
    for module in encoder.modules():
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.modules.conv._ConvNd)):
            module.register_forward_hook(lambda *_args: calls.append(1))
    return calls


def test_recomputed_activations_give_the_same_gradient(name):
    gradients = []
    for recompute in (False, True):
        encoder = build(name).train()
        if recompute:
            _checkpoint_activations(encoder, asked=True, name="image.encoder")
            forwards = count_block_calls(encoder)
        features = encoder(pixels_for(name))
        calls = len(forwards) if recompute else 0
        features.tokens.square().sum().backward()
        assert not recompute or len(forwards) > calls
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["cast", "autocast"])
def test_half_precision_works_on_a_cpu_forward_and_backward(name, dtype, weights):
    """As DeepSpeed casts every weight, and as transformers' Trainer computes; torch lacks some
    kernels there."""
    encoder, pixels = build(name), pixels_for(name)
    exact = encoder(pixels).tokens
    encoder = encoder.to(dtype) if weights == "cast" else encoder
    with torch.autocast("cpu", dtype, enabled=weights == "autocast"):
        tokens = encoder(pixels.to(dtype) if weights == "cast" else pixels).tokens
    tokens.float().square().sum().backward()
    similarity = torch.nn.functional.cosine_similarity(
        tokens.float().flatten(), exact.flatten(), dim=0
    )
    assert similarity > 0.99
    gradients = [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
