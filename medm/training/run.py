"""A recipe, run: build, check the data, train, and leave a model folder that opens anywhere."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from medm.data.check import require_sources
from medm.errors import CheckpointError
from medm.launcher import LINK
from medm.llms.attention import in_one_kernel
from medm.models import build
from medm.models.manifest import sync, write_manifest
from medm.objectives import OBJECTIVES
from medm.objectives.base import Objective
from medm.training.arguments import training_arguments
from medm.training.callbacks import LossCurve, Progress
from medm.training.card import data_hashes, write_record
from medm.training.data import TrainingData
from medm.training.diagnostics import TugOfWar, Watched, WithTasks, require_measurable
from medm.training.features import keep_features
from medm.training.kernels import compile_layers, use_liger
from medm.training.options import TrainOptions
from medm.training.parts import PartTable, apply_parts
from medm.training.processes import on_first
from medm.training.recipe import Recipe, resolved
from medm.training.trainer import MedmTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    output_dir: Path
    finished: bool
    """False when a signal stopped it; start it again with `resume=True`."""
    steps: int
    loss: float | None
    """The last training loss that was logged."""


def train(recipe: Recipe, *, resume: bool = False) -> Outcome:
    """Train what a recipe describes.

    Args:
        recipe: see `load_recipe`.
        resume: go on from the newest whole checkpoint of `output_dir`, and start where there is none.

    Returns:
        How it ended. The model is in `output_dir` itself, checkpoints in folders beneath it.

    Raises:
        MedmError: anything that the user can mend, before the first step wherever that is possible.
    """
    output_dir = Path(recipe.output_dir)
    require_sources(recipe.data)  # before weights are read, which takes minutes
    transformers_logging.disable_progress_bar()
    set_seed(recipe.train.seed)  # new connectors and adapters are drawn from it
    # Before the arguments: with ZeRO-3 they make transformers build models in pieces, which published files do not fit.
    model, processor = build(recipe.model, init_from=recipe.init_from)
    args = training_arguments(recipe.train, output_dir)
    table = apply_parts(model, recipe.parts, recipe.train, keep_float32=recipe.train.deepspeed is None)
    if args.process_index == 0:
        logger.info("what is trained\n%s", table)
    data = TrainingData(
        recipe.data, recipe.train, processor, rank=args.process_index, world=args.world_size,
        flat=recipe.data.packing and _any_lengths(model, recipe.train, args.device) and model.separate_samples(),
    )  # fmt: skip
    hashes = on_first(lambda: data_hashes(data.files))
    if recipe.data.cache_features is not None:
        root = Path(recipe.data.cache_features)
        data.use_features(
            keep_features(
                model, root, data.train.preprocess, data.records,
                device=args.device, bad_records=recipe.data.bad_records,
            )
        )  # fmt: skip
    if recipe.train.liger:
        use_liger(model.parts().get("llm"))
    if recipe.train.torch_compile:
        compile_layers(model, deepspeed=recipe.train.deepspeed)
    goal, callbacks = objective(recipe), _callbacks(recipe)
    if recipe.diagnostics is not None:
        tasks = list(getattr(processor, "tasks", None) or [])
        require_measurable(goal, tasks, packing=recipe.data.packing, deepspeed=recipe.train.deepspeed)
        goal = Watched(goal, batches=recipe.diagnostics.batches)
        data.collate = WithTasks(data.collate, other=len(tasks))
        callbacks.append(TugOfWar(goal, model.parts(), tasks=tasks, every=recipe.diagnostics.every))
    trainer = MedmTrainer(
        model, args,
        objective=goal, parts=recipe.parts, train_options=recipe.train, train_dataset=data.train,
        sampler=data.sampler, data_collator=data.collate, eval_dataset=data.evaluation,
        eval_collator=data.eval_collate, processing_class=processor, callbacks=callbacks,
        recipe=resolved(recipe), data_hashes=hashes,
    )  # fmt: skip
    with trainer.interruption.listening():
        finished = trainer.fit(resume=resume)
        if finished:
            _save_final(trainer, recipe, table, data)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Outcome(output_dir, finished, trainer.state.global_step, losses[-1] if losses else None)


def _any_lengths(model: Any, options: TrainOptions, device: torch.device) -> bool:
    """Whether layers take a row of samples of any lengths: compiled ones do where one kernel attends to all of them."""
    if not options.torch_compile:
        return True
    dtype = torch.bfloat16 if options.bf16 else torch.float16 if options.fp16 else torch.float32
    language_model = model.parts().get("llm")
    return language_model is not None and in_one_kernel(language_model, device=device, dtype=dtype)


def objective(recipe: Recipe) -> Objective:
    """The objective that a recipe names, with its options."""
    options = recipe.objective.model_dump()
    return OBJECTIVES.get(options.pop("name"))(**options)


def _callbacks(recipe: Recipe) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [Progress(), LossCurve()]
    if recipe.train.early_stopping_patience is not None:
        callbacks.append(
            EarlyStoppingCallback(recipe.train.early_stopping_patience, recipe.train.early_stopping_threshold)
        )
    return callbacks


def _save_final(trainer: MedmTrainer, recipe: Recipe, table: PartTable, data: TrainingData) -> None:
    """Write the model aside, then put its files into `output_dir`; `config.json`, without which nothing opens, last."""
    output_dir = Path(recipe.output_dir)
    folder = output_dir / ".tmp-model"
    trainer.save_whole(folder)
    if trainer.args.process_index == 0:
        with LINK.writing():
            write_record(
                folder, recipe=resolved(recipe), table=table, hashes=trainer.data_hashes,
                history=trainer.state.log_history, counts=data.counts,
            )  # fmt: skip
            write_manifest(folder, {"step": trainer.state.global_step})
            publish(folder, output_dir)
        logger.info("the model is in %s. Not for clinical use.", output_dir)


def publish(folder: Path, output_dir: Path) -> None:
    """Move a finished model's files into a folder, in an order that never shows half a model.

    Raises:
        CheckpointError: the disk does not take them; the files stay aside.
    """
    last = "config.json"
    try:
        (output_dir / last).unlink(missing_ok=True)
        # One file of an earlier model would be preferred to the shards of this one.
        for old in [*output_dir.glob("*.safetensors"), *output_dir.glob("*.safetensors.index.json")]:
            old.unlink()
        for path in sorted(folder.iterdir(), key=lambda path: path.name == last):
            target = output_dir / path.name
            if path.is_dir() and target.is_dir():
                shutil.rmtree(target)
            sync(path)
            path.replace(target)
        sync(output_dir)
    except OSError as error:
        raise CheckpointError(
            f"{output_dir}: the trained model could not be put in place ({error}); it is in {folder}"
        ) from None
    folder.rmdir()
