"""transformers' Trainer under an objective. Blind to what it trains.

Every modality is out of sight: a model says its parts, an objective turns batches into losses, a sampler says
which samples come when. What is added to the Trainer: learning rates per part, losses divided by the items of
the whole step, and a stop at the first number that is none. Checkpoints are `medm.training.resumable`'s.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from medm.data.sampling import RankedBatches, Sequential
from medm.errors import NonFiniteError
from medm.objectives.base import Losses, Objective
from medm.stopping import ignore_stops
from medm.training.options import PartOptions, TrainOptions
from medm.training.parts import frozen_modules, parameter_groups
from medm.training.processes import anywhere, gathered
from medm.training.resumable import ResumableTrainer
from medm.types import Batch

logger = logging.getLogger(__name__)

MAX_OVERFLOWS = 50
"""Optimiser steps in a row that fp16 loss scaling may skip before the run counts as broken."""


class BatchSampler(Protocol):
    """Which samples this process sees, batch by batch; a pure function of seed, epoch and position."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that `__iter__` goes through."""
        ...

    def __iter__(self) -> Iterator[list[int]]:
        """Positions in the dataset, one list a micro-batch."""
        ...

    def __len__(self) -> int:
        """Micro-batches an epoch; the same on every process."""
        ...


class _Epochs:
    """A batch sampler whose epoch also seeds the loader's workers and reaches the dataset."""

    def __init__(self, sampler: BatchSampler, dataset: Dataset[Any], seed: int) -> None:
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
    """Tells the sampler which epoch begins, before the loader is asked for its first batch."""

    def __init__(self, epochs: _Epochs) -> None:
        self.epochs = epochs

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epochs.set_epoch(int(state.epoch or 0))


