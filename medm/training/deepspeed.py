"""Configuration and checkpoints of DeepSpeed.

No other file imports it, and only recipes that name a stage need it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.cpp_extension import get_default_build_root
from transformers import TrainingArguments

from medm.distributed import rank, world_size
from medm.errors import RecipeError, suggest
from medm.training.options import TrainOptions
from medm.types import JsonObject

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

_COMMON: dict[str, object] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "wall_clock_breakdown": False,
}

# Bucket sizes in elements. "auto" would need a hidden size in the model's config, which two towers
# do not have.
_BUCKET = 50_000_000
_ZERO2 = {
    "stage": 2,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_bucket_size": _BUCKET,
}
_ZERO3 = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_bucket_size": _BUCKET,
    "stage3_prefetch_bucket_size": _BUCKET,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_gather_16bit_weights_on_model_save": True,
}
_TO_CPU = {"device": "cpu", "pin_memory": True}

PRESETS: dict[str, Mapping[str, object]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": _ZERO2,
    "zero3": _ZERO3,
    "zero2_offload": {**_ZERO2, "offload_optimizer": _TO_CPU},
    "zero3_offload": {**_ZERO3, "offload_optimizer": _TO_CPU, "offload_param": _TO_CPU},
}
"""The `zero_optimization` block of each preset."""


def configuration(options: TrainOptions) -> JsonObject:
    """Return the DeepSpeed configuration of a recipe.

    Sets the environment variables that a process without launcher lacks.

    Raises:
        RecipeError: neither a preset nor a readable JSON file, or a file with settings that belong
            to the recipe.
    """
    assert options.deepspeed is not None
    config = (
        _preset(options.deepspeed) if options.deepspeed in PRESETS else _read(options.deepspeed)
    )
    on_cpu = options.use_cpu or not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _announce_build(
        "cpu_adam"
        if not on_cpu and "offload" in json.dumps(config)
        else "shm_comm"
        if on_cpu
        else None
    )
    # transformers accumulates gradients itself and tells accelerate 1; DeepSpeed's number is the
    # recipe's.
    logging.getLogger("accelerate.accelerator").addFilter(
        lambda record: "Gradient accumulation steps mismatch" not in record.getMessage()
    )
    _launch_alone()
    return config


def _announce_build(extension: str | None) -> None:
    """Log that DeepSpeed compiles an extension, which it does silently, or waits for a lock.

    Args:
        extension: part of its name; None for no extension.
    """
    if extension is None:
        return
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    folders = [path for path in root.glob("**/*") if path.is_dir() and extension in path.name]
    for lock in [path / "lock" for path in folders if (path / "lock").exists()]:
        logger.warning(
            "DeepSpeed waits until %s is gone: another process compiles its extension, or was "
            "killed while it did. If none is running, remove that file",
            lock,
        )
    if not any(True for path in folders for _ in path.glob("*.so")):
        logger.info(
            "DeepSpeed compiles its extension %s for %s on first use, which takes a minute or two",
            extension,
            root,
        )


def zero_stage(name: str) -> int:
    """Return the ZeRO stage of a preset or a JSON file. Raises `RecipeError` as `configuration`."""
    config = _preset(name) if name in PRESETS else _read(name)
    return int(config["zero_optimization"].get("stage", 0))


def _preset(name: str) -> JsonObject:
    return {**_COMMON, "zero_optimization": dict(PRESETS[name])}


def _read(name: str) -> JsonObject:
    path = Path(name)
    if path.suffix != ".json":
        raise RecipeError(
            f"train.deepspeed: {name!r} is neither a preset nor a JSON file{suggest(name, PRESETS)}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"train.deepspeed: {path} cannot be read as JSON ({error})") from None
    if not isinstance(config, dict):
        raise RecipeError(
            f"train.deepspeed: {path}: expected an object at the top, found {type(config).__name__}"
        )
    for block in ("optimizer", "scheduler"):
        if block in config:
            raise RecipeError(
                f"train.deepspeed: {path} has a '{block}' block, under which learning rates per "
                "part would have no effect; remove it: the optimizer and its schedule are those "
                "of the train section"
            )
    checkpoint = config.get("checkpoint", {})
    if checkpoint.get("load_universal"):
        raise RecipeError(
            f"train.deepspeed: {path}: checkpoint.load_universal reads pickled files; remove it"
        )
    if checkpoint.get("writer"):
        raise RecipeError(
            f"train.deepspeed: {path}: checkpoint.writer has no effect, since medm writes "
            "DeepSpeed's files itself (train.save_in_background); remove it"
        )
    zero = config.setdefault("zero_optimization", {})
    if zero.get("stage") == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = (
            True  # checkpoints hold tensors of full size
        )
    return {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, **config}


def _launch_alone() -> None:
    """Set the variables of torchrun for a single process; without them DeepSpeed looks for MPI."""
    if "RANK" in os.environ or "LOCAL_RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in alone.items()})


def check_parameters(model: nn.Module) -> None:
    """Raise `RecipeError` for parameters that DeepSpeed cannot send to other processes."""
    scalars = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise RecipeError(
            "train.deepspeed: DeepSpeed cannot handle parameters without an axis "
            f"({', '.join(scalars)}); train without DeepSpeed, or give them the shape (1,)"
        )


def offloaded_optimizer(args: TrainingArguments) -> type[torch.optim.Optimizer] | None:
    """Return DeepSpeed's CPU Adam for AdamW offloaded from a GPU to the CPU, else None."""
    zero = args.hf_deepspeed_config.config.get("zero_optimization", {})
    offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    if (
        not offloaded
        or not torch.cuda.is_available()
        or args.optim not in ("adamw_torch", "adamw_torch_fused")
    ):
        return None
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam


