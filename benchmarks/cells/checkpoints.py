"""Checkpoints: the time that training waits for one, and the batches that a resumed run reads
again.
"""

from __future__ import annotations

import os
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset

from benchmarks.harness import Figure, seconds
from benchmarks.workloads import PAD, WORKLOADS, make_examples, medm_model
from medm.data.collator import Collator
from medm.data.sampling import DistributedBatchSampler, Shuffle
from medm.objectives.language_modeling import LanguageModeling
from medm.objectives.terms import Terms
from medm.training.arguments import training_arguments
from medm.training.options import PartOptions, TrainOptions
from medm.training.parts import apply_parts
from medm.training.trainer import MedmTrainer
from medm.types import Example


class _Counted(Dataset[Example]):
    """Examples, and the indices that were read."""

    def __init__(self, examples: list[Example]) -> None:
        self.examples, self.asked = examples, []

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        self.asked.append(index)
        return self.examples[index]


class _Run(Figure):
    workloads: ClassVar[dict[str, str]] = {"cpu": "tiny", "h200": "0.5B"}
    batch: ClassVar[int] = 2

    @cached_property
    def sizes(self) -> Any:
        """The workload."""
        return WORKLOADS[self.workloads[self.profile]]

    @property
    def setting(self) -> dict[str, Any]:
        return {"workload": self.workloads[self.profile]}

    def trainer(self, folder: str, data: _Counted, **options: Any) -> MedmTrainer:
        """A new run over some examples, everything trained."""
        cuda = self.profile == "h200"
        model = medm_model(self.sizes, device="cuda" if cuda else "cpu")
        train = TrainOptions(
            per_device_train_batch_size=self.batch,
            use_cpu=not cuda,
            bf16=cuda,
            logging_steps=10_000,
            learning_rate=1e-5,
            **options,
        )
        parts = {name: PartOptions(tune="full") for name in model.parts()}
        apply_parts(model, parts, train, keep_float32=False)
        return MedmTrainer(
            model,
            training_arguments(train, Path(folder)),
            terms=Terms.of(LanguageModeling()),
            parts=parts,
            train_options=train,
            train_dataset=data,
            data_collator=Collator(PAD),
            sampler=DistributedBatchSampler(Shuffle(len(data), seed=0), batch_size=self.batch),
        )


class Stall(_Run):
    """P12: seconds that a checkpoint blocks training, over those of a plain write of the same
    state.
    """

    name, title, peer, at_most = "P12", "stall of a checkpoint", "torch.save and fsync", True
    targets: ClassVar = {"cpu": 0.20, "h200": 0.05}

    def values(self, rounds: int) -> list[float]:
        shares = []
        with tempfile.TemporaryDirectory() as folder:
            data = _Counted(make_examples(self.sizes, 4))
            trainer = self.trainer(folder, data, max_steps=2, save_strategy="no")
            trainer.fit()
            state = {
                "model": trainer.model.state_dict(),
                "optimizer": trainer.optimizer.state_dict(),
            }
            for number in range(rounds + 1):
                plain = seconds(lambda: _write(state, Path(folder) / "plain.pt"))
                trainer.state.global_step = 100 + number
                stall = seconds(lambda: trainer._save_checkpoint(trainer.model, None))
                trainer._commits.wait()
                shares.append(stall / plain)
        return shares[1:]


class Replay(_Run):
    """P13: batches that a resumed run reads a second time."""

    name, title, peer, at_most = (
        "P13",
        "resume: batches re-read",
        "HF skip loop: every one of them",
        True,
    )
    targets: ClassVar = {"cpu": 0, "h200": 0}
    first: ClassVar[int] = 6

    def values(self, rounds: int) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            examples = make_examples(self.sizes, 20)
            options: dict[str, Any] = {
                "save_strategy": "steps",
                "save_steps": self.first,
                "num_train_epochs": 1,
            }
            before, after = _Counted(examples), _Counted(examples)
            trainer = self.trainer(folder, before, **options)
            trainer.add_callback(_StopAt(self.first))
            trainer.fit()
            self.trainer(folder, after, **options).fit(resume=True)
            seen = set(before.asked[: self.first * self.batch])
            return [float(np.ceil(len(seen & set(after.asked)) / self.batch))]


def _write(state: dict[str, Any], file: Path) -> None:
    with file.open("wb") as opened:
        torch.save(state, opened)
        opened.flush()
        os.fsync(opened.fileno())


def _StopAt(step: int) -> Any:  # noqa: N802 (makes a callback)
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        """Ends a run early."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= step

    return Stop()
