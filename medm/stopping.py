"""Handling of SIGTERM and SIGINT from the start of a command to its end.

A stop signal before there is anything to save ends the command at once. During training, and while
a model is written, the signal is deferred: the training loop ends the run after a checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

RESUMABLE = 75
"""Exit status of a command that a signal stopped and that continues when it is started again
(EX_TEMPFAIL)."""

STOPS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """Exit of a command that a signal ended at once. The exit status is its code."""

    def __init__(self, number: signal.Signals, status: int) -> None:
        super().__init__(status)
        self.number = number


class StopSignals:
    """Stop signals of this process. Python runs their handlers in the main thread."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first stop signal of this command."""
        self._status: int | None = None
        self._depth = 0
        self._handlers = 0

    @contextmanager
    def handled(self, *, resumable: bool) -> Iterator[None]:
        """Raise `Stopped` on a stop signal that is not deferred.

        Args:
            resumable: the command continues when it is started again. The exit status is then 75,
                otherwise 128 and the number of the signal.
        """
        before, self._status = self._status, RESUMABLE if resumable else None
        try:
            with self._listening():
                yield
        finally:
            self._status = before

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Record stop signals in `received` without raising."""
        self._depth += 1
        try:
            if self._handlers:
                yield
            else:
                with self._listening():
                    yield
        finally:
            self._depth -= 1

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Install the handlers. In other threads than the main one, which cannot, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in STOPS}
        self._handlers += 1
        try:
            yield
        finally:
            self._handlers -= 1
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
            if not self._handlers:
                self.received = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        repeated, self.received = self.received is not None, self.received or signal.Signals(number)
        if not self._depth:
            status = 128 + number if self._status is None else self._status
            raise Stopped(self.received, status)
        if repeated:
            # Not through logging: the signal may have interrupted a write to the same stream.
            os.write(2, _AGAIN % signal.Signals(number).name.encode())


_AGAIN = (
    b"%s again: the run is already stopping and ends when its checkpoint is written; "
    b"SIGQUIT (Ctrl-\\) ends it at once and loses that checkpoint\n"
)

STOP_SIGNALS = StopSignals()
"""The stop signals of this process."""


def ignore_stops(worker: int = 0) -> None:
    """Ignore stop signals in a helper process, such as a worker of a DataLoader.

    A signal to the process group reaches helpers too. Their parent needs them until its checkpoint
    is written, and they end with their parent.

    Args:
        worker: number of the worker, the argument of a DataLoader's `worker_init_fn`.
    """
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
