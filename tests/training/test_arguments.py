from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SchedulerType
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from medm.errors import DeviceError, MedmError, RecipeError
from medm.training import arguments
from medm.training.arguments import on_this_machine, training_arguments
from medm.training.options import TrainOptions


def made(tmp_path: Path, **train: Any) -> Any:
    return training_arguments(TrainOptions(use_cpu=True, **train), tmp_path)


@pytest.mark.parametrize("name", [member.value for member in OptimizerNames])
def test_every_optimizer_of_transformers_works_or_is_refused_by_name(
    tmp_path: Path, name: str
) -> None:
    """Half of them need packages that are not installed; none may fail later, or with a
    traceback."""
    try:
        assert made(tmp_path, optim=name).optim == name
    except MedmError as error:
        assert f"train.optim: {name}" in str(error)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@pytest.mark.parametrize("name", ["adamw_8bit", "lion_32bit", "paged_adamw_8bit"])
def test_the_extra_of_an_optimizer_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        DeviceError, match=rf"train\.optim: {name} needs .*pip install 'medm\[quant\]'"
    ):
        made(tmp_path, optim=name)


@pytest.mark.parametrize("name", [member.value for member in SchedulerType])
def test_every_schedule_of_transformers_works_or_is_refused_by_name(
    tmp_path: Path, name: str
) -> None:
    try:
        assert (
            made(tmp_path, lr_scheduler_type=name, eval_strategy="steps").lr_scheduler_type == name
        )
    except RecipeError as error:
        assert f"train.lr_scheduler_type: {name} refuses train.lr_scheduler_kwargs" in str(error)


@pytest.mark.parametrize("name", sorted(INTEGRATION_TO_CALLBACK))
def test_every_tracker_of_transformers_is_there_or_named(tmp_path: Path, name: str) -> None:
    try:
        assert made(tmp_path, report_to=name).report_to == [name]
    except DeviceError as error:
        assert f"train.report_to: {name} is not installed" in str(error)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            {"optim": "adamw_torhc"},
            r"train\.optim: unknown name 'adamw_torhc': did you mean 'adamw_torch'",
        ),
        ({"lr_scheduler_type": "cosin"}, r"train\.lr_scheduler_type: .*did you mean 'cosine'"),
        ({"report_to": "wandbb"}, r"train\.report_to: no tracker 'wandbb': did you mean 'wandb'"),
        (
            {"deepspeed": "zero4"},
            r"train\.deepspeed: 'zero4' is neither a preset nor a JSON file: did you mean",
        ),
        (
            {"lr_scheduler_kwargs": {"cycles": 3}},
            r"cosine refuses train\.lr_scheduler_kwargs = \{'cycles': 3\}",
        ),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(
    tmp_path: Path, train: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        made(tmp_path, **train)


@pytest.mark.parametrize("key", ["bf16", "fp16", "tf32"])
def test_without_a_gpu_a_recipe_for_gpus_runs_in_float32(
    key: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(arguments, "_has_accelerator", lambda: False)
    asked = TrainOptions(**{key: True})
    options, fallback = on_this_machine(asked)
    assert (options.bf16, options.fp16, options.tf32) == (False, False, None)
    assert fallback == {f"train.{key}": "float32 on the CPU, no GPU found"}
    assert getattr(asked, key) is True
    said = [line for line in caplog.messages if f"train.{key} of the recipe without effect" in line]
    assert len(said) == 1 and "train.require_gpu=true" in said[0]
    if not torch.cuda.is_available():
        assert training_arguments(options, tmp_path).device.type == "cpu"


def test_the_precision_is_kept_where_the_recipe_means_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [
        TrainOptions(bf16=True, use_cpu=True),
        TrainOptions(bf16=True, require_gpu=True),
        TrainOptions(),
    ]
    for found in (False, True):
        monkeypatch.setattr(arguments, "_has_accelerator", lambda found=found: found)
        for options in [*kept, *([TrainOptions(bf16=True)] if found else [])]:
            assert on_this_machine(options) == (options, {})
