"""Training run of a recipe: build, check the data, train, and write a model folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from medm.data.check import require_sources
from medm.data.concepts import ConceptCounts
from medm.data.pipelines import PIPELINES, pipeline_for
from medm.distributed import on_rank_zero
from medm.errors import CheckpointError, RecipeError, suggest
from medm.files import move_contents, replace_directory
from medm.launcher import LINK
from medm.models import build, kind_of
from medm.models.manifest import MANIFEST, read_manifest, write_manifest
from medm.models.provenance import read_concepts
from medm.objectives.terms import terms_of
from medm.training import checkpoints
from medm.training.arguments import on_this_machine, require_start, training_arguments, whole_models
from medm.training.callbacks import LossCurve, Progress
from medm.training.card import data_hashes, write_record
from medm.training.data import TrainingData
from medm.training.diagnostics import (
    BatchRecorder,
    GradientConflictCallback,
    TaskTaggingCollator,
    require_measurable,
)
from medm.training.feature_caching import cache_features
from medm.training.kernels import any_lengths, apply_kernels
from medm.training.options import TrainOptions
from medm.training.parts import PartTable, apply_parts
from medm.training.recipe import Recipe, differences, resolved
from medm.training.resumable import check_continues, lock_on_rank_zero
from medm.training.trainer import MedmTrainer
from medm.types import Processor

if TYPE_CHECKING:
    from medm.training.task_monitor import TaskMonitor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of a run."""

    output_dir: Path
    finished: bool
    """False when a signal stopped it; `resume=True` continues it."""
    steps: int
    loss: float | None
    """Last training loss that was logged."""


def train(recipe: Recipe, *, resume: bool = False) -> Outcome:
    """Run the training that a recipe describes.

    Args:
        recipe: see `load_recipe`.
        resume: continue from the newest complete checkpoint of `output_dir`; without one, start
            from the beginning.

    Returns:
        The outcome. The model is in `output_dir` itself, checkpoints in folders beneath it.

    Raises:
        MedmError: anything that the user can fix, before the first step wherever that is possible.
    """
    output_dir = Path(recipe.output_dir)
    transformers_logging.disable_progress_bar()
    # Fail early: reading weights takes minutes, and recipe, folders and packages can be checked
    # before.
    options, fallback = on_this_machine(recipe.train)
    require_sources(recipe.data, PIPELINES.get(kind_of(recipe.model).pipeline).formats)
    require_start(recipe)
    _require_folders(recipe)
    _require_zero3_support(recipe)
    args = training_arguments(options, output_dir)
    with lock_on_rank_zero(output_dir):
        if (done := on_rank_zero(lambda: _require_usable(recipe, args, resume=resume))) is not None:
            return done
        return _train(recipe, options, args, resume=resume, fallback=fallback)


def _require_folders(recipe: Recipe) -> None:
    """Raise `RecipeError` for a monitor whose folder is not there."""
    for number, monitor in enumerate(recipe.monitors):
        if not Path(monitor.data).is_dir():
            raise RecipeError(f"monitors.{number}.data: {monitor.data}: no such folder")


def _require_zero3_support(recipe: Recipe) -> None:
    """Raise `RecipeError` for ZeRO-3 where the kind of model cannot run under it."""
    if recipe.train.deepspeed is None:
        return
    from medm.training.deepspeed import zero_stage

    reason = kind_of(recipe.model).model_class.zero3_refusal
    if reason is not None and zero_stage(recipe.train.deepspeed) == 3:
        raise RecipeError(
            f"train.deepspeed: models of kind {recipe.model.kind!r} cannot be trained under "
            f"ZeRO-3: {reason}; use zero2, or train without DeepSpeed"
        )


def _require_usable(recipe: Recipe, args: TrainingArguments, *, resume: bool) -> Outcome | None:
    """Check the output folder, and publish a finished model that is not in its place yet.

    Returns:
        The outcome of a run that is complete after that, else None.

    Raises:
        RecipeError: the folder holds another run, or a run of another recipe.
        CheckpointError: another number of processes wrote the checkpoint, or a model cannot be put
            in place.
    """
    output_dir = Path(recipe.output_dir)
    if not resume:
        checkpoints.check_unused(output_dir)
        return None
    if (folder := output_dir / checkpoints.FINISHED).is_dir():
        return _finish(folder, recipe)
    for start in checkpoints.folders(output_dir)[:1]:
        try:
            manifest = read_manifest(start)
        except CheckpointError:  # an older checkpoint may be complete; the trainer looks for it
            break
        if isinstance(manifest.get("recipe"), dict) and isinstance(manifest.get("world_size"), int):
            check_continues(start, manifest, recipe=resolved(recipe), world_size=args.world_size)
    return None


