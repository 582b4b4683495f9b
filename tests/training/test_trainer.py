from __future__ import annotations

import errno
import importlib.util
import json
import multiprocessing
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from medm.errors import (
    CheckpointError,
    DataError,
    DeviceError,
    InputLostError,
    MedmError,
    NonFiniteError,
    RecipeError,
)
from medm.models.manifest import read_manifest, verify, write_manifest
from medm.training import checkpoints
from medm.training.arguments import training_arguments
from medm.training.callbacks import LossCurve
from medm.training.options import PartOptions, TrainOptions
from medm.training.parts import ADAPTER_PARAMETER
from medm.training.snapshot import Snapshot
from tests.training.toys import FULL, LORA, TOWERS, Pairs, Toy, trainer, weights

Case = dict[str, Any]

CASES: dict[str, Case] = {
    "lora and connector": {"parts": LORA},
    "full, accumulation": {"parts": FULL, "gradient_accumulation_steps": 2, "max_steps": 8, "save_steps": 3},
    "two towers": {"parts": TOWERS, "kind": "towers"},
    "written at once": {"parts": LORA, "save_in_background": False},
    "across epochs, held-out loss": {
        "parts": LORA, "max_steps": 20, "save_steps": 6, "held_out": 8, "eval_strategy": "steps", "eval_steps": 3,
    },
}  # fmt: skip


class StopAt(TrainerCallback):
    """Sends this process a signal at the end of a step, or lets an error through it."""

    def __init__(self, step: int, what: signal.Signals | type[Exception] = RuntimeError) -> None:
        self.step, self.what = step, what

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            if isinstance(self.what, signal.Signals):
                os.kill(os.getpid(), self.what)
            else:
                raise self.what("stopped by the test")


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, case: Case) -> None:
    whole = trainer(tmp_path / "whole", **case)
    before = weights(whole.model)
    assert whole.fit()
    assert any(
        not torch.equal(before[name], tensor) for name, tensor in weights(whole.model).items()
    )
    stopped = trainer(tmp_path / "cut", callbacks=[StopAt(whole.state.max_steps * 2 // 3)], **case)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        stopped.fit()
    # Another seed for the new weights: everything has to come from the checkpoint.
    resumed = trainer(tmp_path / "cut", **case)
    for parameter in resumed.model.parameters():
        parameter.data.add_(1.0)
    assert resumed.fit(resume=True)
    assert same(whole.model, resumed.model)
    strip = ("train_runtime", "eval_runtime")
    history = [entry for entry in whole.state.log_history if not any(key in entry for key in strip)]
    again = [entry for entry in resumed.state.log_history if not any(key in entry for key in strip)]
    assert history == again


def test_the_loss_goes_down_for_two_towers(tmp_path: Path) -> None:
    run = trainer(tmp_path, kind="towers", parts=TOWERS, max_steps=24, save_strategy="no")
    run.fit()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])


class Emptied(Pairs):
    """From some step on no sample has a label, as where every record of a batch is left out."""

    empty = False

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        return (
            {**sample, "labels": torch.full_like(sample["labels"], -100)} if self.empty else sample
        )


class Empty(TrainerCallback):
    """After `steps` the data is empty for the steps that follow, until `until`."""

    def __init__(self, data: Emptied, after: int, until: int = 99) -> None:
        self.data, self.after, self.until = data, after, until

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.data.empty = self.after <= state.global_step < self.until


def emptied(folder: Path, after: int, until: int = 99, **settings: Any) -> list[dict[str, Any]]:
    """The log of a run whose steps after `after` have no samples, and of the steps before and after
    them."""
    data = Emptied()
    run = trainer(
        folder, callbacks=[LossCurve(), Empty(data, after, until)], save_strategy="no", **settings
    )
    run.epochs.dataset = data
    run.fit()
    return run.state.log_history


def test_a_step_without_samples_has_no_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="medm"):
        history = emptied(tmp_path, after=4, max_steps=6)
    assert [("loss" in entry, entry.get("steps_without_samples")) for entry in history[:-1]] == [
        (True, None)
    ] * 4 + [(False, 1)] * 2
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert history[-1]["train_loss"] == pytest.approx(sum(losses) / 4)
    assert [
        json.loads(line).get("loss") for line in (tmp_path / "loss.jsonl").read_text().splitlines()
    ][4:6] == [None] * 2
    assert not [
        entry for entry in history if entry.get("loss") == 0 or entry.get("loss/balance") == 0
    ]