class _ShardedParameter(Protocol):
    """Attributes that ZeRO-3 adds to a parameter."""

    ds_numel: int
    ds_shape: torch.Size
    ds_tensor: torch.Tensor
    """This rank's shard; that of the last rank is padded."""


def copy_to_optimizer(parameters: Iterable[nn.Parameter]) -> None:
    """Give DeepSpeed's optimizer the values of parameters that were changed outside it.

    Its own copies in float32 would overwrite them at the next step. All ranks call it.

    Raises:
        RecipeError: a parameter is spread over ranks, so that the change reached none.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    for parameter in parameters:
        value = parameter.detach().float()
        if not hasattr(parameter, "ds_id"):
            safe_set_full_fp32_param(parameter, value)
            continue
        spread = cast(_ShardedParameter, parameter)
        if value.numel() != spread.ds_numel:
            raise RecipeError(
                f"train.deepspeed: the model changes a parameter of shape {tuple(spread.ds_shape)} "
                "after each step, and ZeRO-3 spreads it over ranks; use zero2"
            )
        shard = spread.ds_tensor
        padded = F.pad(value.flatten(), (0, shard.numel() * world_size() - value.numel()))
        own = padded.split(shard.numel())[rank()]
        shard.data.copy_(own)
        safe_set_local_fp32_param(parameter, own)


@contextmanager
def collected(engine: DeepSpeedEngine) -> Iterator[dict[Path, object]]:
    """Collect the state that `engine.save_checkpoint` would write, by file.

    `save_checkpoint` is collective: a rank must not fail there because of its disk.

    Args:
        engine: DeepSpeed's engine.

    Yields:
        State by file of this rank; tensors that training changes, not copies.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    files: dict[Path, object] = {}

    class Collector(TorchCheckpointEngine):
        def __init__(self) -> None:
            pass  # the base logs its settings

        def save(self, state_dict: object, path: str) -> None:
            files[Path(path)] = state_dict

    before, engine.checkpoint_engine = engine.checkpoint_engine, Collector()
    try:
        yield files
    finally:
        engine.checkpoint_engine = before


def full_weights(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Return the full-size weights by name.

    All ranks call it; under ZeRO-3 only rank 0 gets them.
    """
    if engine.zero_optimization_partition_weights():
        return engine._zero3_consolidated_16bit_state_dict() or {}
    return engine.module.state_dict()


def checkpoint_classes() -> tuple[type, ...]:
    """Return the classes in DeepSpeed's optimizer files: plain data, and the loss scalers."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)
