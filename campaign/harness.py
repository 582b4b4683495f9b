"""Runs cases in child processes with limits, and classifies how each ends.

A child is a fork of this process, so that imports are paid once. It runs cases until one of them
kills it or exceeds a limit; the next child continues behind that case. The parent never runs a case
and never trains: threads of autograd do not survive a fork. With several jobs, each group of cases
has a runner, a fork in turn, which forks the children of its group.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import resource
import select
import selectors
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from medm.errors import MedmError

OUTCOMES = (
    "as intended", "message", "traceback", "hang", "crash", "wrong result", "over budget",
)  # fmt: skip
"""The classes of outcomes. The first two are right."""
GOOD = OUTCOMES[:2]


class WrongResultError(Exception):
    """A case ended without an error, and with something else than what it should give."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one case may cost."""

    cpu: float = 20.0
    """Processor seconds of the process and of its children."""
    gib: float = 2.0
    """Growth of the largest resident memory, of the process or of one child."""
    wall: float = 240.0
    """Seconds by the clock; generous, since a machine may be busy."""


@dataclass(frozen=True, slots=True)
class Case:
    """One trial. `run` returns if all is as intended.

    It raises `MedmError` for a message, `WrongResultError` for a wrong result; every other
    exception counts as a traceback.
    """

    name: str
    run: Callable[[], object]
    group: str = ""
    """The line of the table that it counts for; the part's name by default."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the campaign."""

    name: str
    title: str
    prepare: Callable[[Path], None]
    """Writes what the cases need into a folder; runs in a child."""
    cases: Callable[[Path, int, int], Sequence[Case]]
    """Returns the cases of a prepared folder for a count and a seed; runs in the parent."""
    count: int
    """Default number of cases of each group."""
    limits: Limits = Limits()
    apart: Literal["groups", "cases"] = "groups"
    """What may run at the same time: groups, or also the cases of a group, which share no files."""


@dataclass(slots=True)
class Outcome:
    """How a case ended."""

    group: str
    case: str
    outcome: str
    detail: str = ""
    cpu: float = 0.0
    gib: float = 0.0


@dataclass(slots=True)
class PartResult:
    """The outcomes of a part."""

    name: str
    title: str
    seconds: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)

    def counts(self) -> dict[str, Counter[str]]:
        """Return the number of outcomes of each class by group."""
        found: dict[str, Counter[str]] = {}
        for one in self.outcomes:
            found.setdefault(one.group, Counter())[one.outcome] += 1
        return found

    def bad(self) -> list[Outcome]:
        """Return the outcomes that are not right."""
        return [one for one in self.outcomes if one.outcome not in GOOD]


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a temporary folder that is removed at the end.

    In memory where there is room: the campaign syncs thousands of small files.
    """
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2**30
    folder = Path(tempfile.mkdtemp(prefix="medm-campaign-", dir=memory if roomy else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_part(
    part: Part,
    *,
    count: int | None = None,
    seed: int = 0,
    folder: Path,
    only: str = "",
    jobs: int = 1,
) -> PartResult:
    """Run all cases of a part.

    Args:
        part: the part.
        count: of each group; the part's own by default.
        seed: of all draws.
        folder: a folder for what is prepared.
        only: run only groups whose name contains this.
        jobs: cases that run at the same time.
    """
    started = time.monotonic()
    result = PartResult(part.name, part.title)
    prepare = Case("prepare", lambda: part.prepare(folder))
    # Preparing may train models, which takes minutes on a busy machine.
    [prepared] = run_cases([prepare], Limits(cpu=600, gib=8, wall=1800), part.name)
    if prepared.outcome != "as intended":
        if prepared.outcome == "message":  # nothing was tried, which is no success
            prepared.outcome = "wrong result"
        result.outcomes.append(prepared)
    else:
        cases = [
            case for case in part.cases(folder, count or part.count, seed) if only in case.group
        ]
        result.outcomes += run_in_jobs(cases, part, jobs)
    result.seconds = time.monotonic() - started
    return result


def run_in_jobs(cases: Sequence[Case], part: Part, jobs: int) -> list[Outcome]:
    """Run cases, so many at the same time, and return an outcome for each, in their order."""
    lines: dict[str, list[int]] = {}
    for number, case in enumerate(cases):
        lines.setdefault(case.group if part.apart == "groups" else case.name, []).append(number)
    if jobs == 1 or len(lines) == 1:
        return run_cases(cases, part.limits, part.name)
    waiting, outcomes = list(lines.values())[::-1], dict[int, Outcome]()
    with selectors.DefaultSelector() as running:
        while waiting or running.get_map():
            while waiting and len(running.get_map()) < jobs:
                numbers = waiting.pop()
                runner = _start_runner([cases[number] for number in numbers], part)
                running.register(runner.stream, selectors.EVENT_READ, (numbers, runner))
            for key, _ in running.select():
                numbers, runner = key.data
                if data := os.read(key.fd, 2**16):
                    runner.told += data
                    continue
                running.unregister(key.fileobj)
                runner.stream.close()
                os.waitpid(runner.process, 0)
                found = [Outcome(**one) for one in json.loads(runner.told)]
                outcomes.update(zip(numbers, found, strict=True))
    return [outcomes[number] for number in range(len(cases))]


@dataclass(slots=True)
class _Runner:
    """A fork that runs the cases of a group, and tells the outcomes when it is done."""

    process: int
    stream: BinaryIO
    told: bytes = b""


def _start_runner(cases: Sequence[Case], part: Part) -> _Runner:
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        os.close(reading)
        status = 1
        try:
            told = [asdict(one) for one in run_cases(cases, part.limits, part.name)]
            with os.fdopen(writing, "wb") as stream:
                stream.write(json.dumps(told).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    return _Runner(process, os.fdopen(reading, "rb", buffering=0))


def run_cases(cases: Sequence[Case], limits: Limits, group: str) -> list[Outcome]:
    """Run cases in children and return an outcome for each, in their order."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(cases):
        outcomes += _run_in_child(cases[len(outcomes) :], limits, group)
    return outcomes


