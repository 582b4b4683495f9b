"""transformers' Trainer under an objective, with whole checkpoints. Blind to what it trains.

Every modality is out of sight: a model says its parts, an objective turns batches into losses, a sampler says
which samples come when. What is added to the Trainer: learning rates per part, losses divided by the items of
the whole step, a stop at the first number that is none, checkpoints that are whole or not there, and a
continuation that computes the same bits as a run that was never interrupted.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypedDict, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from medm.data.sampling import RankedBatches, Sequential
from medm.errors import CheckpointError, NonFiniteError, RecipeError
from medm.models.manifest import read_manifest, verify
from medm.objectives.base import Losses, Objective
from medm.training import checkpoints
from medm.training.callbacks import Interruption
from medm.training.options import PartOptions, TrainOptions
from medm.training.parts import frozen_modules, parameter_groups
from medm.training.processes import anywhere, failures, gathered, on_first
from medm.training.quantize import four_bit_weights, plain_state_dict
from medm.training.recipe import differences
from medm.training.safe_load import safe_loading
from medm.training.snapshot import Snapshot, tensor_bytes, write_safetensors
from medm.types import Batch

logger = logging.getLogger(__name__)

MAX_OVERFLOWS = 50
"""Optimiser steps in a row that fp16 loss scaling may skip before the run counts as broken."""


class _State(TypedDict):
    """What is large in a checkpoint."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]


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


