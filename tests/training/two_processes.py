"""Cases that two processes run together, started once by torchrun from their test, so that imports
are paid once."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import distributed as dist
from torch import nn
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from medm.data.limits import BadRecordsLimit
from medm.distributed import end_rank, leave_group
from medm.errors import InputLostError, MedmError
from medm.files import remove
from medm.models.manifest import read_manifest, write_manifest
from medm.objectives.contrastive import Contrastive
from medm.objectives.terms import Terms
from medm.training import checkpoint_writer, checkpoints, resumable
from medm.training.trainer import MedmTrainer
from tests.training.toys import BOTH, LORA, ROWS, TOWERS, Fixed, Pairs, trainer

CURVE: dict[str, Any] = {
    "dropout": False, "balance": 0.0, "max_steps": 6, "save_strategy": "no", "parts": LORA,
    "held_out": 7, "eval_strategy": "steps", "eval_steps": 6, "per_device_eval_batch_size": 2,
}  # fmt: skip
"""What one process with a batch of 4 does too."""
HALF = {"per_device_train_batch_size": 2}


class Say(TrainerCallback):
    """Sets an event at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step, self.event = step, threading.Event()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.event.set()


class Terminate(TrainerCallback):
    """The second process gets SIGTERM in the middle of step 3."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def losses(run: MedmTrainer) -> list[float]:
    """Of the steps, and of the held-out data where that was measured."""
    return [
        entry[key]
        for key in ("loss", "eval_loss")
        for entry in run.state.log_history
        if key in entry
    ]


def curve(folder: Path, **case: Any) -> Any:
    """Losses, and the final weights in full size in a file."""
    run = trainer(folder, **(CURVE | HALF | case))
    run.fit()
    run.save_whole(folder / "final")
    return losses(run)


def resumed(folder: Path, **case: Any) -> Any:
    """Dropout on, six steps at once and four and two: the final tensors are compared by the test.

    Checkpoints of the whole run are written in the step; those that are continued from are written
    from copies, after training has gone on.
    """
    settings = (
        HALF | {"max_steps": 6, "save_steps": 4, "save_total_limit": None, "parts": ROWS} | case
    )
    whole = trainer(folder / "whole", **settings, save_in_background=False)
    whole.fit()
    whole.save_whole(folder / "whole" / "final")
    before = losses(whole)
    del whole
    release()
    said = Say(step=5)
    first = trainer(folder / "cut", **settings, callbacks=[said])
    snapshot, memory = first._snapshot, []

    def held_back(write: Any) -> Any:
        def write_late(files: Mapping[Path, Any]) -> None:
            memory.append({place: tensor.data_ptr() for place, tensor in snapshot._memory.items()})
            assert said.event.wait(60)
            write(files)

        return write_late

    with replaced(held_back):
        first.fit()
    assert all(memory) or not (first.is_deepspeed_enabled or first.args.should_save), (
        "nothing was copied"
    )
    assert not memory or memory[0] == memory[1], (
        "the second checkpoint was copied into other memory"
    )
    del first
    release()
    if dist.get_rank() == 0:
        remove(folder / "cut" / "checkpoint-6")
    dist.barrier()
    run = trainer(folder / "cut", **settings)
    run.fit(resume=True)
    run.save_whole(folder / "cut" / "final")
    return [before, losses(run)]


@contextmanager
def replaced(by: Callable[[Any], Any], module: Any = checkpoint_writer) -> Iterator[None]:
    """Another `write_files` in a module, made from the real one."""
    real, module.write_files = module.write_files, by(module.write_files)
    try:
        yield
    finally:
        module.write_files = real


def full_disk(folder: Path, *, background: bool) -> Any:
    """The second process cannot write its share of the second checkpoint."""

    def failing(write: Any) -> Any:
        def write_some(files: Mapping[Path, Any]) -> None:
            if dist.get_rank() == 1 and any("checkpoint-4" in str(file) for file in files):
                raise OSError(errno.ENOSPC, "No space left on device")
            write(files)

        return write_some

    run = trainer(folder, **HALF, save_steps=2, save_in_background=background, deepspeed="zero2")
    with replaced(failing, checkpoint_writer if background else resumable):
        error = refusal(run.fit)
    return [
        error,
        run.state.global_step,
        sorted(path.name for path in folder.iterdir() if path.is_dir()),
    ]


def refusal(action: Callable[[], Any]) -> Any:
    """The error on each process, by name and text."""
    try:
        action()
    except MedmError as error:
        return [type(error).__name__, str(error)]
    return None


class Planted:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(self.mark),))


def planted(folder: Path, pattern: str, stage: str) -> Any:
    """A pickle in a file of DeepSpeed, under a manifest that knows it."""
    settings = HALF | {"max_steps": 2, "save_steps": 2, "deepspeed": stage}
    trainer(folder, **settings).fit()
    release()
    if dist.get_rank() == 0:
        checkpoint = folder / "checkpoint-2"
        for file in checkpoint.rglob(pattern):  # one a process
            torch.save({"module": Planted(str(folder / "mark"))}, file)
        metadata = {
            key: value for key, value in read_manifest(checkpoint).items() if key != "files"
        }
        write_manifest(checkpoint, metadata)
    dist.barrier()
    return refusal(lambda: trainer(folder, **(settings | {"max_steps": 4})).fit(resume=True))


def poisoned(folder: Path) -> Any:
    """One bad sample reaches one process; both have to stop."""
    return refusal(lambda: trainer(folder, **(HALF | {"poisoned": 17, "save_steps": 1})).fit())


class Lost(Pairs):
    """One sample cannot be read, so one process alone gets an error."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 17:
            raise InputLostError("the share is away")
        return super().__getitem__(index)


