"""Uneven ranks and chunks do not change the loss or the step, with and without ZeRO."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import COMPILER, on_processes
from tests.models.dual_encoder.tiny import save_tokenizer

RUNNERS = ["ddp", *(["0", "1", "2", "3"] if COMPILER else [])]
"""DDP, and the stages of ZeRO, for which DeepSpeed builds its communication op."""


@pytest.mark.parametrize("world", [2, 3])
def test_uneven_ranks_take_the_step_of_one_process(tmp_path: Path, world: int) -> None:
    tokenizer = save_tokenizer(tmp_path)
    on_processes(world, "tests.models.dual_encoder.ranks", tokenizer, *RUNNERS)
