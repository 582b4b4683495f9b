"""Uneven ranks and chunks do not change the step, with and without ZeRO."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import needs_compiler, on_two_processes
from tests.models.dual_encoder.tiny import save_tokenizer


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=needs_compiler)])
def test_two_uneven_ranks_take_the_step_of_one_process(tmp_path: Path, stage: int) -> None:
    tokenizer = save_tokenizer(tmp_path)
    on_two_processes("tests.models.dual_encoder.two_processes", tokenizer, str(stage))
