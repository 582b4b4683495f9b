"""Ranks with and without masks take the steps of one process, with and without ZeRO."""

from __future__ import annotations

from pathlib import Path

from tests import tiny
from tests.launch import COMPILER, on_two_processes

RUNNERS = ["ddp", *(["2", "3"] if COMPILER else [])]
"""DDP, and the stages of ZeRO, for which DeepSpeed builds its communication op."""


def test_ranks_with_and_without_masks_take_the_step_of_one_process(tmp_path: Path) -> None:
    llm = tiny.save_llm("qwen2.5", tmp_path / "llm", num_hidden_layers=1)
    on_two_processes("tests.models.grounding_ranks", str(llm), *RUNNERS)