def test_the_loss_of_several_steps_is_a_mean_over_those_with_samples(tmp_path: Path) -> None:
    single = emptied(tmp_path / "single", after=2, until=4, max_steps=6)
    (entry,) = [
        entry
        for entry in emptied(
            tmp_path / "six",
            after=2,
            until=4,
            max_steps=6,
            logging_steps=6,
            logging_first_step=False,
        )
        if "loss" in entry
    ]
    known = [one["loss"] for one in single if "loss" in one]
    assert len(known) == 4
    assert entry["loss"] == pytest.approx(sum(known) / 4, rel=1e-5)
    assert entry["steps_without_samples"] == 2


def test_held_out_data_without_samples_is_no_loss_of_0(tmp_path: Path) -> None:
    run = trainer(tmp_path, held_out=4)
    data = Emptied(4)
    data.empty, run.eval_dataset = True, data
    with pytest.raises(DataError, match="no held-out record could be used"):
        run.evaluate()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_the_same_error(tmp_path: Path, workers: int) -> None:
    run = trainer(tmp_path, save_strategy="no", dataloader_num_workers=workers)
    run.epochs.dataset = Losing()
    with pytest.raises(
        InputLostError, match=r"^the share is away$"
    ) as kept:  # its frames hold the loader
        run.fit()
    assert kept.traceback and not multiprocessing.active_children(), (
        "would never end: workers ignore stop signals"
    )


def test_no_more_workers_than_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    run = trainer(tmp_path, dataloader_num_workers=8, held_out=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (run.get_train_dataloader().num_workers, run.get_eval_dataloader().num_workers) == (
            2,
            2,
        )
    assert trainer(tmp_path, dataloader_num_workers=1).get_train_dataloader().num_workers == 1


def test_a_worker_that_is_killed_is_named(tmp_path: Path) -> None:
    run = trainer(tmp_path, save_strategy="no", dataloader_num_workers=1)
    run.epochs.dataset = Losing(kill=True)
    with pytest.raises(MedmError, match=r"ended from outside.*train\.dataloader_num_workers"):
        run.fit()


class Losing(Pairs):
    """Cannot be read, or ends the process that reads it."""

    def __init__(self, *, kill: bool = False) -> None:
        super().__init__()
        self.kill = kill

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise InputLostError("the share is away")


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EMFILE, "Too many open files"), ValueError("bad font"), ImportError("x")],
)
def test_a_curve_that_cannot_be_drawn_costs_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("medm.training.callbacks.draw_curve", fail)
    run = trainer(tmp_path, callbacks=[LossCurve()], max_steps=2, save_strategy="no")
    assert run.fit()
    assert any(line.startswith(f"no loss.png: {type(error).__name__}") for line in caplog.messages)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
def test_a_log_that_cannot_be_written_is_written_again_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    opened = Path.open

    def open_(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if path.name == "loss.jsonl" and mode == "a":
            raise OSError(code, os.strerror(code))
        return opened(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", open_)
    run = trainer(tmp_path, callbacks=[LossCurve()], max_steps=3, save_strategy="no")
    assert run.fit()
    assert len((tmp_path / "loss.jsonl").read_text().splitlines()) == len(run.state.log_history)
    assert (
        len([line for line in caplog.messages if line.startswith("loss.jsonl cannot be written")])
        == 1
    )


def test_the_last_step_is_logged_wherever_it_falls(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=5, logging_steps=10, save_strategy="no")
    run.fit()
    assert [entry["step"] for entry in run.state.log_history if "loss" in entry] == [1, 5]


@pytest.mark.parametrize(
    ("steps", "warmup", "first"), [(1, 0.03, 1.0), (2, 0.03, 0.0), (2, 0.99, 0.0), (1, 0, 1.0)]
)
def test_warm_up_as_a_fraction_is_not_all_of_a_short_run(
    tmp_path: Path, steps: int, warmup: float, first: float
) -> None:
    run = trainer(tmp_path, parts=FULL, max_steps=steps, warmup_steps=warmup, save_strategy="no")
    before = weights(run.model)
    run.fit()
    rates = [entry["learning_rate"] for entry in run.state.log_history if "loss" in entry]
    assert rates[0] == pytest.approx(first * 3e-3)
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(run.model).items())


def test_frozen_parts_do_not_move_at_all(tmp_path: Path) -> None:
    run = trainer(tmp_path, parts=LORA, save_strategy="no")
    before = weights(run.model)
    run.fit()
    moved = {
        name for name, tensor in weights(run.model).items() if not torch.equal(tensor, before[name])
    }
    assert moved
    assert all(ADAPTER_PARAMETER in name or name.startswith("connector.") for name in moved)


def test_accumulation_and_one_large_batch_give_the_same_weights(tmp_path: Path) -> None:
    """Labels differ in number between micro-batches, so a mean of means would differ."""
    runs = [
        trainer(
            tmp_path / str(batch),
            parts=FULL,
            dropout=False,
            balance=0.0,
            max_steps=4,
            save_strategy="no",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
        )
        for batch in (8, 2)
    ]
    for run in runs:
        run.fit()
    first, second = (weights(run.model) for run in runs)
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=2e-6, rtol=1e-4, msg=name)


