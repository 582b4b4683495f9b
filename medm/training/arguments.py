"""From the `train` section of a recipe to `transformers.TrainingArguments`, whatever 5.x release is there."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from medm.errors import DeviceError, RecipeError, suggest
from medm.training.options import TrainOptions

logger = logging.getLogger(__name__)

_OURS = {
    "gradient_checkpointing", "torch_compile", "liger", "save_in_background", "early_stopping_patience",
    "early_stopping_threshold", "require_gpu", "deepspeed", "arguments",
}  # fmt: skip
"""Keys of `TrainOptions` that other code reads (parts, callbacks, this file)."""

_DECIDED = {
    "remove_unused_columns": False,  # a batch holds what the objective reads, not what a signature lists
    "logging_nan_inf_filter": False,  # it would hide a loss that is no number
    "disable_tqdm": True,  # the progress line is ours
    "prediction_loss_only": True,
    "restore_callback_states_from_checkpoint": True,  # early stopping goes on counting after a resume
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
    "average_tokens_across_devices": "losses are always divided by the items of all processes",
    **dict.fromkeys(_DECIDED, "medm decides it"),
}

_LOG_EXTRA = ("tensorboard", "wandb")
"""Trackers that come with the extra `log`."""


def training_arguments(options: TrainOptions, output_dir: Path) -> TrainingArguments:
    """Check every name and value, and build the arguments.

    Raises:
        RecipeError: an unknown name, a name without effect, or a value that transformers refuses.
        DeviceError: a GPU was required and there is none, or a tracker is not installed.
    """
    if options.require_gpu and not torch.cuda.is_available():
        raise DeviceError(
            "train.require_gpu: no CUDA device is there; check the driver, or leave the key out to use the CPU"
        )
    trackers = [options.report_to] if isinstance(options.report_to, str) else options.report_to
    for tracker in trackers:
        if tracker in _LOG_EXTRA and importlib.util.find_spec(tracker) is None:
            raise DeviceError(
                f"train.report_to: {tracker} is not installed; pip install 'medm[log]', or leave the key out"
            )
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name in options.arguments:
        if name in _WITHOUT_EFFECT:
            raise RecipeError(f"train.arguments.{name}: has no effect in medm ({_WITHOUT_EFFECT[name]}); leave it out")
        if name not in known:
            raise RecipeError(
                f"train.arguments.{name}: TrainingArguments of transformers has no such field{suggest(name, known)}"
            )
    values: dict[str, Any] = {name: getattr(options, name) for name in TrainOptions.model_fields if name not in _OURS}
    values |= {**_DECIDED, **options.arguments, "output_dir": str(output_dir)}
    if not values["lr_scheduler_kwargs"]:
        del values["lr_scheduler_kwargs"]
    if options.load_best_model_at_end and options.save_strategy == "steps" and options.eval_strategy == "steps":
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
    if arguments.n_gpu > 1:
        logger.warning("%d GPUs are visible and one is used; `medm launch train` uses all of them", arguments.n_gpu)
        arguments._n_gpu = 1  # torch's DataParallel, which transformers would choose, cannot split our batches
    return arguments