class MedmTrainer(Trainer):
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
        self.train_options: TrainOptions = train_options
        self.recipe: dict[str, Any] = dict(recipe or {})
        self.data_hashes: dict[str, str] = dict(data_hashes or {})
        self.output_dir = Path(args.output_dir or "")
        self.epochs = _Epochs(sampler, train_dataset, args.seed)
        self.eval_collator = eval_collator or data_collator
        self.interruption = Interruption()
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, data_collator=data_collator,
            processing_class=processing_class, callbacks=[_SetEpoch(self.epochs), *callbacks, self.interruption],
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
        self._committed_step: int | None = None
        self._commits = checkpoints.Background()
        self._snapshot = Snapshot()

    # Running ------------------------------------------------------------------------------------------

    def fit(self, *, resume: bool = False) -> bool:
        """Train to the end, from the start or from the newest whole checkpoint.

        Returns:
            True when the run is finished; False when a signal stopped it after a checkpoint was written.

        Raises:
            RecipeError: the folder holds another run's checkpoints, or the recipe changed.
            CheckpointError: no checkpoint is whole, or one cannot be written.
            NonFiniteError: a loss, gradient or weight is no number.
        """
        with (
            _first_process_holds(self.output_dir),
            self.interruption.listening(),
            safe_loading(self._checkpoint_classes()),
            self._commits,
        ):
            start = on_first(lambda: self._starting_point(self.output_dir, resume=resume))
            super().train(resume_from_checkpoint=None if start is None else str(start))
            on_first(self._commits.wait)
        return not self.interruption.raised

    def _starting_point(self, output_dir: Path, *, resume: bool) -> Path | None:
        checkpoints.clear_staging(output_dir)
        if not resume:
            if present := checkpoints.folders(output_dir):
                raise RecipeError(
                    f"{output_dir}: holds {present[0].name} of an earlier run; continue that run with --resume, or "
                    "choose another output_dir"
                )
            return None
        start = checkpoints.newest_good(output_dir, facts={"world_size": int, "recipe": dict})
        if start is None:
            logger.warning("--resume: %s holds no checkpoint yet, so the run starts from the beginning", output_dir)
            return None
        manifest = read_manifest(start)
        if manifest["world_size"] != self.args.world_size:
            raise CheckpointError(
                f"{start}: written by {manifest['world_size']} processes, and {self.args.world_size} are running; "
                "continue with the same number, or start a new run from its weights with init_from"
            )
        if changed := differences(manifest["recipe"], self.recipe):
            raise RecipeError(
                f"{start}: the recipe changed since it was written; undo the change, or start a new run from its "
                "weights with init_from\n  " + "\n  ".join(changed)
            )
        written = manifest.get("data", {})
        if edited := [file for file, digest in self.data_hashes.items() if written.get(file, digest) != digest]:
            raise RecipeError(
                f"{start}: {', '.join(edited)} changed since it was written; put the old annotations back, or start a "
                "new run from its weights with init_from"
            )
        logger.info("continuing from %s", start)
        return start

    @property
    def _module(self) -> nn.Module:
        """The model without wrappers."""
        return cast(nn.Module, self.model)

    def _checkpoint_classes(self) -> tuple[Any, ...]:
        if not self.is_deepspeed_enabled:
            return ()
        from medm.training.deepspeed import checkpoint_classes

        return checkpoint_classes()

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
            generator=torch.Generator(),  # the run's own random numbers stay as they are
        )  # fmt: skip

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

    # Checkpoints --------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write aside on every process, agree that all succeeded, then let the first one commit.

        Where weights and optimiser state could be copied, training goes on while the copies are written; in any case
        while files reach the disk and are hashed.
        """
        step = self.state.global_step
        if self._committed_step == step:
            return
        self._require_finite_weights()
        self.store_flos()
        on_first(self._commits.wait)
        final = self.output_dir / f"checkpoint-{step}"
        folder = on_first(lambda: self._make_staging(self.output_dir, step))
        copied = self._copied_state()
        self._together(
            lambda: self._write_checkpoint(folder, final, whole=copied is None),
            during=f"writing {final}", cleanup=folder,
        )  # fmt: skip
        commit = self._commit(folder, final, copied)
        if not self.train_options.save_in_background:
            on_first(commit)
        elif self.args.process_index == 0:
            self._commits.start(commit)
        self._committed_step = step

    def save_whole(self, folder: Path) -> None:
        """The model as a folder that opens anywhere: tensors of full size, config, processor. All processes call it."""
        self._require_finite_weights()
        on_first(lambda: self._fresh(folder))
        self._together(
            lambda: self.save_model(str(folder), _internal_call=True), during=f"writing {folder}", cleanup=folder
        )

    def _fresh(self, folder: Path) -> None:
        checkpoints.remove(folder)
        folder.mkdir(parents=True)

    def _make_staging(self, output_dir: Path, step: int) -> Path:
        checkpoints.check_space(output_dir, estimate=self._estimated_size())
        return checkpoints.staging(output_dir, step)

    def _copied_state(self) -> _State | None:
        """Weights and optimiser state as they are now, to be written while training goes on.

        None where they are written at once: they are in pieces over the processes, in 4 bits, or memory is short.
        """
        if not (self.train_options.save_in_background and self.args.should_save):
            return None
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or four_bit_weights(model):
            return None
        state: _State = {"weights": _untied(model), "optimizer": cast(Any, self.optimizer).state_dict()}
        return self._snapshot.copy(state) if self._snapshot.fits(tensor_bytes(state)) else None

    def _write_checkpoint(self, folder: Path, final: Path, *, whole: bool) -> None:
        """All files of this process; not `whole`: those alone that `_write_copied` leaves."""
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(final)
        if whole:
            self.save_model(str(folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(folder))
        else:
            self._save(str(folder), state_dict={})
            torch.save(cast(Any, self.lr_scheduler).state_dict(), folder / SCHEDULER_NAME)
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            self._note_callbacks()
            self.state.save_to_json(str(folder / "trainer_state.json"))

    def _note_callbacks(self) -> None:
        """Put the state of stateful callbacks (early stopping) where `TrainerState` saves it."""
        states = cast(dict[str, Any], self.state.stateful_callbacks)
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states[type(callback).__name__] = callback.state()

    def _commit(self, folder: Path, final: Path, copied: _State | None) -> Callable[[], None]:
        """What makes a folder a checkpoint, with the facts of this moment."""
        facts = {
            "step": self.state.global_step, "world_size": self.args.world_size, "recipe": self.recipe,
            "data": self.data_hashes,
        }  # fmt: skip
        best, keep = self.state.best_model_checkpoint, self.args.save_total_limit

        def commit() -> None:
            if copied is not None:
                _write_copied(copied, folder, final)
            try:
                checkpoints.commit(folder, final=final, facts=facts)
                if keep is not None:
                    checkpoints.prune(final.parent, keep=keep, spare=Path(best) if best else None, newest=final)
            except OSError as error:
                raise CheckpointError(
                    f"{final} could not be finished ({error}); make room, then continue with --resume"
                ) from None

        return commit

    def _estimated_size(self) -> int:
        """Bytes of a first checkpoint: weights, and for each trained one two moments and a copy in float32."""
        total = 0
        for parameter in self._module.parameters():
            numel = int(getattr(parameter, "ds_numel", parameter.numel()))
            total += numel * parameter.element_size() + 12 * numel * parameter.requires_grad
        return total

    def _require_finite_weights(self) -> None:
        broken = [
            name
            for name, parameter in self._module.named_parameters()
            # Under ZeRO-3 the parameter itself is empty, and this process's share lies beside it.
            # One number that is none makes the sum none, and no mask of the weights' size is made.
            if parameter.requires_grad
            and not getattr(parameter, "ds_tensor", parameter.data).sum(dtype=torch.float32).isfinite()
        ]
        if anywhere(bool(broken), self.args.device):
            raise NonFiniteError(
                f"step {self.state.global_step}: weights are no numbers any more "
                f"({', '.join(broken[:3]) or 'on another process'}); nothing was written, earlier ones are untouched"
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Weights in safetensors, config and processor; no pickled arguments."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if state_dict is None and four_bit_weights(model):
            state_dict = plain_state_dict(model)
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder, state_dict=state_dict)
        else:
            tensors = model.state_dict() if state_dict is None else state_dict
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(tensors, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Every tensor of the model comes from the checkpoint, and every tensor of the checkpoint is used."""
        folder, model = Path(resume_from_checkpoint), model or self._module
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        files = [SAFE_WEIGHTS_NAME]
        if index.exists():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        given: dict[str, Tensor] = {}
        for name in files:
            given |= load_file(folder / name)
        rounded = four_bit_weights(model)  # frozen, and the same as at the start
        given = {name: tensor for name, tensor in given.items() if name not in rounded}
        result = model.load_state_dict(given, strict=False)
        own = model.state_dict(keep_vars=True)
        filled = {own[name].data_ptr() for name in given if name in own}
        missing = [
            name
            for name in result.missing_keys
            if own[name].data_ptr() not in filled  # tied ones are filled
            and not any(name == weight or name.startswith(f"{weight}.") for weight in rounded)
        ]
        if missing or result.unexpected_keys:
            raise CheckpointError(
                f"{folder}: does not hold this model: {len(missing)} tensors are missing ({', '.join(missing[:3])}), "
                f"{len(result.unexpected_keys)} are unknown ({', '.join(result.unexpected_keys[:3])})"
            )

    def _load_best_model(self) -> None:
        if self.interruption.raised:
            return
        on_first(self._commits.wait)
        best = Path(self.state.best_model_checkpoint or "")
        on_first(lambda: verify(best))
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(best), self.accelerator.unwrap_model(self.model))

    def _together(self, action: Callable[[], None], *, during: str, cleanup: Path) -> None:
        """Take an action on every process; if it fails on one, all of them clean up and stop."""
        if failed := failures(action):
            if self.args.process_index == 0:
                checkpoints.remove(cleanup)
            raise CheckpointError(f"{during} failed ({'; '.join(failed)}); earlier checkpoints are untouched")


def _untied(model: nn.Module) -> dict[str, Tensor]:
    """The weights by name, those that another name holds too left out."""
    weights = model.state_dict()
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        name: tensor.contiguous()
        for name, tensor in weights.items()
        if (source := weights.get(tied.get(name, ""))) is None or source.data_ptr() != tensor.data_ptr()
    }


def _write_copied(copied: _State, folder: Path, final: Path) -> None:
    try:
        write_safetensors(copied["weights"], folder / SAFE_WEIGHTS_NAME)
        torch.save(copied["optimizer"], folder / OPTIMIZER_NAME)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        checkpoints.remove(folder)
        raise CheckpointError(f"writing {final} failed ({error}); earlier checkpoints are untouched") from None


@contextmanager
def _first_process_holds(output_dir: Path) -> Iterator[None]:
    """The lock on the output folder, taken by the first process for all."""
    with ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(checkpoints.locked(output_dir))

        on_first(lock)
        yield
