"""The plain loop of the contrast cells is the model that medm trains."""

from __future__ import annotations

import torch

from benchmarks.cells import contrast


def test_the_peer_computes_the_same_loss_and_pads_to_its_context() -> None:
    load = contrast._Workload(count=3)
    with torch.no_grad():
        loss, expected = (one(load.data.pairs) for one in (load.our_loss, load.their_loss))
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    widths = [
        contrast.collate(load.data.pairs)["input_ids"].shape[1],
        contrast.plain_collate(load.data.pairs)[1].shape[1],
    ]
    assert widths[0] == max(len(pair.input_ids) for pair in load.data.pairs) <= contrast.LONGEST
    assert widths[1] == contrast.CONTEXT
    with torch.no_grad():  # the gate would see other weights
        load.plain.text_proj[0].weight.mul_(1.1)
        assert abs(load.their_loss(load.data.pairs) - expected) > 1e-5
