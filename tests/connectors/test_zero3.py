"""Two processes under ZeRO-3 give the losses and weights of one, though they route to different experts."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.connectors.zero3 import LR, STEPS, batch, towers


@pytest.mark.skipif(
    not all(shutil.which(program) for program in (os.environ.get("CXX", "g++"), "ninja")),
    reason="DeepSpeed builds its communication op, and there is no g++ or ninja",
)
def test_two_processes_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[2]
    environment = {
        "TORCH_EXTENSIONS_DIR": str(root / ".cache" / "torch_extensions"),
        **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port),
        "-m", "tests.connectors.zero3", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1000, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    model = towers()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    spread = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for step in range(STEPS):
        losses = [model(*batch(step, rank)) for rank in (0, 1)]
        assert [loss.item() for loss in losses] == pytest.approx([spread[0][step], spread[1][step]], abs=1e-5)
        optimizer.zero_grad()
        (sum(losses) / 2).backward()
        optimizer.step()
    final = torch.load(tmp_path / "final.pt", weights_only=True)
    start = dict(towers().named_parameters())
    for name, value in model.named_parameters():
        assert not torch.equal(final[name], start[name]), f"{name} did not learn"
        torch.testing.assert_close(final[name], value.detach(), atol=1e-5, rtol=1e-4, msg=name)
