from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def test_ten_kills_change_no_bit_of_the_result_and_leave_no_unreadable_checkpoint(
    tmp_path: Path,
) -> None:
    subprocess.run(
        [sys.executable, "-m", "tests.training.kill_loop", str(tmp_path)],
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["unreadable"] == []
    assert report["killed"] == 10
    assert max(report["saved"]) >= 2
    whole, cut = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "cut.safetensors")
    assert whole.keys() == cut.keys()
    assert [name for name in whole if not torch.equal(whole[name], cut[name])] == []
