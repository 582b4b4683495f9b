"""A checkpoint written beside the training, and how the processes of a run agree that it is whole.

Knows files and processes, not what is in the files. A process that writes alone writes and commits in one go. Where
every process writes a share, the first one commits after all shares are there: each process says so at the end of a
step, in its main thread, since no other thread may communicate while that one does. A process that died is thus found
as it would be without a checkpoint, and what it leaves never gets a checkpoint's name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from medm.distributed import any_rank, failures, on_rank_zero, rank
from medm.errors import CheckpointError, MedmError, NonFiniteError
from medm.launcher import LINK
from medm.training.checkpoints import Background, remove
from medm.training.snapshot import write_files

logger = logging.getLogger(__name__)


class Writing:
    """One checkpoint at a time. What goes wrong is raised by the next `settle` or `wait`, on all processes.

    As a context manager it finishes the last one at the end, where the processes can still agree.

    Args:
        device: where the process group communicates.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._background = Background()
        self._next: Callable[[], None] | None = None
        """What all processes do together, once none of them is busy."""

    def alone(self, files: Mapping[Path, Any], commit: Callable[[], None], *, folder: Path, final: Path) -> None:
        """The first process writes files and commits; all call it.

        Args:
            files: state by file, see `write_files`; must not change any more.
            commit: turns `folder` into `final`.
            folder: where the checkpoint is put together; removed when a file cannot be written.
            final: the name it will get.
        """

        def write_and_commit() -> None:
            try:
                write_files(files)
            except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
                remove(folder)
                raise CheckpointError(_failed(final, str(error))) from None
            commit()

        self._start_on_rank_zero(write_and_commit)

    def shared(self, files: Mapping[Path, Any], commit: Callable[[], None], *, folder: Path, final: Path) -> None:
        """Every process writes its own files; the first one commits when all have. Arguments as for `alone`."""

        def commit_together() -> None:
            together(self._background.wait, final=final, cleanup=folder)
            self._start_on_rank_zero(commit)

        self._start(lambda: write_files(files))
        self._next = commit_together

    def _start_on_rank_zero(self, action: Callable[[], None]) -> None:
        if rank() == 0:
            self._start(action)
        self._next = lambda: on_rank_zero(self._background.wait)

    def _start(self, action: Callable[[], None]) -> None:
        self._background.start(_unharmed(action))

    def settle(self) -> None:
        """Go as far as is possible without waiting. All processes call it at the same step."""
        while self._next is not None and not any_rank(self._background.busy, self._device):
            self._advance(self._next)

    def wait(self) -> None:
        """Until the checkpoint is one. All processes call it at the same step."""
        while self._next is not None:
            self._advance(self._next)

    def _advance(self, action: Callable[[], None]) -> None:
        self._next = None
        action()

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        # All processes raise a `NonFiniteError` at the same step; what else goes wrong may be known to this one alone.
        agreed = kind is None or issubclass(kind, NonFiniteError)
        try:
            self.wait() if agreed else self._background.wait()
        except (MedmError, OSError, RuntimeError) as error:
            if kind is None:
                raise
            logger.error("the last checkpoint was not finished: %s", error)


def together(action: Callable[[], None], *, final: Path, cleanup: Path) -> None:
    """Take an action on every process; if it fails on one, all of them stop.

    Args:
        action: writes what is to become `final`.
        final: named in the error.
        cleanup: removed after a failure.

    Raises:
        CheckpointError: on all processes, with what went wrong on each.
    """
    if failed := failures(_unharmed(action)):
        on_rank_zero(lambda: remove(cleanup))
        raise CheckpointError(_failed(final, "; ".join(failed)))


def _unharmed(action: Callable[[], None]) -> Callable[[], None]:
    """Let the launcher wait for an action, even when another process of the run has died."""

    def act() -> None:
        with LINK.writing():
            action()

    return act


def _failed(final: Path, reason: str) -> str:
    return f"writing {final} failed ({reason}); earlier checkpoints are untouched"
