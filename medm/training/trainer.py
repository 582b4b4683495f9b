"""transformers' Trainer for objectives, independent of modality.

A model gives its parts, objectives turn its outputs into losses, a sampler gives the order of the
samples. The trainer adds learning rates per part, losses divided by the items of the whole step,
the model's own action after a step, and a stop at the first non-finite number.
`medm.training.resumable` writes checkpoints.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy

from medm.data.sampling import DistributedBatchSampler, Sequential
from medm.distributed import all_gather_objects, any_rank
from medm.errors import DataError, MedmError, NonFiniteError, RecipeError
from medm.models.base import MedmModel
from medm.objectives.terms import Losses, Terms
from medm.stopping import ignore_stops
from medm.training.options import PartOptions, TrainOptions
from medm.training.parts import frozen_modules, parameter_groups
from medm.training.resumable import ResumableTrainer
from medm.types import Batch

logger = logging.getLogger(__name__)

MAX_OVERFLOWS = 50
"""Optimizer steps in a row that fp16 loss scaling may skip before the run counts as broken."""

Collate: TypeAlias = Callable[[list[Any]], Batch]
"""Function from samples to a batch. The data pipeline chooses the type of a sample; the trainer
does not look into one."""


class BatchSampler(Protocol):
    """Batches of sample indices of this rank: a pure function of seed, epoch and position."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that `__iter__` goes through."""
        ...

    def __iter__(self) -> Iterator[list[int]]:
        """Positions in the dataset, one list per micro-batch."""
        ...

    def __len__(self) -> int:
        """Micro-batches per epoch; the same on every rank."""
        ...