def test_the_held_out_loss_is_a_mean_over_tokens_whatever_the_batch(tmp_path: Path) -> None:
    """Samples have 4 to 7 labels, so a mean of the batches' means would differ."""
    found = []
    for batch in (7, 3, 1):
        run = trainer(
            tmp_path / str(batch), balance=0.0, held_out=7, per_device_eval_batch_size=batch
        )
        found.append(run.evaluate()["eval_loss"])
    samples = [run.eval_dataset[index] for index in range(7)]
    model, total, count = run.model.eval(), 0.0, 0
    for sample in samples:
        batch_of_one = {name: value.unsqueeze(0) for name, value in sample.items()}
        items = int((sample["labels"][1:] != -100).sum())
        with torch.no_grad():
            total, count = total + model(**batch_of_one).loss_sum.item(), count + items
    assert found == pytest.approx([total / count] * 3, abs=1e-5)


def test_named_losses_add_up(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, save_strategy="no", max_steps=6, logging_steps=2, gradient_accumulation_steps=2
    )
    run.fit()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(entries) == 4  # the first step, and every second
    for entry in entries:
        assert entry["loss"] == pytest.approx(
            entry["loss/language"] + entry["loss/balance"], rel=1e-4
        )
        assert entry["loss/balance"] > 0


def test_a_frozen_llm_recomputes_its_activations_and_drops_nothing_out(tmp_path: Path) -> None:
    """The connector below it needs them; frozen parts are in eval mode, in which transformers would
    not recompute."""
    parts = {
        "image.connector": PartOptions(tune="full"),
        "llm": PartOptions(tune="frozen", gradient_checkpointing=True),
    }
    run = trainer(tmp_path, parts=parts, max_steps=1, save_strategy="no")
    modes: list[bool] = []
    attention = run.model.llm.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda *_: modes.append(attention.training))
    run.fit()
    assert modes == [False, False]  # forward, and once more in the backward pass


def test_a_loss_that_is_no_number_stops_the_run_and_reaches_no_file(tmp_path: Path) -> None:
    run = trainer(tmp_path, poisoned=17, save_steps=1, save_total_limit=None)
    with pytest.raises(NonFiniteError, match=r"loss of step \d+ is nan"):
        run.fit()
    for folder in checkpoints.folders(tmp_path):
        verify(folder)
        run._load_from_checkpoint(str(folder))
        assert all(torch.isfinite(tensor).all() for tensor in weights(run.model).values())
    assert not (tmp_path / "model.safetensors").exists()


def test_a_gradient_or_weight_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path / "gradient")
    run.model.connector[0].weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match="gradient norm of step 1"):
        run.fit()
    assert checkpoints.folders(tmp_path / "gradient") == []

    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                kwargs["model"].connector[0].bias.data[0] = float("nan")

    run = trainer(tmp_path / "weight", callbacks=[Break()])
    with pytest.raises(NonFiniteError, match=r"connector\.0\.bias"):
        run.fit()
    assert checkpoints.folders(tmp_path / "weight") == []


