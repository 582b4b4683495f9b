"""What medm says to DeepSpeed, read by DeepSpeed's own parser."""

from __future__ import annotations

from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from medm.training.arguments import training_arguments
from medm.training.deepspeed import PRESETS
from medm.training.options import TrainOptions


@pytest.mark.parametrize("preset", PRESETS)
def test_deepspeed_takes_every_preset(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is built here: running with offload needs a compiler for DeepSpeed's Adam."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    try:
        options = TrainOptions(deepspeed=preset, use_cpu=True, max_steps=1, per_device_train_batch_size=3)
        filled = training_arguments(options, tmp_path).hf_deepspeed_config
    finally:
        unset_hf_deepspeed_config()
    read = DeepSpeedConfig({**filled.config, "gradient_clipping": 1.0, "train_batch_size": 3})
    zero = read.zero_config
    assert int(zero.stage) == int(preset[4])
    assert read.train_micro_batch_size_per_gpu == 3
    moved = [zero.offload_optimizer is not None, zero.offload_param is not None]
    assert moved == {"zero2_offload": [True, False], "zero3_offload": [True, True]}.get(preset, [False, False])