class _Epochs:
    """A batch sampler whose epoch also seeds the loader's workers and reaches the dataset."""

    def __init__(self, sampler: BatchSampler, dataset: Dataset[object], seed: int) -> None:
        self.sampler, self.dataset, self.seed = sampler, dataset, seed
        self.generator = torch.Generator()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed * 1_000_003 + epoch)
        self.sampler.set_epoch(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class _SetEpoch(TrainerCallback):
    """Sets the epoch of the sampler before the loader is asked for its first batch."""

    def __init__(self, epochs: _Epochs) -> None:
        self.epochs = epochs

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self.epochs.set_epoch(int(state.epoch or 0))


class _LogLastStep(TrainerCallback):
    """Logs the last step, and the step after which a signal stops the run."""

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if state.global_step >= state.max_steps or control.should_training_stop:
            control.should_log = True


class _AfterStep(TrainerCallback):
    """Lets the model act after each optimizer step."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self.act()


class _BatchError:
    """An error that was raised where a batch was read: in a worker, or on one of several ranks.

    It travels in place of the batch.
    """

    def __init__(self, error: MedmError | OSError) -> None:
        self.error = error


class _ErrorReturningDataset(Dataset[object]):
    """A dataset that returns its errors as items.

    An error that is raised in a worker would arrive as the text of a traceback.
    """

    def __init__(self, dataset: Dataset[object]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, index: int) -> object:
        try:
            return self.dataset[index]
        except (MedmError, OSError) as error:
            return _BatchError(error)


class _ErrorReturningCollator:
    """A collator that returns the first error among its samples in place of a batch."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, samples: list[object]) -> Batch | _BatchError:
        error = next((sample for sample in samples if isinstance(sample, _BatchError)), None)
        return self.collate(samples) if error is None else error


class Monitor(Protocol):
    """Scores of the model beside the loss of held-out data."""

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Return the scores of a model in eval mode by their keys in the log; on all ranks."""
        ...


class MedmTrainer(ResumableTrainer):
    """Trains `model` on the weighted sum of `terms`.

    Args:
        model: has `parts()`; `medm.training.parts.apply_parts` was called on it.
        args: see `medm.training.arguments`.
        terms: objectives by name, with weights.
        parts: options of each part, from which the groups of the optimizer follow.
        train_options: the `train` section.
        train_dataset: map-style; `set_epoch` is called if it has one.
        sampler: this rank's micro-batches.
        data_collator: list of samples -> batch.
        eval_dataset: held-out data for the loss during training.
        eval_collator: list of held-out samples -> batch; default: `data_collator`.
        processing_class: saved beside the weights.
        callbacks: further callbacks.
        monitors: scores that are measured and logged with the loss of the held-out data.
        recipe: the resolved recipe; stored in every checkpoint, and compared when a run continues.
        data_hashes: sha256 of every annotation file; stored and compared likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        terms: Terms,
        parts: Mapping[str, PartOptions],
        train_options: TrainOptions,
        train_dataset: Dataset[object],
        sampler: BatchSampler,
        data_collator: Collate,
        eval_dataset: Dataset[object] | None = None,
        eval_collator: Collate | None = None,
        processing_class: object = None,
        callbacks: Sequence[TrainerCallback] = (),
        monitors: Sequence[Monitor] = (),
        recipe: Mapping[str, object] | None = None,
        data_hashes: Mapping[str, str] | None = None,
    ) -> None:
        self.terms = terms
        self.parts: dict[str, PartOptions] = dict(parts)
        self.epochs = _Epochs(sampler, train_dataset, args.seed)
        self.eval_collator = eval_collator or data_collator
        self.monitors = monitors
        super().__init__(
            model,
            args,
            train_options=train_options,
            recipe=recipe,
            data_hashes=data_hashes,
            callbacks=[
                _SetEpoch(self.epochs),
                _LogLastStep(),
                _AfterStep(self._after_step),
                *callbacks,
            ],
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            processing_class=processing_class,
        )
        self.remove_callback(PrinterCallback)
        # Terms are divided by the items of the whole step: the Trainer must not divide again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._held_out: list[Tensor] = []
        self._frozen = frozen_modules(model)
        self._term_sums: dict[str, Tensor] = {}
        self._overflows = 0
        # A step whose records were all left out has no loss, which is not a loss of 0.
        self._steps_since_log = 0
        self._steps_with_items = torch.zeros((), dtype=torch.int64, device=args.device)
        self._loss_sum, self._loss_steps = 0.0, 0

    # Data -----------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[object]:
        workers = self._num_workers
        return DataLoader(
            _ErrorReturningDataset(self.epochs.dataset),
            batch_sampler=self.epochs,
            collate_fn=_ErrorReturningCollator(self.data_collator),
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            worker_init_fn=ignore_stops,
            generator=self.epochs.generator,
        )

    def get_eval_dataloader(
        self, eval_dataset: str | Dataset[object] | None = None
    ) -> DataLoader[object]:
        """Return a loader of every held-out sample once.

        A rank that has none left runs a batch that counts nothing.
        """
        dataset = cast("Dataset[object]", eval_dataset or self.eval_dataset)
        return DataLoader(
            _ErrorReturningDataset(dataset),
            batch_sampler=DistributedBatchSampler(
                Sequential(len(cast(Sized, dataset))),
                batch_size=self.args.eval_batch_size,
                rank=self.args.process_index,
                world=self.args.world_size,
            ),
            collate_fn=_ErrorReturningCollator(self.eval_collator),
            num_workers=self._num_workers,
            worker_init_fn=ignore_stops,
            generator=torch.Generator(),  # the run's own random numbers stay as they are
        )

    @property
    def _num_workers(self) -> int:
        """Number of workers of a loader: that of the recipe, at most one per processor.

        The samples do not depend on it.
        """
        return min(self.args.dataloader_num_workers, max(len(os.sched_getaffinity(0)), 1))

    def _prepare_input(self, data: object) -> object:
        """Move inputs to the device.

        Pinned tensors are copied to a GPU while the previous step still runs there.
        """
        if isinstance(data, Tensor) and self.args.device.type == "cuda" and data.is_pinned():
            data = data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch | _BatchError], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        """Return the micro-batches of a step, and its items by objective, (K,), over all ranks.

        An error of one rank stops all of them.
        """
        batches: list[Batch] = []
        error: Exception | None = None
        try:
            for batch in islice(epoch_iterator, num_batches):
                if isinstance(batch, _BatchError):
                    raise batch.error
                batches.append(batch)
        except (MedmError, OSError, EOFError) as caught:
            error = caught
        except RuntimeError as caught:
            if "DataLoader worker" not in str(caught):
                raise
            error = MedmError(
                f"a process that reads the data was ended from outside ({caught}): often the "
                "machine was out of memory. Lower train.dataloader_num_workers or free memory, "
                "then continue with --resume"
            )
        if not batches and error is None:
            return batches, None
        return batches, self._count_items(batches, error, device)

    def _count_items(
        self, batches: list[Batch], error: Exception | None, device: torch.device
    ) -> Tensor:
        """Return the items of a step by objective, (K,), at least 1, over all ranks.

        Raises on all ranks the error of one, and for too many bad records.
        """
        bad = getattr(self.epochs.dataset, "num_bad", 0)
        counts = self.terms.total_counts(batches, device)
        if self.args.world_size > 1:
            own = torch.cat([counts, torch.tensor([bad, error is not None], device=device)])
            everywhere = self.accelerator.gather(own).view(-1, len(own)).sum(dim=0)
            counts, (all_bad, errors) = everywhere[:-2], everywhere[-2:]
            bad = int(all_bad)
            if errors:
                texts = all_gather_objects(None if error is None else str(error))
                rank, text = next(
                    (rank, text) for rank, text in enumerate(texts) if text is not None
                )
                error = error or MedmError(f"process {rank}: {text}")
        if error is not None:
            raise (
                error
                if isinstance(error, MedmError)
                else MedmError(f"the data cannot be read: {error}")
            ) from error
        self._require_few_bad(self.epochs.dataset, bad, what="training")
        self._steps_since_log += 1
        self._steps_with_items += (counts > 0).any()
        return counts.clamp(min=1)

    def _require_few_bad(self, dataset: Any, bad: int, *, what: str) -> None:
        """Stop if more records are bad than the recipe allows.

        All ranks call it with the same number.

        Args:
            dataset: its records are counted.
            bad: sum over the ranks; a record that several ranks drew counts several times.
            what: name of the data, for the message.
        """
        limit = getattr(dataset, "bad_records_limit", None)
        if limit is None or not limit.exceeded(bad):
            return
        different = sorted(set().union(*all_gather_objects(dataset.noted("bad"))))
        if limit.exceeded(len(different)):
            raise limit.error(len(different), dataset.place(different[-1]), what=what)

    # Loss -----------------------------------------------------------------------------------------

    def create_optimizer(self, *args: object, **kwargs: object) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(self._module, self.parts, self.train_options)
            cls, settings = self.get_optimizer_cls_and_kwargs(self.args)
            if self.is_deepspeed_enabled:
                from medm.training.deepspeed import check_parameters, offloaded_optimizer

                check_parameters(self._module)
                cls = offloaded_optimizer(self.args) or cls
                settings = {key: value for key, value in settings.items() if key != "fused"}
            self.optimizer = cls(groups, **settings)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """Create the schedule.

        Warm-up as a fraction is rounded up, and must leave steps of a short run.
        """
        if (
            self.args.warmup_steps < 1
            and self.args.get_warmup_steps(num_training_steps) >= num_training_steps
        ):
            self.args.warmup_steps = max(num_training_steps - 1, 0)
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        self._keep_frozen_in_eval()
        losses = self.terms(model, inputs, cast(Tensor, num_items_in_batch))
        self._require_finite(losses)
        # Gradients are averaged over ranks, while the items are counted over all of them.
        world_size = self.accelerator.num_processes
        for name, value in losses.terms.items():
            before = self._term_sums.get(name, value.new_zeros(()))
            self._term_sums[name] = before + value * world_size
        return losses.total * world_size

    def _after_step(self) -> None:
        """Call the model's `after_step`, unless an overflow of fp16 skipped the step."""
        model = self._module
        if not isinstance(model, MedmModel) or self.accelerator.optimizer_step_was_skipped:
            return
        with torch.no_grad():
            changed = model.after_step()
        if changed and self.is_deepspeed_enabled:
            from medm.training.deepspeed import copy_to_optimizer

            copy_to_optimizer(changed)

    def _keep_frozen_in_eval(self) -> None:
        """Keep frozen parts in eval mode: no dropout, no moving statistics.

        Layers with activation checkpointing keep the flag `training`, which it depends on.
        """
        for part in self._frozen:
            part.eval()
            for module in part.modules():
                if getattr(module, "gradient_checkpointing", False):
                    module.training = True

    def evaluation_loop(
        self,
        dataloader: DataLoader[object],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Measure each term as a mean over its items of the held-out data.

        The result does not depend on batch size or number of ranks.
        """
        self._held_out = []
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        sums = torch.stack(self._held_out).sum(dim=0)  # (2, K): of the losses, of the items
        if self.args.world_size > 1:
            sums = self.accelerator.gather(sums).view(-1, *sums.shape).sum(dim=0)
        bad = sum(all_gather_objects(getattr(self.eval_dataset, "num_bad", 0)))
        self._require_few_bad(self.eval_dataset, bad, what="held-out")
        totals, items = sums.tolist()
        if not any(items):
            raise DataError(
                "no held-out record could be used, so there is no loss to measure; look at "
                "data.eval"
            )
        loss = sum(total / count for total, count in zip(totals, items, strict=True) if count)
        metrics = {**(output.metrics or {}), f"{metric_key_prefix}_loss": loss}
        if self.monitors:
            metrics |= self._monitored()
        best = f"eval_{(self.args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        if metric_key_prefix == "eval" and best not in metrics:
            raise RecipeError(
                f"train.metric_for_best_model: {best} is not defined at step "
                f"{self.state.global_step}; there are {', '.join(sorted(metrics))}. Some metrics "
                "need more items, or items of several classes"
            )
        return output._replace(metrics=metrics)

    def _monitored(self) -> dict[str, float]:
        """Return the scores of the monitors."""
        assert isinstance(self.model, nn.Module)
        branches = dict(self.model.encoders()) if isinstance(self.model, MedmModel) else {}
        bypassed = {name: branch.encoder_bypassed for name, branch in branches.items()}
        scores: dict[str, float] = {}
        try:
            # Features are cached of the training's files alone: here every rank uses its encoders.
            for branch in branches.values():
                branch.encoder_bypassed = False
            with self.accelerator.autocast():  # as for the loss
                for monitor in self.monitors:
                    scores |= monitor.evaluate(self.model, self.state.global_step)
        finally:
            for name, branch in branches.items():
                branch.encoder_bypassed = bypassed[name]
        return scores

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        self._raise_on_all_ranks(inputs)
        inputs = self._prepare_inputs(dict(inputs))
        items = self.terms.counts(inputs)  # (K,)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = self.terms(model, inputs, items.clamp(min=1))
        self._require_finite(losses)
        self._held_out.append(torch.stack([losses.by_objective.double() * items, items.double()]))
        return None, None, None

    def _raise_on_all_ranks(self, batch: Batch | _BatchError) -> None:
        """Raise on all ranks the error that one of them got in place of a batch."""
        if any_rank(isinstance(batch, _BatchError), self.args.device):
            texts = [
                text
                for text in all_gather_objects(
                    str(batch.error) if isinstance(batch, _BatchError) else None
                )
                if text
            ]
            raise MedmError(f"held-out data cannot be read: {texts[0]}")

    def _require_finite(self, losses: Losses) -> None:
        """Raise `NonFiniteError` on all ranks, so that none waits for another."""
        if any_rank(not bool(torch.isfinite(losses.total.detach())), self.args.device):
            terms = "".join(f", {name} {value.item():g}" for name, value in losses.terms.items())
            raise NonFiniteError(
                f"the loss of step {self.state.global_step + 1} is {losses.total.item():g} on "
                f"this process{terms}; nothing of it was saved. Lower the learning rate, or look "
                "for damaged samples in this step's batch"
            )

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Tensor | float | None, *args: Any, **kwargs: Any
    ) -> None:
        norm = None if grad_norm is None else float(grad_norm)
        if norm is not None and not math.isfinite(norm):
            self._overflows += 1
            # With fp16 a step that overflowed is skipped and the scale lowered; that is how it
            # finds its scale.
            if not self.args.fp16 or self._overflows > MAX_OVERFLOWS:
                raise NonFiniteError(
                    f"the gradient norm of step {self.state.global_step} is {norm}; nothing of "
                    "this step was saved. Lower the learning rate, or use bf16"
                )
        else:
            self._overflows = 0
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        if self.interruption.raised and self.args.save_strategy == SaveStrategy.BEST:
            # An evaluation that is not the best took the request to save back.
            self._save_checkpoint(self._module, None)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = self._per_step_with_samples(logs)
        if "train_loss" in logs:  # transformers divides by all steps
            del logs["train_loss"]
            if self._loss_steps:
                logs["train_loss"] = self._loss_sum / self._loss_steps
        super().log(logs, start_time)

    def _per_step_with_samples(self, logs: dict[str, float]) -> dict[str, float]:
        """Divide the losses of a log entry by the number of steps that had samples.

        An entry without such a step has no losses.
        """
        steps, counted = self._steps_since_log, int(self._steps_with_items)
        self._steps_since_log = 0
        self._steps_with_items.zero_()
        losses = {
            "loss": logs["loss"] * steps,
            **{f"loss/{name}": value for name, value in self._drain_terms().items()},
        }
        rest = {name: value for name, value in logs.items() if name != "loss"}
        if counted < steps:
            rest["steps_without_samples"] = steps - counted
        if not counted:
            return rest
        self._loss_sum, self._loss_steps = (
            self._loss_sum + losses["loss"],
            self._loss_steps + counted,
        )
        return {**{name: value / counted for name, value in losses.items()}, **rest}

    def _drain_terms(self) -> dict[str, float]:
        terms = {name: value.item() for name, value in self._term_sums.items()}
        self._term_sums = {}
        everyone = all_gather_objects(terms)
        names = sorted({name for one in everyone for name in one})
        return {name: sum(one.get(name, 0.0) for one in everyone) / len(everyone) for name in names}