class MedmTrainer(ResumableTrainer):
    """Trains `model` on `objective`.

    Args:
        model: has `parts()`; `medm.training.parts.apply_parts` was called on it.
        args: see `medm.training.arguments`.
        objective: turns the model and a batch into losses.
        parts: how each part is trained; gives the optimiser its groups.
        train_options: the `train` section.
        train_dataset: map-style; `set_epoch` is called where it has one.
        sampler: this process's micro-batches.
        data_collator: list of samples -> batch.
        eval_dataset: held-out data for the loss during training.
        eval_collator: list of held-out samples -> batch; `data_collator` without it.
        processing_class: saved beside the weights.
        callbacks: further callbacks.
        recipe: the resolved recipe; kept with every checkpoint, and compared when a run continues.
        data_hashes: sha256 of every annotation file; kept and compared likewise.
    """

    def __init__(
        self, model: nn.Module, args: TrainingArguments, *, objective: Objective, parts: Mapping[str, PartOptions],
        train_options: TrainOptions, train_dataset: Dataset[Any], sampler: BatchSampler,
        data_collator: Callable[[list[Any]], Batch], eval_dataset: Dataset[Any] | None = None,
        eval_collator: Callable[[list[Any]], Batch] | None = None, processing_class: Any = None,
        callbacks: Sequence[TrainerCallback] = (), recipe: Mapping[str, Any] | None = None,
        data_hashes: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.objective: Objective = objective
        self.parts: dict[str, PartOptions] = dict(parts)
        self.epochs = _Epochs(sampler, train_dataset, args.seed)
        self.eval_collator = eval_collator or data_collator
        super().__init__(
            model, args, train_options=train_options, recipe=recipe, data_hashes=data_hashes,
            callbacks=[_SetEpoch(self.epochs), *callbacks], train_dataset=train_dataset, eval_dataset=eval_dataset,
            data_collator=data_collator, processing_class=processing_class,
        )  # fmt: skip
        self.remove_callback(PrinterCallback)
        # Objectives divide by the items of the whole step, so the Trainer must not divide by micro-batches again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._held_out: list[Tensor] = []
        self._frozen = frozen_modules(model)
        self._terms: dict[str, Tensor] = {}
        self._terms_since = 0
        self._overflows = 0

    # Data ---------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.epochs.dataset,
            batch_sampler=self.epochs,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            worker_init_fn=ignore_stops,
            generator=self.epochs.generator,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Every held-out sample once: a process that has none left runs a batch that counts nothing."""
        dataset = cast("Dataset[Any]", eval_dataset or self.eval_dataset)
        return DataLoader(
            dataset,
            batch_sampler=RankedBatches(
                Sequential(len(cast(Any, dataset))), batch_size=self.args.eval_batch_size,
                rank=self.args.process_index, world=self.args.world_size,
            ),
            collate_fn=self.eval_collator,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=ignore_stops,
            generator=torch.Generator(),  # the run's own random numbers stay as they are
        )  # fmt: skip

    def _prepare_input(self, data: Any) -> Any:
        """On its way to a GPU while the step before still runs there, where it comes from pinned memory."""
        if isinstance(data, Tensor) and self.args.device.type == "cuda" and data.is_pinned():
            data = data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        count = torch.stack([self.objective.num_items(batch).to(device) for batch in batch_samples]).sum()
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count.clamp(min=1)

    # Loss ---------------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
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

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self._hold_frozen_still()
        losses = self.objective(model, inputs, num_items_in_batch)
        self._require_finite(losses)
        # Gradients are averaged over processes, while the items are counted over all of them.
        world_size = self.accelerator.num_processes
        if not self._terms:
            self._terms_since = self.state.global_step
        for name, value in losses.parts.items():
            self._terms[name] = self._terms.get(name, value.new_zeros(())) + value * world_size
        return losses.total * world_size

    def _hold_frozen_still(self) -> None:
        """Frozen parts drop nothing out and move no running mean; layers that recompute must still say they train."""
        for part in self._frozen:
            part.eval()
            for module in part.modules():
                if getattr(module, "gradient_checkpointing", False):
                    module.training = True

    def evaluation_loop(
        self, dataloader: DataLoader[Any], description: str, prediction_loss_only: bool | None = None,
        ignore_keys: Any = None, metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:  # fmt: skip
        """The loss is a mean over all items of the held-out data, whatever batches and processes they came in."""
        self._held_out = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        sums = torch.stack(self._held_out).sum(dim=0)  # (2,): of the losses, of the items
        if self.args.world_size > 1:
            sums = self.accelerator.gather(sums).view(-1, 2).sum(dim=0)
        total, items = sums.tolist()
        metrics = {**(output.metrics or {}), f"{metric_key_prefix}_loss": total / max(items, 1.0)}
        return output._replace(metrics=metrics)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = self.objective(model, inputs)
        self._require_finite(losses)
        items = self.objective.num_items(inputs).double()
        self._held_out.append(torch.stack([losses.total.detach().double() * items, items]))
        return None, None, None

    def _require_finite(self, losses: Losses) -> None:
        """All processes stop together, or the others would wait for the one that stopped."""
        if anywhere(not bool(torch.isfinite(losses.total.detach())), self.args.device):
            terms = "".join(f", {name} {value.item():g}" for name, value in losses.parts.items())
            raise NonFiniteError(
                f"the loss of step {self.state.global_step + 1} is {losses.total.item():g} on this process{terms}; "
                "nothing of it was saved. Lower the learning rate, or look for damaged samples in this step's batch"
            )

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        norm = None if grad_norm is None else float(grad_norm)
        if norm is not None and not math.isfinite(norm):
            self._overflows += 1
            # With fp16 a step that overflowed is skipped and the scale lowered; that is how it finds its scale.
            if not self.args.fp16 or self._overflows > MAX_OVERFLOWS:
                raise NonFiniteError(
                    f"the gradient norm of step {self.state.global_step} is {norm}; nothing of this step was saved. "
                    "Lower the learning rate, or use bf16"
                )
        else:
            self._overflows = 0
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            steps = max(self.state.global_step - self._terms_since, 1)
            logs |= {f"loss/{name}": value / steps for name, value in self._drain_terms().items()}
        super().log(logs, start_time)

    def _drain_terms(self) -> dict[str, float]:
        terms = {name: value.item() for name, value in self._terms.items()}
        self._terms = {}
        everyone = gathered(terms)
        names = sorted({name for one in everyone for name in one})
        return {name: sum(one.get(name, 0.0) for one in everyone) / len(everyone) for name in names}