class Planted:
    """A pickle that leaves a mark when it is opened."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(self.mark),))


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_planted_pickle_is_refused_and_does_not_run(tmp_path: Path, file: str) -> None:
    trainer(tmp_path / "run", max_steps=4).fit()
    folder = tmp_path / "run" / "checkpoint-4"
    torch.save({"state": Planted(str(tmp_path / "mark"))}, folder / file)
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints is complete"):
        trainer(tmp_path / "run", max_steps=4).fit(resume=True)
    # An untrusted checkpoint brings a manifest of its own.
    metadata = {key: value for key, value in read_manifest(folder).items() if key != "files"}
    write_manifest(folder, metadata)
    with pytest.raises(CheckpointError, match="more than tensors and plain values"):
        trainer(tmp_path / "run", max_steps=8).fit(resume=True)
    assert not (tmp_path / "mark").exists()


def test_a_damaged_newest_checkpoint_costs_one_interval_and_not_the_run(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.fit()
    trainer(tmp_path / "cut", max_steps=12, save_total_limit=None).fit()
    newest = tmp_path / "cut" / "checkpoint-12"
    content = bytearray((newest / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "optimizer.pt").write_bytes(content)
    resumed = trainer(tmp_path / "cut")
    resumed.fit(resume=True)
    assert same(whole.model, resumed.model)
    verify(newest)  # written again


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_run_goes_on_later(
    tmp_path: Path, number: signal.Signals
) -> None:
    whole = trainer(tmp_path / "whole")
    whole.fit()
    stopped = trainer(tmp_path / "cut", callbacks=[StopAt(6, number)], save_strategy="epoch")
    handler = signal.getsignal(number)
    assert stopped.fit() is False
    assert signal.getsignal(number) == handler
    assert [folder.name for folder in checkpoints.folders(tmp_path / "cut")] == ["checkpoint-7"]
    resumed = trainer(tmp_path / "cut", save_strategy="epoch")
    assert resumed.fit(resume=True) is True
    assert same(whole.model, resumed.model)


class SignalHelpers(TrainerCallback):
    """Sends the workers of the DataLoader and this process a signal, as one to the process group
    does; then another."""

    def __init__(self, number: signal.Signals) -> None:
        self.number, self.workers = number, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            children = multiprocessing.active_children()
            self.workers = len(children)
            for child in children:
                os.kill(int(child.pid or 0), self.number)
            for number in (self.number, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_to_the_process_group_and_signals_again_save_and_stop(
    tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    helpers = SignalHelpers(number)
    run = trainer(tmp_path, callbacks=[helpers], save_strategy="no", dataloader_num_workers=1)
    assert run.fit() is False
    assert helpers.workers == 1
    (checkpoint,) = checkpoints.folders(tmp_path)
    verify(checkpoint)
    said = capfd.readouterr().err
    assert (
        said.count("again: the run is already stopping and ends when its checkpoint is written")
        == 3
    )


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_ends_the_run_and_spares_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    run = trainer(tmp_path, save_in_background=background)
    save = torch.save

    def full(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if run.state.global_step > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"checkpoint-8 failed .*No space left"):
        run.fit()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-4"]
    verify(tmp_path / "checkpoint-4")


def test_a_disk_that_is_full_only_at_the_end_is_said_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_manifest", full)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-4 could not be finished .*No space left.*--resume"
    ):
        trainer(tmp_path, max_steps=4).fit()


def test_both_ways_of_writing_give_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From copies while training goes on, and at once."""
    written: list[bool] = []
    copy = Snapshot.copy
    monkeypatch.setattr(Snapshot, "copy", lambda *args: written.append(True) or copy(*args))
    for background in (True, False):
        trainer(
            tmp_path / str(background), parts=FULL, max_steps=4, save_in_background=background
        ).fit()
        assert written == [True], "copied in the background, and only there"
    first, second = (tmp_path / name / "checkpoint-4" for name in ("True", "False"))
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    tensors = [load_file(folder / SAFE_WEIGHTS_NAME) for folder in (first, second)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    states = [torch.load(folder / "optimizer.pt", weights_only=True) for folder in (first, second)]
    torch.testing.assert_close(states[0]["state"], states[1]["state"], atol=0, rtol=0)
    assert states[0]["param_groups"] == states[1]["param_groups"]


def test_the_next_checkpoint_is_copied_into_the_same_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[dict[str, int]] = []
    copy = Snapshot.copy

    def noted(snapshot: Snapshot, state: Any) -> Any:
        copied = copy(snapshot, state)
        places.append({place: tensor.data_ptr() for place, tensor in snapshot._memory.items()})
        return copied

    monkeypatch.setattr(Snapshot, "copy", noted)
    trainer(tmp_path, max_steps=4, save_steps=2).fit()
    assert len(places) == 2
    assert places[0] == places[1]


def test_without_memory_for_copies_a_checkpoint_is_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Snapshot, "fits", lambda *_, **__: False)
    monkeypatch.setattr(Snapshot, "copy", lambda *_: pytest.fail("nothing may be copied"))
    trainer(tmp_path, max_steps=4).fit()
    verify(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("background", [True, False])
def test_weights_of_a_type_that_no_file_holds_are_said_before_anything_is_written(
    tmp_path: Path, background: bool
) -> None:
    run = trainer(tmp_path, max_steps=4, save_in_background=background)
    run.model.register_buffer("phase", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(
        CheckpointError,
        match=r"^phase: expected a type .*found torch\.complex128.*persistent=False",
    ):
        run.fit()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_run_does_not_mix_with_another(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=4, recipe={"train": {"seed": 1}}).fit()
    with pytest.raises(RecipeError, match="--resume"):
        trainer(tmp_path, max_steps=4).fit()
    with pytest.raises(RecipeError, match=r"train\.seed: was 1, is 2"):
        trainer(tmp_path, max_steps=8, recipe={"train": {"seed": 2}}).fit(resume=True)
    with checkpoints.locked(tmp_path), pytest.raises(MedmError, match="another run"):
        trainer(tmp_path, max_steps=8, recipe={"train": {"seed": 1}}).fit(resume=True)


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    assert trainer(tmp_path, max_steps=2).fit(resume=True)


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=4).fit()
    folder = tmp_path / "checkpoint-4"
    metadata = {key: value for key, value in read_manifest(folder).items() if key != "files"}
    write_manifest(folder, metadata | {"world_size": 2})
    with pytest.raises(CheckpointError, match="written by 2 processes, and 1 are running"):
        trainer(tmp_path, max_steps=8).fit(resume=True)


def test_the_best_weights_come_back_and_patience_ends_the_run(tmp_path: Path) -> None:
    """With such a learning rate the held-out loss rises soon."""
    run = trainer(
        tmp_path,
        parts=FULL,
        max_steps=60,
        held_out=8,
        learning_rate=0.3,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        early_stopping_patience=3,
        callbacks=[EarlyStoppingCallback(3)],
    )
    assert run.fit()
    losses = {
        entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry
    }
    best = min(losses, key=lambda step: losses[step])
    assert run.state.global_step == best + 6 < 60
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)
    assert {folder.name for folder in checkpoints.folders(tmp_path)} >= {f"checkpoint-{best}"}


