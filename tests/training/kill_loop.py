"""A training run that is killed again and again. Started as a script by its test, so that imports
are paid once.

Every attempt is a forked process. Half of them are killed from outside after a random time, half
kill themselves at a random file-system call, most of which belong to the writing of a checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from medm.errors import CheckpointError
from medm.models.manifest import verify
from medm.training import checkpoints
from tests.operations import watch
from tests.training.toys import trainer, weights

KILLS = 10
CASE: dict[str, Any] = {
    "max_steps": 12,
    "save_steps": 2,
    "held_out": 4,
    "eval_strategy": "steps",
    "eval_steps": 6,
}


def attempt(
    output_dir: Path, *, finished: Path, die_at_call: int | None = None, count: Path | None = None
) -> int:
    """Fork a run; returns its process id."""
    if child := os.fork():
        return child
    calls = watch(output_dir, die_at=die_at_call)
    run = trainer(output_dir, **CASE)
    run.fit(resume=True)
    if count is not None:
        count.write_text(str(calls()))
    save_file(weights(run.model), finished)
    os._exit(0)


def main(folder: Path) -> None:
    logging.disable(logging.WARNING)
    started = time.monotonic()
    os.waitpid(
        attempt(folder / "whole", finished=folder / "whole.safetensors", count=folder / "calls"), 0
    )
    seconds, calls = time.monotonic() - started, int((folder / "calls").read_text())
    choose = random.Random(11)
    killed, unreadable, saved = 0, [], []
    while killed < KILLS:
        at_call = choose.randrange(1, calls // 3) if killed % 2 else None
        child = attempt(folder / "cut", finished=folder / "early.safetensors", die_at_call=at_call)
        if at_call is None:
            time.sleep(choose.uniform(0.1, 0.5) * seconds)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):  # it was over before its time
            shutil.rmtree(folder / "cut")
            continue
        killed += 1
        present = checkpoints.folders(folder / "cut")
        saved.append(len(present))
        for path in present:
            try:
                verify(path)
            except CheckpointError as error:
                unreadable.append(str(error))
    os.waitpid(attempt(folder / "cut", finished=folder / "cut.safetensors"), 0)
    (folder / "report.json").write_text(
        json.dumps({"killed": killed, "unreadable": unreadable, "saved": saved})
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
