"""Launcher of the ranks of one command on this machine: they stop, fail and end together.

Each rank runs in its own session, so that a signal to the process group of the launcher reaches the
launcher alone; it forwards a stop to each rank once. It waits for a checkpoint without limit. It
prints one of the errors that the ranks report. A rank whose launcher was killed stops as after
SIGTERM.

Ranks find each other through the variables of torchrun (RANK, WORLD_SIZE, MASTER_ADDR ...). This
module does not import torch, so that signals are handled from the start.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypedDict

from medm.children import child_environment
from medm.stopping import RESUMABLE, STOPS

GRACE = 30.0
"""Seconds that the other ranks have after one ended early. A rank that writes a checkpoint has no
limit."""

_LINK = "MEDM_LAUNCHER"
"""Environment variable of a rank: the descriptor for its reports, and the process id of its
launcher."""

_MEDM = (sys.executable, "-P", "-m", "medm")

_SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux."""


def launched_rank() -> int:
    """Return the rank that the launcher gave this process; 0 without a launcher.

    Needs no process group, and no torch.
    """
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """Return the number of ranks of the launch; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True, slots=True)
class Place:
    """Position of the ranks of this machine among those of all machines."""

    processes: int
    """Ranks on this machine."""
    nodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    """0: a free port."""


# The side of a rank -------------------------------------------------------------------------------


class _Link:
    """Messages from a rank to its launcher. Without a launcher they have no effect."""

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._lock = threading.RLock()
        self._writers = 0

    def join(self) -> None:
        """Connect to the launcher that the environment names."""
        given = os.environ.pop(_LINK, None)  # not for child processes
        if given is None:
            return
        descriptor, launcher = (int(number) for number in given.split(":"))
        os.set_inheritable(descriptor, False)
        self._descriptor = descriptor
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != launcher:  # the launcher was killed before the line above
            raise SystemExit(RESUMABLE)

    @property
    def connected(self) -> bool:
        """True in a process that a launcher started."""
        return self._descriptor is not None

    def report(self, text: str, *, traceback: bool = False) -> bool:
        """Send an error to the launcher, which prints it once. Returns False without a launcher."""
        return self._tell({"error": text, "traceback": traceback, "time": time.monotonic()})

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Protect this rank from the launcher while it writes files that must be complete."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            self._writers += change
            self._tell({"writers": self._writers})

    def _tell(self, message: Mapping[str, object]) -> bool:
        if self._descriptor is None:
            return False
        try:
            data = json.dumps(message).encode() + b"\n"
            with self._lock:  # a checkpoint is written in a thread of its own
                while data:
                    data = data[os.write(self._descriptor, data) :]
        except OSError:  # the launcher is gone
            return False
        return True


LINK = _Link()
"""The link of this process."""


# The side of the launcher -------------------------------------------------------------------------


class _ErrorReport(TypedDict):
    """Message of a rank about its error."""

    error: str
    traceback: bool
    time: float


@dataclass(slots=True)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    channel: socket.socket
    unread: bytes = b""
    writers: int = 0
    errors: list[_ErrorReport] = field(default_factory=list)
    code: int | None = None
    ended: float = 0.0
    deadline: float | None = None
    killed: bool = False

    def kill(self) -> None:
        """End the process and its helpers, which are in a session of their own."""
        self.killed = True
        with suppress(ProcessLookupError):  # it ended and was not waited for yet
            os.killpg(self.process.pid, signal.SIGKILL)

    def read(self) -> None:
        """Read the messages of the rank."""
        while True:
            try:
                data = self.channel.recv(65536)
            except BlockingIOError:
                return
            except ConnectionError:
                data = b""
            if not data:
                return
            *lines, self.unread = (self.unread + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "error" in message:
                    self.errors.append(message)
                else:
                    self.writers = message["writers"]
                    if self.deadline is not None and not self.writers:
                        self.deadline = time.monotonic() + GRACE


class Launcher:
    """The ranks of one command on this machine.

    Args:
        arguments: arguments of `medm`; a command that continues when it is started again.
        place: position of the ranks.
        program: program of a rank.
    """

    def __init__(
        self, arguments: Sequence[str], place: Place, *, program: Sequence[str] = _MEDM
    ) -> None:
        self._command = [*program, *arguments]
        self._place = place
        self._ranks: list[_Rank] = []
        self._signals: list[int] = []
        self._stopped: int | None = None
        self._ending = False

    def run(self) -> int:
        """Start the ranks, wait until all ended, and return the exit status."""
        with ExitStack() as stack:
            selector = stack.enter_context(selectors.DefaultSelector())
            wakeup = stack.enter_context(self._wakeup())
            selector.register(wakeup, selectors.EVENT_READ, data=wakeup)
            port = stack.enter_context(self._reserved_port())
            stack.callback(self._kill)
            for local_rank in range(self._place.processes):
                rank = self._start(local_rank, port)
                self._ranks.append(rank)
                selector.register(rank.channel, selectors.EVENT_READ)
            while running := [rank for rank in self._ranks if rank.code is None]:
                for key, _ in selector.select(self._patience(running)):
                    if key.data is wakeup:
                        wakeup.recv(65536)
                self._pass_on_signals()
                for rank in running:
                    self._look_at(rank, selector)
        return self._status()

    @contextmanager
    def _wakeup(self) -> Iterator[socket.socket]:
        """Install the launcher's handlers; yield a socket that is readable after every signal."""
        reading, writing = socket.socketpair()
        reading.setblocking(False)
        writing.setblocking(False)
        numbers = (*STOPS, signal.SIGQUIT, signal.SIGCHLD)
        before = {
            number: signal.signal(number, lambda number, frame: self._signals.append(number))
            for number in numbers
        }
        descriptor = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        try:
            yield reading
        finally:
            signal.set_wakeup_fd(descriptor)
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
            reading.close()
            writing.close()

    @contextmanager
    def _reserved_port(self) -> Iterator[int]:
        """Yield a free port that stays bound.

        No other program gets it; rank 0 can still listen on it.
        """
        if self._place.master_port:
            yield self._place.master_port
            return
        with socket.socket() as bound:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((self._place.master_addr, 0))
            yield int(bound.getsockname()[1])

    def _start(self, local_rank: int, port: int) -> _Rank:
        place = self._place
        number = place.node_rank * place.processes + local_rank
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        environment = child_environment() | {
            "RANK": str(number),
            "LOCAL_RANK": str(local_rank),
            "GROUP_RANK": str(place.node_rank),
            "WORLD_SIZE": str(place.nodes * place.processes),
            "LOCAL_WORLD_SIZE": str(place.processes),
            "MASTER_ADDR": place.master_addr,
            "MASTER_PORT": str(port),
            _LINK: f"{theirs.fileno()}:{os.getpid()}",
        }
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // place.processes)))
        process = subprocess.Popen(
            self._command, env=environment, pass_fds=[theirs.fileno()], start_new_session=True
        )
        theirs.close()
        return _Rank(number, process, ours)

    def _patience(self, running: Sequence[_Rank]) -> float | None:
        deadlines = [
            rank.deadline
            for rank in running
            if rank.deadline is not None and not rank.writers and not rank.killed
        ]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _pass_on_signals(self) -> None:
        signals, self._signals = self._signals, []
        for number in signals:
            if number == signal.SIGQUIT:
                self._kill()
                raise SystemExit(128 + number)
            if number == signal.SIGCHLD:
                continue
            if self._stopped is None:
                self._stopped = number
                self._send(signal.SIGTERM)
            else:
                _say(
                    f"{signal.Signals(number).name} again: the processes are already stopping and "
                    "end when their checkpoint is written; SIGQUIT (Ctrl-\\) ends them at once "
                    "and loses that checkpoint"
                )

    def _look_at(self, rank: _Rank, selector: selectors.BaseSelector) -> None:
        rank.read()
        rank.code = rank.process.poll()
        if rank.code is not None:
            rank.ended = time.monotonic()
            rank.read()
            selector.unregister(rank.channel)
            rank.channel.close()
            if rank.code != 0 and not self._ending:
                self._ending = True
                self._send(signal.SIGTERM)
                for other in self._ranks:
                    other.deadline = rank.ended + GRACE
        elif (
            rank.deadline is not None
            and rank.deadline <= time.monotonic()
            and not rank.writers
            and not rank.killed
        ):
            rank.kill()

    def _send(self, number: int) -> None:
        for rank in self._ranks:
            if rank.code is None:
                rank.process.send_signal(number)

    def _kill(self) -> None:
        """Kill the ranks that still run; none after a normal end."""
        for rank in self._ranks:
            if rank.process.poll() is None:
                rank.kill()
                rank.process.wait()

    # The end --------------------------------------------------------------------------------------

    def _status(self) -> int:
        """Print the error, and return the exit status of all ranks."""
        failed = [rank for rank in self._ranks if self._failed(rank)]
        if self._stopped is not None:
            # Before the first step a rank ends at once, and one that is further loses its neighbor.
            stops = [
                rank.ended for rank in self._ranks if rank.code in (RESUMABLE, -signal.SIGTERM)
            ]
            failed = [rank for rank in failed if _since(rank) < min(stops, default=math.inf)]
        if failed:
            return self._explain(failed)
        if any(rank.code for rank in self._ranks):
            return RESUMABLE
        return 0

    def _failed(self, rank: _Rank) -> bool:
        """Return whether a rank failed by itself.

        It has neither finished nor stopped, and this launcher did not kill it.
        """
        if rank.code in (0, RESUMABLE) or rank.killed:
            return False
        stopped = self._stopped is not None or self._ending
        return not (stopped and rank.code == -signal.SIGTERM)

    def _explain(self, failed: Sequence[_Rank]) -> int:
        """Print the first error in full and each different one as one line; return the status."""
        first, *others = sorted(failed, key=_since)
        told = _reason(first)
        _say(told if first.errors else f"error: process {first.number} {told}")
        seen = {told}
        for other in others:
            reason = _reason(other)
            if reason not in seen:
                seen.add(reason)
                last = reason.strip().splitlines()[-1] if _is_traceback(other) else reason
                _say(f"process {other.number} ended after it: {last}")
        return first.code if first.code is not None and first.code > 0 else 1


def _since(rank: _Rank) -> float:
    """Return the time at which a rank failed: of its first error, or of its end."""
    return rank.errors[0]["time"] if rank.errors else rank.ended


def _is_traceback(rank: _Rank) -> bool:
    return bool(rank.errors) and rank.errors[0]["traceback"]


def _reason(rank: _Rank) -> str:
    if rank.errors:
        return rank.errors[0]["error"]
    code = rank.code or 0
    if code >= 0:
        return f"ended with status {code}"
    with suppress(ValueError):
        name = signal.Signals(-code).name
        hint = " (the system may have run out of memory)" if name == "SIGKILL" else ""
        return f"was ended by {name}{hint}"
    return f"was ended by signal {-code}"


def _say(text: str) -> None:
    sys.stderr.write(f"{text.rstrip()}\n")
    sys.stderr.flush()