def _finish(folder: Path, recipe: Recipe) -> Outcome:
    """Publish the complete model of an earlier run of this recipe that could not be published."""
    output_dir, manifest = Path(recipe.output_dir), checkpoints.finished_manifest(folder)
    if changed := differences(manifest["recipe"], resolved(recipe)):
        raise RecipeError(
            f"{output_dir}: holds a trained model that could not be put in place ({folder.name}), "
            "of another recipe; undo the change, or choose another output_dir\n  "
            + "\n  ".join(changed)
        )
    publish(folder, output_dir)
    logger.info("the model was trained before; it is now in %s. Not for clinical use.", output_dir)
    return Outcome(output_dir, True, manifest["step"], manifest.get("loss"))


def _train(
    recipe: Recipe,
    options: TrainOptions,
    args: TrainingArguments,
    *,
    resume: bool,
    fallback: Mapping[str, str],
) -> Outcome:
    """Run the training with the options for this machine.

    The caller holds the lock on the output folder.
    """
    output_dir = Path(recipe.output_dir)
    set_seed(options.seed)  # of new connectors and adapters
    with whole_models(args):
        model, processor = build(recipe.model, init_from=recipe.init_from)
    table = apply_parts(model, recipe.parts, options, keep_float32=options.deepspeed is None)
    if args.process_index == 0:
        logger.info("what is trained\n%s", table)
    data = TrainingData(
        recipe.data,
        options,
        pipeline_for(kind_of(recipe.model), processor),
        rank=args.process_index,
        world=args.world_size,
        padding_free=recipe.data.packing
        and any_lengths(model, options, args.device)
        and model.enable_padding_free(),
    )
    hashes = on_rank_zero(lambda: data_hashes(data.files))
    if recipe.data.cache_features is not None:
        root = Path(recipe.data.cache_features)
        data.use_features(
            cache_features(
                model,
                root,
                data.train.preprocess,
                data.records,
                device=args.device,
                bad_records=recipe.data.bad_records,
            )
        )
    apply_kernels(model, options)
    terms, callbacks = terms_of(recipe.objective), _callbacks(recipe)
    monitors = _monitors(recipe, processor)
    if recipe.diagnostics is not None:
        tasks = list(getattr(processor, "tasks", None) or [])
        require_measurable(terms, tasks, packing=recipe.data.packing, deepspeed=options.deepspeed)
        recorder = BatchRecorder(terms, batches=recipe.diagnostics.batches)
        terms = recorder
        data.collate = TaskTaggingCollator(data.collate, other=len(tasks))
        every = recipe.diagnostics.every
        callbacks.append(
            GradientConflictCallback(recorder, model.parts(), tasks=tasks, every=every)
        )
    trainer = MedmTrainer(
        model,
        args,
        terms=terms,
        parts=recipe.parts,
        train_options=options,
        train_dataset=data.train,
        sampler=data.sampler,
        data_collator=data.collate,
        eval_dataset=data.evaluation,
        eval_collator=data.eval_collate,
        processing_class=processor,
        callbacks=callbacks,
        monitors=monitors,
        recipe=resolved(recipe),
        data_hashes=hashes,
    )
    for monitor in monitors:
        monitor.show_samples(output_dir, trainer.callback_handler.callbacks)
    with trainer.interruption.listening():
        finished = trainer.fit(resume=resume, locked=True)
        if finished:
            _save_final(trainer, recipe, table, data, fallback=fallback)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Outcome(output_dir, finished, trainer.state.global_step, losses[-1] if losses else None)


def _callbacks(recipe: Recipe) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [Progress(), LossCurve()]
    if recipe.train.early_stopping_patience is not None:
        callbacks.append(
            EarlyStoppingCallback(
                recipe.train.early_stopping_patience, recipe.train.early_stopping_threshold
            )
        )
    return callbacks


