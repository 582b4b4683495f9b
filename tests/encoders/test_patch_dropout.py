"""Patches that are left out are drawn per item, evenly, and never the tokens in front."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.encoders.tiny import TINY_ENCODERS, build_encoder


def sampled(rate: float, rows: int, patches: int, prefix: int) -> Tensor:
    """Numbers of the tokens that are kept, (rows, kept)."""
    encoder = build_encoder(TINY_ENCODERS["clip"].block).train()
    encoder.patch_dropout = rate
    tokens = torch.arange(prefix + patches, dtype=torch.float32).expand(rows, -1).unsqueeze(-1)
    return encoder.sample_patches(tokens.repeat(1, 1, 3), prefix=prefix)[..., 0].long()


@pytest.mark.parametrize(("rate", "kept"), [(0.25, 6), (0.5, 4), (0.75, 2), (0.99, 1), (0.4, 4)])
def test_every_item_keeps_the_same_number_in_the_order_of_the_grid(rate: float, kept: int) -> None:
    torch.manual_seed(0)
    found = sampled(rate, rows=50, patches=8, prefix=2)
    assert found.shape == (50, 2 + kept)
    assert (found[:, :2] == torch.tensor([0, 1])).all()
    assert (found.diff(dim=1) > 0).all()
    assert found.max() == 9  # the last patch is drawn, too


def test_items_are_drawn_apart_and_patches_evenly() -> None:
    torch.manual_seed(0)
    found = sampled(0.5, rows=2000, patches=8, prefix=1)
    assert len(found.unique(dim=0)) == 70  # all ways to choose 4 of 8
    frequency = torch.bincount(found[:, 1:].flatten(), minlength=9)[1:] / 2000
    assert (frequency - 0.5).abs().max() < 0.06  # five standard deviations
