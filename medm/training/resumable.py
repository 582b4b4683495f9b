"""transformers' Trainer with atomic checkpoints, and runs that resume from them.

Knows what a run consists of (weights, optimizer, schedule, random states, recipe), not what is
learned: losses, parts and data belong to its subclass. `checkpoints` owns the folders,
`checkpoint_writer` the writing.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import ExportableState
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from medm.distributed import all_gather_objects, any_rank, on_rank_zero
from medm.errors import CheckpointError, NonFiniteError, RecipeError
from medm.files import remove
from medm.launcher import LINK
from medm.models.base import MedmModel
from medm.models.manifest import read_manifest, verify
from medm.training import checkpoints
from medm.training.callbacks import Interruption
from medm.training.checkpoint_writer import AsyncCheckpointWriter, run_on_all_ranks
from medm.training.options import TrainOptions
from medm.training.quantize import four_bit_weights, plain_state_dict
from medm.training.recipe import differences
from medm.training.safe_load import safe_loading
from medm.training.snapshot import Snapshot, check_types, tensor_bytes, write_files
from medm.training.watchdog import Watchdog
from medm.types import JsonObject

logger = logging.getLogger(__name__)


class _PollWriter(TrainerCallback):
    """Polls the checkpoint writer at the end of every step."""

    def __init__(self, commits: AsyncCheckpointWriter) -> None:
        self.commits = commits

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self.commits.poll()


class ResumableTrainer(Trainer):
    """A Trainer whose runs can be stopped at any moment and continued to the same bits.

    Args:
        model: the model to train.
        args: see `medm.training.arguments`.
        train_options: the `train` section.
        recipe: the resolved recipe; kept with every checkpoint, and compared when a run continues.
        data_hashes: sha256 of every annotation file; kept and compared likewise.
        callbacks: further callbacks.
        rest: for transformers' Trainer.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_options: TrainOptions,
        recipe: Mapping[str, object] | None = None,
        data_hashes: Mapping[str, str] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **rest: Any,
    ) -> None:
        self.train_options: TrainOptions = train_options
        self.recipe: dict[str, object] = dict(recipe or {})
        self.data_hashes: dict[str, str] = dict(data_hashes or {})
        self.output_dir = Path(args.output_dir or "")
        self.interruption = Interruption()
        self._snapshot = Snapshot()
        self._commits = AsyncCheckpointWriter(args.device)
        self._committed_step: int | None = None
        self._keeps_training_state = True
        self.watchdog = Watchdog(self.output_dir, args.ddp_timeout)
        callbacks = [*callbacks, self.interruption, _PollWriter(self._commits), self.watchdog]
        super().__init__(model=model, args=args, callbacks=callbacks, **rest)

    # Running --------------------------------------------------------------------------------------

    def fit(self, *, resume: bool = False, locked: bool = False) -> bool:
        """Train to the end, from the start or from the newest complete checkpoint.

        Args:
            resume: continue from the newest checkpoint, if there is one.
            locked: the caller holds the lock on the output folder (`lock_on_rank_zero`).

        Returns:
            True when the run is finished; False when a signal stopped it after a checkpoint was
            written.

        Raises:
            RecipeError: the folder holds another run's checkpoints or model, or the recipe changed.
            CheckpointError: no checkpoint is complete, or one cannot be written.
            NonFiniteError: a loss, gradient or weight is not finite.
        """
        with (
            nullcontext() if locked else lock_on_rank_zero(self.output_dir),
            _no_process_left(),
            self.interruption.listening(),
            safe_loading(self._checkpoint_classes()),
            self._commits,
        ):
            start = on_rank_zero(lambda: self._starting_point(self.output_dir, resume=resume))
            with self.watchdog.watching():
                super().train(resume_from_checkpoint=None if start is None else str(start))
        return not self.interruption.raised

    def _starting_point(self, output_dir: Path, *, resume: bool) -> Path | None:
        checkpoints.clear_staging(output_dir)
        if not resume:
            checkpoints.check_unused(output_dir)
            return None
        start = checkpoints.newest_good(output_dir, metadata={"world_size": int, "recipe": dict})
        if start is None:
            logger.warning(
                "--resume: %s holds no checkpoint yet, so the run starts from the beginning",
                output_dir,
            )
            return None
        manifest = read_manifest(start)
        check_continues(start, manifest, recipe=self.recipe, world_size=self.args.world_size)
        written = manifest.get("data", {})
        if edited := [
            file for file, digest in self.data_hashes.items() if written.get(file, digest) != digest
        ]:
            raise RecipeError(
                f"{start}: {', '.join(edited)} changed since it was written; put the old "
                "annotations back, or start a new run from its weights with init_from"
            )
        logger.info("continuing from %s", start)
        return start

    @property
    def _module(self) -> nn.Module:
        """The model without wrappers."""
        return cast(nn.Module, self.model)

    def _checkpoint_classes(self) -> tuple[type, ...]:
        if not self.is_deepspeed_enabled:
            return ()
        from medm.training.deepspeed import checkpoint_classes

        return checkpoint_classes()

    # Saving ---------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Write a staging folder on every rank; when all succeeded, rank 0 commits it.

        If the state fits into memory as copies, training continues while the copies are written. In
        any case it continues while files reach the disk and are hashed.
        """
        step = self.state.global_step
        if self._committed_step == step:
            return
        self._require_finite_weights()
        check_types(self._module.state_dict())
        self.store_flos()
        self._commits.wait()
        final = self.output_dir / f"checkpoint-{step}"
        folder = on_rank_zero(lambda: self._make_staging(self.output_dir, step))
        host = socket.gethostname()
        local_ranks = all_gather_objects(host).count(host) if self.is_deepspeed_enabled else 1
        copied: dict[Path, object] = {}
        run_on_all_ranks(
            lambda: copied.update(self._write_checkpoint(folder, final, local_ranks=local_ranks)),
            final=final,
            cleanup=folder,
        )
        commit = self._commit(folder, final)
        if not self.train_options.save_in_background:
            with LINK.writing():
                on_rank_zero(commit)
        elif self.is_deepspeed_enabled and self.args.world_size > 1:
            self._commits.write_on_all_ranks(copied, commit, folder=folder, final=final)
        else:
            self._commits.write_on_rank_zero(copied, commit, folder=folder, final=final)
        self._committed_step = step

    def save_whole(self, folder: Path) -> None:
        """Write the model as a folder that opens anywhere: tensors of full size, config, processor.

        State that training alone needs is left out. All ranks call it.
        """
        self._require_finite_weights()
        check_types(self._module.state_dict())
        on_rank_zero(lambda: self._fresh(folder))
        self._keeps_training_state = False
        try:
            run_on_all_ranks(
                lambda: self.save_model(str(folder), _internal_call=True),
                final=folder,
                cleanup=folder,
            )
        finally:
            self._keeps_training_state = True

    def _fresh(self, folder: Path) -> None:
        remove(folder)
        folder.mkdir(parents=True)

    def _make_staging(self, output_dir: Path, step: int) -> Path:
        checkpoints.check_space(output_dir, estimate=self._estimated_size())
        return checkpoints.staging(output_dir, step)

    def _write_checkpoint(
        self, folder: Path, final: Path, *, local_ranks: int
    ) -> dict[Path, object]:
        """Write the files of this rank. Return the copies of states that are still to be written.

        The copies are by file; there are none if they do not fit into memory.

        Args:
            folder: of the files.
            final: the name that the folder will have.
            local_ranks: ranks of this machine that copy at the same time.
        """
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(final)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        # Weights in 4 bits are written dequantized, and FSDP writes by itself.
        copying = self.train_options.save_in_background and not (
            self.is_fsdp_enabled or four_bit_weights(model)
        )
        if copying:
            self._save(str(folder), state_dict={})
        else:
            self.save_model(str(folder), _internal_call=True)
        files = self._large_state(folder, model if copying else None)
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            self._note_callbacks()
            self.state.save_to_json(str(folder / "trainer_state.json"))
        if copying and self._snapshot.fits(tensor_bytes(files), processes=local_ranks):
            # By names that are the same in every checkpoint, so that the memory is reused.
            copied = self._snapshot.copy({file.name: state for file, state in files.items()})
            return {file: copied[file.name] for file in files}
        write_files(files)
        return {}

    def _large_state(self, folder: Path, model: nn.Module | None) -> dict[Path, object]:
        """Return the large states that this rank writes, by file: optimizer and, if given, model.

        The tensors are those that are trained, not copies. The schedule, which is small, is written
        at once.
        """
        files: dict[Path, object] = {}
        weights: Mapping[str, Tensor] = {}
        if self.is_deepspeed_enabled:
            from medm.training.deepspeed import collected, full_weights

            with collected(self.deepspeed) as files:
                self._save_optimizer_and_scheduler(str(folder))
            weights = {} if model is None else full_weights(self.deepspeed)
        elif self.is_fsdp_enabled:
            self._save_optimizer_and_scheduler(str(folder))
        elif self.args.should_save:
            torch.save(cast(LRScheduler, self.lr_scheduler).state_dict(), folder / SCHEDULER_NAME)
            files[folder / OPTIMIZER_NAME] = cast(
                torch.optim.Optimizer, self.optimizer
            ).state_dict()
            weights = {} if model is None else model.state_dict()
        if weights and self.args.should_save:
            files[folder / SAFE_WEIGHTS_NAME] = _untied(self._module, weights)
        return files

    def _note_callbacks(self) -> None:
        """Put the state of stateful callbacks (early stopping) where `TrainerState` saves it."""
        states = cast(dict[str, object], self.state.stateful_callbacks)
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states[type(callback).__name__] = callback.state()

    def _commit(self, folder: Path, final: Path) -> Callable[[], None]:
        """Return the action that makes a folder a checkpoint, with the metadata of this moment."""
        metadata = {
            "step": self.state.global_step,
            "world_size": self.args.world_size,
            "recipe": self.recipe,
            "data": self.data_hashes,
        }
        best, keep = self.state.best_model_checkpoint, self.args.save_total_limit

        def commit() -> None:
            try:
                checkpoints.commit(folder, final=final, metadata=metadata)
                if keep is not None:
                    checkpoints.prune(
                        final.parent, keep=keep, best=Path(best) if best else None, newest=final
                    )
            except OSError as error:
                raise CheckpointError(
                    f"{final} could not be finished ({error}); make room, then continue with "
                    "--resume"
                ) from None

        return commit

    def _estimated_size(self) -> int:
        """Return the estimated bytes of a first checkpoint.

        It holds the weights and, for each trained one, two moments and a copy in float32.
        """
        total = 0
        for parameter in self._module.parameters():
            numel = int(getattr(parameter, "ds_numel", parameter.numel()))
            total += numel * parameter.element_size() + 12 * numel * parameter.requires_grad
        return total

    def _require_finite_weights(self) -> None:
        broken = [
            name
            for name, parameter in self._module.named_parameters()
            # Under ZeRO-3 the parameter itself is empty, and this rank's shard is `ds_tensor`.
            # A non-finite number makes the sum non-finite, without a mask of the weights' size.
            if parameter.requires_grad
            and not getattr(parameter, "ds_tensor", parameter.data)
            .sum(dtype=torch.float32)
            .isfinite()
        ]
        if any_rank(bool(broken), self.args.device):
            raise NonFiniteError(
                f"step {self.state.global_step}: weights are not finite "
                f"({', '.join(broken[:3]) or 'on another process'}); nothing was written, earlier "
                "ones are untouched"
            )

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write weights in safetensors, config and processor; no pickled arguments."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if state_dict is None and four_bit_weights(model):
            state_dict = plain_state_dict(model)
        if isinstance(model, MedmModel):
            model.save_pretrained(
                folder, state_dict=state_dict, training_state=self._keeps_training_state
            )
        elif isinstance(model, PreTrainedModel):
            model.save_pretrained(folder, state_dict=state_dict)
        else:
            tensors = model.state_dict() if state_dict is None else state_dict
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(tensors, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    # Loading --------------------------------------------------------------------------------------

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Load the model's tensors from a checkpoint, with none missing and none left over."""
        folder, model = Path(resume_from_checkpoint), model or self._module
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        files = [SAFE_WEIGHTS_NAME]
        if index.exists():
            files = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
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
                f"{folder}: does not hold this model: {len(missing)} tensors are missing "
                f"({', '.join(missing[:3])}), {len(result.unexpected_keys)} are unknown "
                f"({', '.join(result.unexpected_keys[:3])})"
            )

    def _load_best_model(self) -> None:
        if self.interruption.raised:
            return
        self._commits.wait()
        best = Path(self.state.best_model_checkpoint or "")
        on_rank_zero(lambda: verify(best))
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(best), self.accelerator.unwrap_model(self.model))