def test_the_loss_curve_is_written_and_continued(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=4, callbacks=[LossCurve()]).fit()
    with (tmp_path / "loss.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 9.0}\n')  # after the checkpoint, before the kill
    resumed = trainer(tmp_path, max_steps=8, callbacks=[LossCurve()])
    resumed.fit(resume=True)
    lines = [json.loads(line) for line in (tmp_path / "loss.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert lines == resumed.state.log_history
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_opens_as_a_model(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=4)
    run.fit()
    opened = Toy.from_pretrained(tmp_path / "checkpoint-4")
    assert same(run.model, opened)
    assert not list(
        (tmp_path / "checkpoint-4").glob("*.bin")
    )  # the pickled arguments that the Trainer would leave


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=4, parts=FULL).fit()
    with pytest.raises(CheckpointError, match="does not hold this model"):
        trainer(tmp_path, max_steps=8, parts=LORA).fit(resume=True)


@pytest.mark.parametrize(
    ("train", "error", "words"),
    [
        ({"arguments": {"weight_dekay": 1}}, RecipeError, "weight_dekay"),
        ({"arguments": {"label_smoothing_factor": 0.1}}, RecipeError, "the loss belongs to the objective"),
        ({"lr_scheduler_type": "cosinus"}, RecipeError, "cosinus"),
        (
            {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 4, "load_best_model_at_end": True},
            RecipeError,
            "load_best",
        ),
        ({"deepspeed": "zero4"}, RecipeError, "zero"),
    ],
)  # fmt: skip
def test_arguments_are_checked_at_the_start(
    tmp_path: Path, train: Case, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        trainer(tmp_path, **train)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_absent(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="no CUDA device"):
        trainer(tmp_path, use_cpu=False, require_gpu=True)


def test_a_tracker_writes_beside_the_loss_curve(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="comes with the extra 'log'")
    trainer(tmp_path, max_steps=2, save_strategy="no", report_to="tensorboard").fit()
    events = [path for path in tmp_path.rglob("events.out.tfevents.*") if path.stat().st_size]
    assert events


def test_a_tracker_that_is_not_installed_is_said_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "tensorboard" else find(name, *a),
    )
    with pytest.raises(
        DeviceError, match=r"train\.report_to: tensorboard is not installed.*medm\[log\]"
    ):
        training_arguments(TrainOptions(use_cpu=True, report_to="tensorboard"), tmp_path)
