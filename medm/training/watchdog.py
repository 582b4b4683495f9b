"""Watch over the ranks of a run: one that stands still is named, with its step.

Each rank leaves a sign of life in a small file of the output folder, and a thread of each rank
reads those of the others. Without it a rank that hangs shows as a time-out of some collective
operation on all the others, half an hour later, which names neither rank nor step.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from medm.distributed import rank, world_size
from medm.errors import MedmError
from medm.launcher import LINK

logger = logging.getLogger(__name__)

FOLDER = ".tmp-ranks"
"""Folder of the signs of life; left over ones are removed when a run starts."""
_EARLY, _LATE = 0.9, 1.2
"""Parts of the time-out after which a rank is named, and after which this rank ends by itself if
the collective operation that it waits in does not."""
_SHORT = 0.1
"""Fewest seconds between signs of life at the beginning of steps."""
_END_SECONDS = 5.0
"""Longest wait for the thread at the end of a run."""
_TIMED_OUT = re.compile(r"timed? ?out|timeout", re.IGNORECASE)
_WAITING = ("distributed_c10d.py", "_engine_run_backward", "deepspeed")


@dataclass(slots=True)
class _Seen:
    """The last sign of life of a rank, and the moment it was read, by this rank's clock."""

    content: dict[str, object]
    moment: float


class Watchdog(TrainerCallback):
    """Names the rank that stands still. One rank alone is not watched.

    Args:
        output_dir: folder that all ranks see.
        timeout: seconds without a sign of life, `train.ddp_timeout`.
    """

    def __init__(self, output_dir: Path, timeout: float) -> None:
        self.folder, self.timeout = output_dir / FOLDER, timeout
        self.verdict: str | None = None
        """The message about a rank that stands still."""
        self._step, self._count, self._signed = 0, 0, 0.0
        self._lock = threading.Lock()
        self._seen: dict[int, _Seen] = {}
        self._ended = threading.Event()
        self._main = threading.main_thread().ident or 0

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self._step = state.global_step + 1
        if world_size() > 1 and time.monotonic() - self._signed > _SHORT:
            self._sign(rank())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs.

        Raises:
            MedmError: an error of a collective operation, after a rank was found to stand still.
        """
        if world_size() == 1:
            yield
            return
        number, ranks = rank(), world_size()
        thread = threading.Thread(
            target=self._watch, args=(number, ranks), name="watchdog", daemon=True
        )
        thread.start()
        try:
            yield
        except RuntimeError as error:
            # This error may come a moment before the thread has looked.
            self._ended.wait(min(5.0, self.timeout * (1 - _EARLY)))
            if self.verdict is None and _TIMED_OUT.search(str(error)):
                self.verdict = self._late(str(error))
            if self.verdict is None or isinstance(error, MedmError):
                raise
            raise MedmError(self.verdict) from error
        finally:
            self._ended.set()
            thread.join(_END_SECONDS)  # or a last sign of life would be left behind
            with suppress(OSError):
                self._file(number).unlink()
                self.folder.rmdir()  # fails while others are there

    def _watch(self, number: int, ranks: int) -> None:
        seen = self._seen
        interval = min(5.0, self.timeout / 20)
        while not self._ended.wait(interval):
            self._sign(number)
            now = time.monotonic()
            for other in set(range(ranks)) - {number}:
                content = self._read(other)
                if content is not None and (other not in seen or seen[other].content != content):
                    seen[other] = _Seen(content, now)
            silent = [
                other for other, sign in seen.items() if now - sign.moment > _EARLY * self.timeout
            ]
            if silent and self.verdict is None:
                self.verdict = self._message(silent)
                logger.error("%s", self.verdict)
            last = max((now - seen[other].moment for other in silent), default=0.0)
            if last > _LATE * self.timeout + 10 and self.verdict is not None:
                LINK.report(f"error: {self.verdict}")
                os._exit(1)  # the main thread waits for the rank, and cannot be ended

    def _sign(self, number: int) -> None:
        with self._lock:
            self._write(number)

    def _write(self, number: int) -> None:
        self._count, self._signed = self._count + 1, time.monotonic()
        content = {
            "count": self._count,
            "step": self._step,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "at": _place(sys._current_frames().get(self._main)),
        }
        temporary = self._file(number).with_suffix(".tmp")
        try:
            self.folder.mkdir(exist_ok=True)
            temporary.write_text(json.dumps(content), encoding="utf-8")
            temporary.replace(self._file(number))
        except OSError as error:  # a full disk: the checkpoint says so, and the others wait for it
            logger.debug("no sign of life of rank %d: %s", number, error)

    def _read(self, number: int) -> dict[str, object] | None:
        try:
            content = json.loads(self._file(number).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.json"

    def _named(self, ranks: Iterable[int]) -> str:
        return "; ".join(
            f"rank {other} of {world_size()} (process {sign.get('process')} on "
            f"{sign.get('host')}), last seen at step {sign.get('step')}, {sign.get('at')}"
            for other in sorted(ranks)
            for sign in [self._seen[other].content]
        )

    def _late(self, reason: str) -> str:
        """Return the message of a time-out while every rank gives signs of life."""
        return (
            f"step {self._step}: the ranks waited for each other longer than train.ddp_timeout = "
            f"{self.timeout:g} s. The others are: {self._named(self._seen) or 'unknown'}. If one "
            "of them does work that takes so long, raise train.ddp_timeout; else look at its "
            f"machine and disk, then continue with --resume ({' '.join(reason.split())[:200]})"
        )

    def _message(self, silent: list[int]) -> str:
        return (
            f"no sign of life for {_EARLY * self.timeout:.0f} s: {self._named(silent)}. It is "
            "stopped, its "
            "machine or its disk does not answer; end it, then continue with --resume. "
            f"train.ddp_timeout is {self.timeout:g} s"
        )


def _place(frame: FrameType | None) -> str:
    """Return where a thread is: in a collective operation, or a function of medm."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.endswith(_WAITING) or code.co_name in _WAITING:
            return "waiting for the other ranks"
        if f"{os.sep}medm{os.sep}" in code.co_filename:
            return f"in {Path(code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "starting"
