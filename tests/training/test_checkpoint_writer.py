"""The stages of a checkpoint that is written beside the training; several processes:
`test_two_processes`."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medm.errors import CheckpointError, NonFiniteError
from medm.training import checkpoint_writer
from medm.training.checkpoint_writer import AsyncCheckpointWriter, BackgroundWorker

WAYS = [
    pytest.param(AsyncCheckpointWriter.write_on_rank_zero, id="rank zero"),
    pytest.param(AsyncCheckpointWriter.write_on_all_ranks, id="all ranks"),
]


class Case:
    """A staging folder with one file to come, and a commit that renames it."""

    def __init__(self, path: Path) -> None:
        self.folder, self.final = path / "aside", path / "final"
        self.folder.mkdir()
        self.files = {self.folder / "state.pt": {"a": torch.ones(2)}}

    def begin(
        self, run: AsyncCheckpointWriter, way: Any, commit: Callable[[], None] | None = None
    ) -> None:
        way(run, self.files, commit or self.commit, folder=self.folder, final=self.final)

    def commit(self) -> None:
        assert (self.folder / "state.pt").is_file(), "committed before it was written"
        self.folder.rename(self.final)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that takes nothing before the event is set."""
    ready = threading.Event()
    write = checkpoint_writer.write_files

    def slow(files: Any) -> None:
        assert ready.wait(60)
        write(files)

    monkeypatch.setattr(checkpoint_writer, "write_files", slow)
    return ready


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("way", WAYS)
def test_training_goes_on_while_it_is_written(case: Case, disk: threading.Event, way: Any) -> None:
    with AsyncCheckpointWriter() as run:
        case.begin(run, way)
        run.poll()  # does not wait
        assert not case.final.exists()
        disk.set()
        run.wait()
        assert torch.load(case.final / "state.pt", weights_only=True)["a"].tolist() == [1, 1]
        run.poll()  # nothing is left


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_cannot_be_written_is_said_once_and_nothing_is_left(
    case: Case, monkeypatch: pytest.MonkeyPatch, way: Any
) -> None:
    monkeypatch.setattr(checkpoint_writer, "write_files", full)
    with AsyncCheckpointWriter() as run:
        case.begin(run, way)
        with pytest.raises(
            CheckpointError,
            match=r"final failed .*No space left.*earlier checkpoints are untouched",
        ):
            run.wait()
    assert not case.folder.exists()
    assert not case.final.exists()


@pytest.mark.parametrize("way", WAYS)
def test_a_commit_that_fails_is_said(case: Case, way: Any) -> None:
    def fails() -> None:
        raise CheckpointError("could not be finished")

    with (
        pytest.raises(CheckpointError, match="could not be finished"),
        AsyncCheckpointWriter() as run,
    ):
        case.begin(run, way, commit=fails)


@pytest.mark.parametrize("way", WAYS)
def test_the_end_of_a_run_waits_for_its_last_checkpoint(case: Case, way: Any) -> None:
    with AsyncCheckpointWriter() as run:
        case.begin(run, way)
    assert case.final.is_dir()


def test_processes_that_stop_together_finish_their_checkpoint(case: Case) -> None:
    with pytest.raises(NonFiniteError), AsyncCheckpointWriter() as run:
        case.begin(run, AsyncCheckpointWriter.write_on_all_ranks)
        raise NonFiniteError("the loss is nan")
    assert case.final.is_dir()


def test_shares_are_not_committed_by_a_process_that_stops_alone(case: Case) -> None:
    """Whether the others wrote theirs is not known to it."""
    with pytest.raises(KeyError), AsyncCheckpointWriter() as run:
        case.begin(run, AsyncCheckpointWriter.write_on_all_ranks)
        raise KeyError
    assert case.folder.is_dir()
    assert not case.final.exists()


@pytest.mark.parametrize("error", [NonFiniteError, KeyError])
def test_what_ended_a_run_is_not_hidden_by_its_last_checkpoint(
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(checkpoint_writer, "write_files", full)
    with pytest.raises(error), AsyncCheckpointWriter() as run:
        case.begin(run, AsyncCheckpointWriter.write_on_rank_zero)
        raise error("first")
    assert "No space left" in caplog.text


def test_what_goes_wrong_in_the_background_comes_out_at_the_next_wait() -> None:
    done: list[int] = []
    go_on = threading.Event()

    def fails() -> None:
        go_on.wait(60)
        raise OSError("disk")

    background = BackgroundWorker()
    background.start(lambda: done.append(1))
    background.start(fails)
    assert done == [1], "one at a time"
    assert background.busy
    go_on.set()
    with pytest.raises(OSError, match="disk"):
        background.wait()
    assert not background.busy
    background.start(lambda: done.append(2))
    background.wait()
    assert done == [1, 2]
