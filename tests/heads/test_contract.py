"""What every registered mask head must do. A newcomer is tested by its line in the table and its
line in `tiny.py`."""

from __future__ import annotations

import pytest
import torch

from medm.heads import HEADS
from medm.heads.base import MaskHead, MaskLogits
from medm.imaging import preprocess_from_dict
from medm.types import MASK_TOKEN
from tests.heads.tiny import TINY_HEADS, build_head, registered_name

every_head = pytest.mark.parametrize("name", sorted(TINY_HEADS))
ITEMS = torch.tensor([2, 0, 2, 2])
"""Images 0, 1, 2 have 1, 0 and 3 masks."""


def build(name: str, seed: int = 0) -> MaskHead:
    """A head whose every weight differs from zero, as after training."""
    torch.manual_seed(seed)
    head = build_head(name).eval()
    with torch.no_grad():
        for weight in head.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return head


def pixels_for(name: str, number: int = 3, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, *TINY_HEADS[name].pixels, generator=generator)


def prompts_for(head: MaskHead, number: int = 4, seed: int = 2) -> torch.Tensor:
    return torch.randn(number, head.dim, generator=torch.Generator().manual_seed(seed))


def test_every_head_has_a_tiny_block():
    assert {registered_name(name) for name in TINY_HEADS} == set(HEADS.names())


@every_head
def test_masks_have_the_grid_of_the_arithmetic(name):
    head, pixels = build(name), pixels_for(name)
    masks = head(pixels, prompts_for(head), ITEMS)
    assert masks.logits.shape == (4, *head.grid(tuple(pixels.shape[2:])))
    assert masks.quality.shape == masks.presence.shape == (4,)
    assert all(tensor.isfinite().all() for tensor in masks)


@every_head
def test_a_size_that_does_not_fit_is_refused(name):
    spatial = TINY_HEADS[name].pixels[1:]
    with pytest.raises(ValueError, match=r"expected|multiple"):
        build(name).grid((spatial[0] + 1, *spatial[1:]))


@every_head
def test_ragged_prompts_equal_one_by_one(name):
    head, pixels = build(name), pixels_for(name)
    prompts = prompts_for(head)
    maps = head.encode(pixels)
    together = head.decode(maps, prompts, ITEMS)
    for row, item in enumerate(ITEMS.tolist()):
        alone = head.encode(pixels[item : item + 1])
        single = head.decode(alone, prompts[row : row + 1], torch.tensor([0]))
        for batched, one in zip(together, single, strict=True):
            torch.testing.assert_close(batched[row : row + 1], one, atol=1e-4, rtol=1e-4)


@every_head
def test_prompt_and_image_change_the_mask(name):
    head, pixels = build(name), pixels_for(name, 1)
    prompts, item = prompts_for(head, 2), torch.tensor([0])
    first = head(pixels, prompts[:1], item).logits
    assert not torch.allclose(first, head(pixels, prompts[1:], item).logits)
    assert not torch.allclose(first, head(pixels.flip(-1), prompts[:1], item).logits)


@every_head
def test_every_parameter_lies_in_a_unit_and_gets_a_gradient(name):
    head = build(name).train()
    names = [key for key, _ in head.named_parameters()]
    assert all(key.startswith(("encoder.", "decoder.")) for key in names)
    prompts = prompts_for(head).requires_grad_()
    masks = head(pixels_for(name), prompts, ITEMS)
    sum((tensor * torch.randn_like(tensor)).sum() for tensor in masks).backward()
    assert prompts.grad.abs().sum(dim=1).gt(0).all()
    missing = [key for key, weight in head.named_parameters() if weight.grad is None]
    assert missing == []
    assert any(weight.grad.any() for weight in head.encoder.parameters())
    assert any(weight.grad.any() for weight in head.decoder.parameters())


@every_head
def test_kept_maps_of_a_frozen_encoder_train_the_same_decoder_weights(name):
    head, pixels = build(name).train(), pixels_for(name)
    head.encoder.eval()
    prompts = prompts_for(head)

    def gradients(masks: MaskLogits) -> dict[str, torch.Tensor]:
        sum(tensor.square().mean() for tensor in masks).backward()
        found = {key: weight.grad.clone() for key, weight in head.decoder.named_parameters()}
        head.zero_grad()
        return found

    torch.manual_seed(0)  # of dropout
    trained = gradients(head(pixels, prompts, ITEMS))
    head.encoder.requires_grad_(False)
    with torch.no_grad():
        maps = head.encode(pixels)
    torch.manual_seed(0)
    for key, gradient in gradients(head.decode(maps, prompts, ITEMS)).items():
        torch.testing.assert_close(gradient, trained[key], atol=1e-5, rtol=1e-4, msg=key)


@every_head
def test_state_dict_round_trip(name):
    first, second = build(name, 0), build(name, 1)
    second.load_state_dict(first.state_dict())
    pixels, prompts = pixels_for(name), prompts_for(first)
    for one, other in zip(
        first(pixels, prompts, ITEMS), second(pixels, prompts, ITEMS), strict=True
    ):
        assert torch.equal(one, other)


@every_head
def test_preprocessing_makes_what_the_head_takes(name):
    head = build(name)
    kind = "image" if len(TINY_HEADS[name].pixels) == 3 else "volume"
    assert kind in head.kinds
    sizes = type(head).architecture_for(kind, TINY_HEADS[name].block.get("architecture", {}))
    fields = type(head).preprocess_from({}, sizes)
    preprocess = preprocess_from_dict({"kind": kind, **fields})
    head.grid(tuple(preprocess.size))
    side = 64 if kind == "image" else [64, 64, 64]
    sized = type(head).preprocess_from({}, sizes, image_size=side)
    assert preprocess_from_dict({"kind": kind, **sized}).size == [64] * len(preprocess.size)


@every_head
def test_replies_name_the_token_that_prompts(name):
    assert MASK_TOKEN in HEADS.entry(registered_name(name)).options.control_tokens