class Counted(Pairs):
    """Every third sample counts as bad, in the process that draws it."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: set[int] = set()
        self.bad_records_limit = BadRecordsLimit(0.25, len(self), before=2)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.bad |= {index} if index % 3 == 0 else set()
        return super().__getitem__(index)

    @property
    def num_bad(self) -> int:
        return len(self.bad)

    def noted(self, what: str) -> list[int]:
        return sorted(self.bad)

    def place(self, index: int) -> str:
        return f"record {index}"


def on_data(folder: Path, data: Pairs) -> Any:
    """How a run over this data ends on each process."""
    run = trainer(folder, **HALF, save_strategy="no")
    run.epochs.dataset = data
    return [refusal(run.fit), run.state.global_step]


def terminated(folder: Path) -> Any:
    run = trainer(folder, **HALF, callbacks=[Terminate()])
    return [run.fit(), run.state.global_step, [path.name for path in checkpoints.folders(folder)]]


def contrast(first_rows: int = 3) -> Any:
    """The gradient of the gathered loss, averaged over processes as DDP does, against the whole
    batch at once.

    The first process holds `first_rows` of the six pairs, the second one the others.
    """
    generator = torch.Generator().manual_seed(3)
    inputs, other = torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)
    differences = {}
    for loss in ("softmax", "sigmoid"):
        gradients = []
        for spread in (True, False):
            model = Heads()
            share = slice(first_rows) if dist.get_rank() == 0 else slice(first_rows, None)
            mine = share if spread else slice(None)
            terms = Terms.of(Contrastive(loss=loss, pairs="first", gather=spread))
            total = terms(
                model, {"first": inputs[mine], "second": other[mine]}, torch.tensor([6])
            ).total
            # As the trainer: items of all processes divide, and gradients are averaged.
            (total * (2 if spread else 1)).backward()
            found = [
                parameter.grad for parameter in model.parameters() if parameter.grad is not None
            ]
            for gradient in found if spread else ():
                dist.all_reduce(gradient)
                gradient /= 2
            gradients.append(torch.cat([gradient.flatten() for gradient in found]))
        differences[loss] = [
            (gradients[0] - gradients[1]).abs().max().item(),
            gradients[1].abs().max().item(),
        ]
    return differences


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.one, self.two = nn.Linear(5, 4), nn.Linear(5, 4)
        self.scale, self.bias = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(-1.0))

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "image_embeds": self.one(first),
            "text_embeds": self.two(second),
            "logit_scale": self.scale,
            "logit_bias": self.bias,
        }


UNEVEN = {0: [[0, 1, 2], [3, 4], [10, 11]], 1: [[5, 6], [7, 8, 9], [12]]}
"""Micro-batches of each rank: two make a step, and the last one makes one of its own."""
BOTH_CURVE: dict[str, Any] = {
    "kind": "both",
    "parts": BOTH,
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "warmup_steps": 0,
    "save_strategy": "no",
}


def two_terms(folder: Path, **case: Any) -> Any:
    """Losses by name of each step, and how often the model ran. Ranks hold different numbers of
    labels and pairs."""
    run = trainer(folder, batches=Fixed(UNEVEN[int(os.environ["RANK"])]), **(BOTH_CURVE | case))
    calls = run.model.asked
    run.fit()
    run.save_whole(folder / "final")
    return [by_name(run), len(calls)]


def by_name(run: MedmTrainer) -> list[list[float]]:
    keys = ("loss", "loss/text", "loss/pairs")
    return [[entry[key] for key in keys] for entry in run.state.log_history if "loss" in entry]


SCALED_CURVE: dict[str, Any] = {
    "kind": "scaled",
    "parts": TOWERS,
    "max_steps": 4,
    "warmup_steps": 0,
    "save_strategy": "no",
}


def clamped(folder: Path, **case: Any) -> Any:
    """The scale of each rank after its last clamp, the optimizer's own copy of it, the calls, and
    the losses."""
    run = trainer(folder, **(SCALED_CURVE | HALF | case))
    module = run.model
    run.fit()
    (scale,) = module.towers.scale
    copy = safe_get_full_fp32_param(scale) if run.is_deepspeed_enabled else scale
    return [scale.item(), copy.item(), module.steps, losses(run)]


def release() -> None:
    """Let the last case's engine and configuration go: transformers keeps both where later models
    would see them."""
    unset_hf_deepspeed_config()
    gc.collect()


def main(folder: Path) -> None:
    cases: dict[str, Callable[[], Any]] = {
        "ddp": lambda: curve(folder / "ddp"),
        "contrast": contrast,
        "contrast, uneven": lambda: contrast(first_rows=4),
        "contrast, one without": lambda: contrast(first_rows=6),
        "rows-ddp": lambda: curve(folder / "rows-ddp", parts=ROWS),
        "towers": lambda: curve(folder / "towers", kind="towers", parts=TOWERS),
        "poisoned": lambda: poisoned(folder / "poisoned"),
        "lost": lambda: on_data(folder / "lost", Lost()),
        "too many bad": lambda: on_data(folder / "bad", Counted()),
        "two terms": lambda: two_terms(folder / "two-terms"),
        "clamped-ddp": lambda: clamped(folder / "clamped-ddp"),
        "terminated": lambda: terminated(folder / "terminated"),
        "resumed-ddp": lambda: resumed(folder / "resumed-ddp"),
    }
    if "--deepspeed" in sys.argv:
        cases |= {
            **{
                stage: lambda stage=stage: curve(folder / stage, deepspeed=stage)
                for stage in ("zero1", "zero2", "zero3")
            },
            "two terms-zero3": lambda: two_terms(folder / "two-terms-zero3", deepspeed="zero3"),
            **{
                f"clamped-{stage}": lambda stage=stage: clamped(
                    folder / f"clamped-{stage}", deepspeed=stage
                )
                for stage in ("zero2", "zero3")
            },
            "rows-zero2": lambda: curve(folder / "rows-zero2", parts=ROWS, deepspeed="zero2"),
            "rows-zero3": lambda: curve(folder / "rows-zero3", parts=ROWS, deepspeed="zero3"),
            "tied-zero3": lambda: curve(
                folder / "tied-zero3", parts=ROWS, kind="tied", deepspeed="zero3"
            ),
            "towers-zero2": lambda: curve(
                folder / "towers-zero2", kind="towers", parts=TOWERS, deepspeed="zero2"
            ),
            "resumed-zero2": lambda: resumed(folder / "resumed-zero2", deepspeed="zero2"),
            "resumed-zero3": lambda: resumed(folder / "resumed-zero3", deepspeed="zero3"),
            "full disk, background": lambda: full_disk(folder / "full-background", background=True),
            "full disk, in the step": lambda: full_disk(folder / "full-step", background=False),
            "planted-model": lambda: planted(folder / "planted-model", "*model_states.pt", "zero2"),
            "planted-optimiser": lambda: planted(
                folder / "planted-optimiser", "*optim_states.pt", "zero3"
            ),
        }
    results = {}
    for name, case in cases.items():
        started = time.monotonic()
        results[name] = case()
        results[f"seconds of {name}"] = round(time.monotonic() - started, 1)
        release()
        (folder / f"results-{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_group()
    end_rank(0)