def _untied(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a model by name; of tied weights, one name only."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        name: tensor.contiguous()
        for name, tensor in weights.items()
        if (source := weights.get(tied.get(name, ""))) is None
        or source.data_ptr() != tensor.data_ptr()
    }


def check_continues(
    start: Path, manifest: JsonObject, *, recipe: Mapping[str, object], world_size: int
) -> None:
    """Raise for a checkpoint that this run cannot continue from.

    Args:
        start: the checkpoint, for messages.
        manifest: its metadata.
        recipe: resolved, of this run.
        world_size: processes of this run.

    Raises:
        RecipeError: something changed that matters for what is learned.
        CheckpointError: another number of processes wrote it.
    """
    if manifest["world_size"] != world_size:
        raise CheckpointError(
            f"{start}: written by {manifest['world_size']} processes, and {world_size} are "
            "running; continue with the same number, or start a new run from its weights with "
            "init_from"
        )
    if changed := differences(manifest["recipe"], recipe):
        raise RecipeError(
            f"{start}: the recipe changed since it was written; undo the change, or start a new "
            "run from its weights with init_from\n  " + "\n  ".join(changed)
        )


@contextmanager
def _no_process_left() -> Iterator[None]:
    """End the workers of loaders that an error left behind.

    They ignore stop signals, which Python would send them when the program exits: it would wait
    forever.
    """
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        for child in set(multiprocessing.active_children()) - before:
            if child.daemon:
                child.kill()
                child.join()


@contextmanager
def lock_on_rank_zero(output_dir: Path) -> Iterator[None]:
    """Hold the lock on the output folder, taken by rank 0 for all ranks."""
    with ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(checkpoints.locked(output_dir))

        on_rank_zero(lock)
        yield