def _run_in_child(cases: Sequence[Case], limits: Limits, group: str) -> list[Outcome]:
    """Fork, run cases until one ends the child, and return the outcomes so far."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        os.close(reading)
        os.setsid()  # so that what it started can be ended with it
        _child(cases, limits, writing)
    os.close(writing)
    outcomes: list[Outcome] = []
    ended_by = ""
    with os.fdopen(reading, "rb", buffering=0) as stream:
        buffer = b""
        deadline = time.monotonic() + limits.wall
        while True:
            ready, _, _ = select.select([stream], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                ended_by = "hang"
                break
            data = stream.read(65536)
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                case = cases[len(outcomes)]
                outcomes.append(Outcome(case.group or group, case.name, **json.loads(line)))
                deadline = time.monotonic() + limits.wall
    if ended_by:
        _end_group(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    _end_group(child, signal.SIGKILL)
    if len(outcomes) < len(cases):
        case = cases[len(outcomes)]
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if ended_by:
            detail = f"no end within {limits.wall:g} s by the clock"
        elif number == signal.SIGXCPU:
            ended_by, detail = "hang", f"no end within {limits.cpu:g} s of a core"
        else:
            ended_by = "crash"
            detail = signal.Signals(number).name if number else f"exit {status >> 8}"
        outcomes.append(Outcome(case.group or group, case.name, ended_by, detail))
    return outcomes


def _end_group(child: int, number: signal.Signals) -> None:
    """Signal the process group of a child, if there is any of it left."""
    try:
        os.killpg(child, number)
    except ProcessLookupError:
        return


def _child(cases: Sequence[Case], limits: Limits, writing: int) -> None:
    """Run cases and write a line for each. Never returns."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    # Address space is more than memory: this only protects the machine.
    ceiling = size + int((limits.gib + 4) * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (ceiling, ceiling))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()  # of pytest: a crash is an outcome, no message on its terminal
    gc.freeze()  # collections look at the cases' own objects alone
    for case in cases:
        found = run_here(case, limits)
        os.write(writing, json.dumps(found).encode() + b"\n")
    os._exit(0)


def run_here(case: Case, limits: Limits) -> dict[str, Any]:
    """Run a case in this process and return the fields of its outcome.

    A limit of processor seconds is set for the case; exceeding it ends the process.
    """
    end = time.process_time() + 2 * limits.cpu + 2
    resource.setrlimit(resource.RLIMIT_CPU, (int(end), resource.RLIM_INFINITY))
    before, held = _used(), _peak(anew=True)
    detail, outcome = "", "as intended"
    try:
        case.run()
    except MedmError as error:
        outcome, detail = "message", str(error)
        if not detail.strip():
            outcome, detail = "traceback", f"{type(error).__name__} without a message"
    except WrongResultError as error:
        outcome, detail = "wrong result", str(error)
    except MemoryError:
        outcome, detail = "over budget", _last_line(limit=6)
    except BaseException as error:  # noqa: BLE001 - also SystemExit and what extensions raise
        outcome, detail = "traceback", f"{type(error).__name__}: {error} [{_last_line()}]"
    cpu = _used() - before
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    gib = (max(_peak() - held, 0)) / 2**30
    # The peak of children is that of all so far; only growth beyond the parent can be theirs.
    gib = max(gib, (children - held) / 2**30)
    if outcome in GOOD and (cpu > limits.cpu or gib > limits.gib):
        outcome, detail = "over budget", f"{cpu:.1f} s of a core, {gib:.2f} GiB; {detail}"
    return {"outcome": outcome, "detail": detail[:600], "cpu": round(cpu, 3), "gib": round(gib, 3)}


def _last_line(*, limit: int = 4) -> str:
    """Return the innermost places of the exception that is handled."""
    frames = traceback.extract_tb(sys.exc_info()[2])[-limit:]
    return " < ".join(f"{Path(one.filename).name}:{one.lineno}" for one in reversed(frames))


def _used() -> float:
    who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    used = [resource.getrusage(one) for one in who]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _peak(*, anew: bool = False) -> int:
    """Return the largest resident memory so far in bytes, or begin it anew."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def in_fork(work: Callable[[], object], *, seconds: float = 600) -> int:
    """Run work in a fork of its own and return its status: an exit status, or minus a signal.

    Its error, if it has any, is raised here again as `WrongResultError`, or as `MedmError`.

    Args:
        work: runs in the fork.
        seconds: by the clock, after which the fork is killed.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            work()
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - told to the parent
            kind = "message" if isinstance(error, MedmError) else "other"
            told = f"{type(error).__name__}: {error} [{_last_line(limit=8)}]"
            os.write(writing, json.dumps([kind, told[:3000]]).encode())
            os._exit(70)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        ready, _, _ = select.select([stream], [], [], seconds)
        if not ready:
            os.kill(child, signal.SIGKILL)
        told = stream.read()
    _, status = os.waitpid(child, 0)
    if not ready:
        raise WrongResultError(f"no end within {seconds:g} s by the clock")
    if told:
        kind, text = json.loads(told)
        if kind == "message":
            raise MedmError(text)
        raise WrongResultError(text)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else status >> 8