def _monitors(recipe: Recipe, processor: Processor) -> list[TaskMonitor]:
    """Open the sets that are scored during the run. Raises `DataError` where one is incomplete."""
    if not recipe.monitors:
        return []
    from medm.training.task_monitor import TaskMonitor
    from medm.training.zero_shot_monitor import ZeroShotMonitor

    kind = kind_of(recipe.model)
    opened: list[TaskMonitor] = []
    for options in recipe.monitors:
        if options.scores_texts:
            opened.append(ZeroShotMonitor(options, kind, processor))
            continue
        gives = recipe.model.predicted_fields()
        opened.append(TaskMonitor(options, kind, processor, gives=gives))
    metric = (recipe.train.metric_for_best_model or "").removeprefix("eval_")
    for monitor in opened:
        label, _, name = metric.rpartition("_")
        if label == monitor.options.task.label and name not in monitor.metrics:
            raise RecipeError(
                f"train.metric_for_best_model: {label} has no metric {name!r}"
                f"{suggest(name, monitor.metrics)}; it has {', '.join(sorted(monitor.metrics))}"
            )
    return opened


def _save_final(
    trainer: MedmTrainer,
    recipe: Recipe,
    table: PartTable,
    data: TrainingData,
    *,
    fallback: Mapping[str, str],
) -> None:
    """Write the complete model into a staging folder, then move its files into `output_dir`.

    All ranks call it.
    """
    output_dir = Path(recipe.output_dir)
    folder = output_dir / ".tmp-model"
    trainer.save_whole(folder)
    counts, concepts = data.counts, data.concepts
    with LINK.writing():
        on_rank_zero(
            lambda: _finish_folder(folder, trainer, recipe, table, counts, concepts, fallback)
        )
    if trainer.args.process_index == 0:
        logger.info("the model is in %s. Not for clinical use.", output_dir)


def _finish_folder(
    folder: Path,
    trainer: MedmTrainer,
    recipe: Recipe,
    table: PartTable,
    counts: Mapping[str, int],
    concepts: ConceptCounts,
    fallback: Mapping[str, str],
) -> None:
    """Add the records and the manifest to a folder of weights, and publish it.

    Raises:
        CheckpointError: the disk does not take it. A complete folder stays, and --resume finishes.
    """
    output_dir = Path(recipe.output_dir)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metadata = {
        "step": trainer.state.global_step,
        "loss": losses[-1] if losses else None,
        "recipe": resolved(recipe),
    }
    earlier = None if recipe.init_from is None else read_concepts(Path(recipe.init_from))
    named = concepts.as_json(earlier=earlier) if concepts.records or earlier else None
    try:
        write_record(
            folder,
            recipe=resolved(recipe),
            text=kind_of(recipe.model).card_text(recipe.model),
            table=table,
            hashes=trainer.data_hashes,
            history=trainer.state.log_history,
            counts=counts,
            device=trainer.args.device.type,
            fallback=fallback,
            concepts=named,
        )
        write_manifest(folder, metadata)
        finished = output_dir / checkpoints.FINISHED
        replace_directory(folder, finished)
    except OSError as error:
        raise CheckpointError(
            f"{output_dir}: the trained model could not be written ({error.strerror or error}); "
            "make room, then continue with --resume"
        ) from None
    publish(finished, output_dir)


def publish(folder: Path, output_dir: Path) -> None:
    """Move the files of a finished model into a folder, the config last.

    A folder without a config is no model. A second call, after an error or a kill, moves the rest.

    Raises:
        CheckpointError: the disk does not take them; files that were not moved stay in `folder`.
    """
    try:
        own = {path.name for path in folder.iterdir()}
        if MANIFEST in own:  # it lists the files that were moved before
            own |= {name.partition("/")[0] for name in read_manifest(folder)["files"]}
        if own - {"config.json"}:
            (output_dir / "config.json").unlink(missing_ok=True)
            # transformers would prefer one file of an earlier model to the shards of this one.
            for old in [
                *output_dir.glob("*.safetensors"),
                *output_dir.glob("*.safetensors.index.json"),
            ]:
                if old.name not in own or (folder / old.name).exists():
                    old.unlink()
        move_contents(folder, output_dir, last=(MANIFEST, "config.json"))
    except OSError as error:
        raise CheckpointError(
            f"{output_dir}: the trained model could not be put in place "
            f"({error.strerror or error}); it is complete in {folder}: fix the output folder, then "
            "--resume moves it"
        ) from None
