"""Asynchronous checkpoint writing, and the agreement of all ranks that a checkpoint is complete.

Knows files and ranks, not the contents of the files. When rank 0 alone writes, it writes and
commits in one action. When every rank writes a shard, rank 0 commits after all shards are written:
the ranks agree at the end of a step, in their main threads, because no other thread may communicate
at the same time. A dead rank is thus found as it would be without a checkpoint, and its files never
get the name of a checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from medm.distributed import any_rank, failures, on_rank_zero, rank
from medm.errors import CheckpointError, MedmError, NonFiniteError
from medm.files import remove
from medm.launcher import LINK
from medm.training.snapshot import write_files

logger = logging.getLogger(__name__)


class BackgroundWorker:
    """One action at a time, in a background thread. Its errors are raised by the next `wait`."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """True while the last action is running."""
        return self._running is not None and not self._running.done()

    def start(self, action: Callable[[], None]) -> None:
        """Start an action after the previous one has ended."""
        self.wait()
        self._running = self._pool.submit(action)

    def wait(self) -> None:
        """Wait for the running action, and raise its error."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


class AsyncCheckpointWriter:
    """Writer of one checkpoint at a time.

    Errors are raised by the next `poll` or `wait`, on all ranks. As a context manager it finishes
    the last checkpoint at the end, where the ranks can still agree.

    Args:
        device: device of the process group's communication.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._background = BackgroundWorker()
        self._next: Callable[[], None] | None = None
        """Next action of all ranks, once none of them is busy."""

    def write_on_rank_zero(
        self, files: Mapping[Path, object], commit: Callable[[], None], *, folder: Path, final: Path
    ) -> None:
        """Write and commit on rank 0. All ranks call it.

        Args:
            files: state by file, see `write_files`; must not change afterwards.
            commit: turns `folder` into `final`.
            folder: staging folder; removed when a file cannot be written.
            final: its final name.
        """

        def write_and_commit() -> None:
            try:
                write_files(files)
            except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
                remove(folder)
                raise CheckpointError(_failed(final, str(error))) from None
            commit()

        self._start_on_rank_zero(write_and_commit)

    def write_on_all_ranks(
        self, files: Mapping[Path, object], commit: Callable[[], None], *, folder: Path, final: Path
    ) -> None:
        """Write the files of every rank, then commit on rank 0.

        The arguments are those of `write_on_rank_zero`.
        """

        def commit_after_all() -> None:
            run_on_all_ranks(self._background.wait, final=final, cleanup=folder)
            self._start_on_rank_zero(commit)

        self._start(lambda: write_files(files))
        self._next = commit_after_all

    def _start_on_rank_zero(self, action: Callable[[], None]) -> None:
        if rank() == 0:
            self._start(action)
        self._next = lambda: on_rank_zero(self._background.wait)

    def _start(self, action: Callable[[], None]) -> None:
        self._background.start(_uninterrupted(action))

    def poll(self) -> None:
        """Advance the checkpoint as far as possible without waiting.

        All ranks call it at the same step.
        """
        while self._next is not None and not any_rank(self._background.busy, self._device):
            self._advance(self._next)

    def wait(self) -> None:
        """Wait until the checkpoint is complete. All ranks call it at the same step."""
        while self._next is not None:
            self._advance(self._next)

    def _advance(self, action: Callable[[], None]) -> None:
        self._next = None
        action()

    def __enter__(self) -> AsyncCheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        # All ranks raise a `NonFiniteError` at the same step; another error may be known to this
        # rank alone.
        agreed = kind is None or issubclass(kind, NonFiniteError)
        try:
            self.wait() if agreed else self._background.wait()
        except (MedmError, OSError, RuntimeError) as error:
            if kind is None:
                raise
            logger.error("the last checkpoint was not finished: %s", error)


def run_on_all_ranks(action: Callable[[], None], *, final: Path, cleanup: Path) -> None:
    """Run an action on every rank; when it fails on one, all of them stop.

    Args:
        action: writes the content of `final`.
        final: named in the error.
        cleanup: removed after a failure.

    Raises:
        CheckpointError: on all ranks, with the error of each.
    """
    if failed := failures(_uninterrupted(action)):
        on_rank_zero(lambda: remove(cleanup))
        raise CheckpointError(_failed(final, "; ".join(failed)))


def _uninterrupted(action: Callable[[], None]) -> Callable[[], None]:
    """Let the launcher wait for an action, even when another rank of the run has died."""

    def act() -> None:
        with LINK.writing():
            action()

    return act


def _failed(final: Path, reason: str) -> str:
    return f"writing {final} failed ({reason}); earlier checkpoints are untouched"
