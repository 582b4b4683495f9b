"""What medm says to DeepSpeed, read by DeepSpeed's own parser."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from medm.errors import RecipeError
from medm.training.deepspeed import PRESETS, configuration
from medm.training.options import TrainOptions

FILLED: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0,
    "bf16": {"enabled": False}, "fp16": {"enabled": False},
}  # fmt: skip
"""What transformers writes in the place of "auto"."""


@pytest.mark.parametrize("preset", PRESETS)
def test_deepspeed_takes_every_preset(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is built: a run with offload needs a compiler for DeepSpeed's Adam."""
    monkeypatch.setenv(
        "RANK", "0"
    )  # else medm would start a process group's environment for this process
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = configuration(TrainOptions(deepspeed=preset, use_cpu=True))
    assert {name for name, value in config.items() if value == "auto"} <= FILLED.keys()
    read = DeepSpeedConfig(config | FILLED)
    zero = read.zero_config
    assert int(zero.stage) == int(preset[4])
    assert (read.train_micro_batch_size_per_gpu, read.train_batch_size) == (3, 6)
    moved = (zero.offload_optimizer is not None, zero.offload_param is not None)
    assert moved == {"zero2_offload": (True, False), "zero3_offload": (True, True)}.get(
        preset, (False, False)
    )


def test_a_silent_compiler_and_a_lock_that_was_left_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    options = TrainOptions(deepspeed="zero2", use_cpu=True)

    def said() -> list[str]:
        caplog.clear()
        with caplog.at_level("INFO", logger="medm"):
            configuration(options)
        return caplog.messages

    assert ["takes a minute or two" in line for line in said()] == [True]
    folder = tmp_path / "py311_cpu" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    assert f"waits until {folder / 'lock'} is gone" in said()[0]
    (folder / "lock").unlink()
    (folder / "deepspeed_shm_comm.so").touch()
    assert said() == []


def test_the_warning_about_accumulation_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    configuration(TrainOptions(deepspeed="zero2", use_cpu=True))
    for text in (
        "Gradient accumulation steps mismatch: GradientAccumulationPlugin has 1",
        "another warning",
    ):
        logging.getLogger("accelerate.accelerator").warning(text)
    assert caplog.messages[-1:] == ["another warning"]
    assert not [line for line in caplog.messages if "mismatch" in line]


@pytest.mark.parametrize(
    ("block", "words"),
    [({"load_universal": True}, "pickled"), ({"writer": {"type": "FAST"}}, "save_in_background")],
)
def test_a_file_that_reads_or_writes_checkpoints_its_own_way_is_refused(
    tmp_path: Path, block: dict[str, Any], words: str
) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "checkpoint": block}))
    with pytest.raises(
        RecipeError, match=rf"zero\.json: checkpoint\.{next(iter(block))} .*{words}"
    ):
        configuration(TrainOptions(deepspeed=str(file), use_cpu=True))
