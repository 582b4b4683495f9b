"""A rank that stands still is named, with its step."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch import distributed as dist

from medm.errors import MedmError
from medm.training import watchdog
from medm.training.watchdog import FOLDER, Watchdog
from tests.launch import ROOT, environment, free_port
from tests.training.toys import trainer


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watchdog:
    """The watchdog of rank 0 of 2, with a time-out of 0.4 s."""
    monkeypatch.setattr(watchdog, "world_size", lambda: 2)
    monkeypatch.setattr(watchdog, "rank", lambda: 0)
    return Watchdog(tmp_path, 0.4)


def sign(folder: Path, **content: object) -> None:
    (folder / FOLDER).mkdir(exist_ok=True)
    (folder / FOLDER / "1.json").write_text(json.dumps(content))


def test_row_20_silence_names_rank_and_step(watched: Watchdog, tmp_path: Path) -> None:
    sign(tmp_path, step=3, host="node7", process=42, at="in nifti.py:10")
    with pytest.raises(MedmError) as caught, watched.watching():
        deadline = time.monotonic() + 60
        while watched.verdict is None and time.monotonic() < deadline:
            time.sleep(0.05)
        raise RuntimeError("Connection closed by peer")
    assert "rank 1 of 2 (process 42 on node7), last seen at step 3, in nifti.py:10" in str(
        caught.value
    )
    assert not (tmp_path / FOLDER / "0.json").exists()


def test_row_20_a_time_out_says_where_the_others_are(watched: Watchdog, tmp_path: Path) -> None:
    watched.timeout = 10.0
    sign(tmp_path, step=4, host="node7", process=42, at="in nifti.py:10")
    with pytest.raises(MedmError) as caught, watched.watching():
        deadline = time.monotonic() + 60
        while not watched._seen and time.monotonic() < deadline:
            time.sleep(0.05)
        raise RuntimeError("Timed out waiting 10000ms for recv operation")
    assert "longer than train.ddp_timeout = 10 s" in str(caught.value)
    assert "rank 1 of 2 (process 42 on node7), last seen at step 4, in nifti.py:10" in str(
        caught.value
    )


def test_row_20_other_errors_and_single_ranks_are_left_alone(
    watched: Watchdog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match=r"^shape$"), watched.watching():
        raise RuntimeError("shape")
    monkeypatch.setattr(watchdog, "world_size", lambda: 1)
    with Watchdog(tmp_path, 0.4).watching():
        time.sleep(0.1)
    assert not (tmp_path / FOLDER).exists()


def test_row_20_the_time_out_reaches_the_process_group_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[timedelta] = []
    monkeypatch.setattr("medm.distributed.world_size", lambda: 2)
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", found.append)
    trainer(tmp_path, use_cpu=True, ddp_timeout=77)
    assert found == [timedelta(seconds=77)]


def test_row_20_a_stopped_rank_ends_the_run_with_its_name(tmp_path: Path) -> None:
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.stopped_rank", str(tmp_path), str(rank), port],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said, errors = ranks[0].communicate(timeout=300)
    finally:
        os.kill(ranks[1].pid, signal.SIGKILL)
        ranks[1].communicate()
    assert ranks[0].returncode == 1, errors
    assert f"rank 1 of 2 (process {ranks[1].pid} on " in said, errors
    assert re.search(r"last seen at step [123],", said), said
