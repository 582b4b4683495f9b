"""Two processes under ZeRO-3 give the losses and weights of one, though they route to different
experts."""

import json

import pytest
import torch

from tests.connectors.zero3 import LR, STEPS, batch, towers
from tests.launch import needs_compiler, on_two_processes


@needs_compiler
def test_two_processes_equal_one(tmp_path):
    on_two_processes("tests.connectors.zero3", str(tmp_path))

    model = towers()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    spread = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for step in range(STEPS):
        losses = [model(*batch(step, rank)) for rank in (0, 1)]
        assert [loss.item() for loss in losses] == pytest.approx(
            [spread[0][step], spread[1][step]], abs=1e-5
        )
        optimizer.zero_grad()
        (sum(losses) / 2).backward()
        optimizer.step()
    final = torch.load(tmp_path / "final.pt", weights_only=True)
    start = dict(towers().named_parameters())
    for name, value in model.named_parameters():
        assert not torch.equal(final[name], start[name]), f"{name} did not learn"
        torch.testing.assert_close(final[name], value.detach(), atol=1e-5, rtol=1e-4, msg=name)
