"""`transformers.TrainingArguments` from the `train` section of a recipe.

Every supported 5.x release accepts them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.training_args import OptimizerNames

from medm.config import Mark
from medm.distributed import set_timeout
from medm.errors import DeviceError, RecipeError, suggest
from medm.launcher import launched_rank
from medm.training.kernels import require_liger
from medm.training.options import TrainOptions
from medm.training.quantize import require_4bit
from medm.training.recipe import Recipe

logger = logging.getLogger(__name__)

_DECIDED = {
    # a batch holds what the objective reads, not what a signature lists
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,  # it would hide a non-finite loss
    "disable_tqdm": True,  # the progress line is ours
    "prediction_loss_only": True,
    # early stopping continues its count after a resume
    "restore_callback_states_from_checkpoint": True,
}

_WITHOUT_EFFECT = {
    "use_liger_kernel": "it is train.liger",
    "torch_compile_backend": "layers are compiled by train.torch_compile",
    "torch_compile_mode": "layers are compiled by train.torch_compile",
    "label_smoothing_factor": "the loss belongs to the objective",
    "train_sampling_strategy": "the order of the data is data.order",
    "length_column_name": "the order of the data is data.order",
    "data_seed": "the order of the data follows train.seed",
    "auto_find_batch_size": "the order of the data depends on the batch size",
    "activation_checkpointing": "it is train.gradient_checkpointing, or per part",
    "enable_jit_checkpoint": "SIGTERM writes a checkpoint in any case",
    "ignore_data_skip": "a resumed run continues where it stopped",
    "save_only_model": "a checkpoint holds what a resume needs",
    "resume_from_checkpoint": "it is --resume",
    "push_to_hub": "medm uploads nothing",
    "average_tokens_across_devices": "losses are always divided by the items of all ranks",
    **dict.fromkeys(_DECIDED, "medm decides it"),
}


_EXTRAS = {"bitsandbytes": "quant", "tensorboard": "log", "wandb": "log"}
"""Packages and the extra of medm that installs them."""


def on_this_machine(options: TrainOptions) -> tuple[TrainOptions, dict[str, str]]:
    """Replace options that need a GPU on a machine without one.

    A recipe for GPUs then runs on it, slowly. With `use_cpu` the precision of the recipe is kept.

    Returns:
        The options to train with, and the replacements by key. The recipe itself does not change.
    """
    if options.use_cpu or options.require_gpu or _has_accelerator():
        return options, {}
    reduced = [key for key in ("bf16", "fp16", "tf32") if getattr(options, key)]
    if not reduced:
        return options, {}
    if launched_rank() == 0:
        logger.warning(
            "this PyTorch sees no GPU: training on the CPU in float32, %s of the recipe without "
            "effect. To stop instead, set train.require_gpu=true; for bfloat16 on the CPU, set "
            "train.use_cpu=true",
            " and ".join(f"train.{key}" for key in reduced),
        )
    changes: dict[str, object] = {"bf16": False, "fp16": False, "tf32": None}
    return options.model_copy(update=changes), {
        f"train.{key}": "float32 on the CPU, no GPU found" for key in reduced
    }


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.accelerator.is_available()


def require_start(recipe: Recipe) -> None:
    """Check recipe, folders and installed packages before any weights are read.

    Raises:
        RecipeError: `init_from` is no model folder, or held-out data is missing.
        DeviceError: an optional package or a GPU that the recipe needs is missing.
    """
    if not recipe.data.train:
        raise RecipeError("data.train: no annotation file; name at least one")
    if recipe.train.eval_strategy != "no" and not recipe.data.eval:
        raise RecipeError(
            f"train.eval_strategy: {recipe.train.eval_strategy} needs held-out records; name "
            "files in data.eval"
        )
    if recipe.init_from is not None and not (Path(recipe.init_from) / "config.json").is_file():
        found = (
            "no such folder"
            if not Path(recipe.init_from).is_dir()
            else "the folder holds no config.json"
        )
        raise RecipeError(
            f"init_from: {recipe.init_from}: {found}; give a model folder that medm saved"
        )
    if recipe.train.liger:
        require_liger()
    for name, part in recipe.parts.items():
        if part.quantize == "4bit":
            require_4bit(name=name)


@contextmanager
def whole_models(args: TrainingArguments) -> Iterator[None]:
    """Build models unpartitioned inside, also under ZeRO-3.

    transformers would partition them over the ranks while building, and published files would not
    fit.
    """
    if args.deepspeed is None:
        yield
        return
    from transformers.integrations.deepspeed import (
        set_hf_deepspeed_config,
        unset_hf_deepspeed_config,
    )

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(args.hf_deepspeed_config)


def training_arguments(options: TrainOptions, output_dir: Path) -> TrainingArguments:
    """Check every name and value, and build the arguments.

    Optimizer and schedule are tried on one weight.

    Raises:
        RecipeError: an unknown name, a name without effect, or a value that transformers refuses.
        DeviceError: a required GPU or package is missing.
    """
    if options.require_gpu and not torch.cuda.is_available():
        raise DeviceError(
            "train.require_gpu: no CUDA device found; check the driver, or leave the key out "
            "to use the CPU"
        )
    _check_trackers(
        [options.report_to] if isinstance(options.report_to, str) else options.report_to
    )
    _check_name("optim", options.optim, OptimizerNames)
    _check_name("lr_scheduler_type", options.lr_scheduler_type, SchedulerType)
    if options.deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
        raise DeviceError(
            "train.deepspeed: deepspeed is not installed; pip install deepspeed, or leave the "
            "key out"
        )
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name in options.arguments:
        if name in _WITHOUT_EFFECT:
            raise RecipeError(
                f"train.arguments.{name}: has no effect in medm ({_WITHOUT_EFFECT[name]}); leave "
                "it out"
            )
        if name not in known:
            raise RecipeError(
                f"train.arguments.{name}: TrainingArguments of transformers has no such "
                f"field{suggest(name, known)}"
            )
    values: dict[str, Any] = {
        name: getattr(options, name)
        for name, field in TrainOptions.model_fields.items()
        if Mark.OWN not in field.metadata
    }
    values |= {**_DECIDED, **options.arguments, "output_dir": str(output_dir)}
    if not values["lr_scheduler_kwargs"]:
        del values["lr_scheduler_kwargs"]
    if (
        options.load_best_model_at_end
        and options.save_strategy == "steps"
        and options.eval_strategy == "steps"
    ):
        values["eval_steps"] = options.eval_steps or options.save_steps
    if options.early_stopping_patience and not options.metric_for_best_model:
        values["metric_for_best_model"] = "loss"
    if options.deepspeed is not None:
        from medm.training.deepspeed import configuration

        values["deepspeed"] = configuration(options)
    try:
        arguments = TrainingArguments(**values)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"train: transformers refuses these arguments: {error}") from None
    except ImportError as error:
        raise DeviceError(
            f"train: a package that these arguments need is not installed: {error}"
        ) from None
    _try_optimizer(arguments)
    if arguments.n_gpu > 1:
        logger.warning(
            "%d GPUs are visible and one is used; `medm launch train` uses all of them",
            arguments.n_gpu,
        )
        arguments._n_gpu = (
            1  # torch's DataParallel, which transformers would choose, cannot split our batches
        )
    set_timeout(options.ddp_timeout)  # the process group is there since `n_gpu` was read
    return arguments


def _check_trackers(names: list[str]) -> None:
    """Raise for a tracker that transformers does not know, or whose package is not installed."""
    installed = get_available_reporting_integrations()
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise RecipeError(
                f"train.report_to: no tracker {name!r}{suggest(name, INTEGRATION_TO_CALLBACK)}"
            )
        if name not in installed:
            raise DeviceError(
                f"train.report_to: {name} is not installed; {_install(name)}, or leave the key out"
            )


def _check_name(key: str, name: str, kind: type[Enum]) -> None:
    known = [str(member.value) for member in kind]
    if name not in known:
        raise RecipeError(f"train.{key}: unknown name {name!r}{suggest(name, known)}")


def _install(package: str) -> str:
    extra = _EXTRAS.get(package)
    return f"pip install 'medm[{extra}]'" if extra else f"install its package ({package})"


def _try_optimizer(arguments: TrainingArguments) -> None:
    """Build optimizer and schedule for one weight.

    Their errors then appear before the model is loaded.
    """
    name, weight = (
        getattr(arguments.optim, "value", arguments.optim),
        nn.Parameter(torch.zeros(2, 2)),
    )
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        kind([{"params": [weight], "lr": arguments.learning_rate, "weight_decay": 0.0}], **settings)
    except ImportError as error:
        text = " ".join(str(error).split())
        package = next((package for package in _EXTRAS if package in text), None)
        advice = f"; {_install(package)}, or choose another optimizer" if package else f" ({text})"
        raise DeviceError(
            f"train.optim: {name} needs a package that is not installed{advice}"
        ) from None
    except Exception as error:  # noqa: BLE001  # a dozen packages make optimizers, each with errors of its own
        text = " ".join(str(error).split())
        raise RecipeError(f"train.optim: {name} cannot be used here: {text}") from None
    try:
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=torch.optim.SGD([weight], lr=1.0),
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=cast(dict[str, Any], arguments.lr_scheduler_kwargs or {}),
        )
    except (TypeError, ValueError, KeyError) as error:
        chosen = getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)
        raise RecipeError(
            f"train.lr_scheduler_type: {chosen} refuses train.lr_scheduler_kwargs = "
            f"{arguments.lr_scheduler_kwargs or {}}: {error}"
        ) from None
