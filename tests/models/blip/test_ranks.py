"""Uneven ranks change neither the losses nor the steps nor the training state, with ZeRO 0 to 2."""

from __future__ import annotations

from pathlib import Path

from tests.launch import COMPILER, on_processes
from tests.models.dual_encoder.tiny import save_tokenizer

RUNNERS = ["ddp", *(["0", "1", "2"] if COMPILER else [])]


def test_uneven_ranks_take_the_step_of_one_process(tmp_path: Path) -> None:
    on_processes(2, "tests.models.blip.ranks", save_tokenizer(tmp_path), *RUNNERS)
