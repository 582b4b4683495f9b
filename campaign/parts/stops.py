"""SIGTERM and SIGINT through every launcher: status 75, and a whole checkpoint from which the run
goes on.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from campaign.harness import Case, Limits, Part, WrongResultError
from medm.errors import CheckpointError
from medm.models.manifest import verify
from medm.training import checkpoints
from tests.launch import environment
from tests.slurm_stubs import Cluster
from tests.test_slurm import SLOW, written
from tests.test_slurm import recipe as slurm_recipe
from tests.training.test_launcher import PLUGIN, ROOT, recipe

STOPPED = 75
MEDM = [sys.executable, "-P", "-m", "medm"]


def _command(launcher: str, folder: Path, file: Path) -> list[str]:
    train = ["train", str(file), "--plugin", str(folder / "slow.py")]
    if launcher == "medm train":
        return [*MEDM, *train]
    if launcher == "medm launch":
        return [*MEDM, "launch", "--processes", "2", *train]
    (folder / "train.sh").write_text(
        f'set -euo pipefail\nsource "{ROOT}/scripts/launch.sh"\nlaunch {" ".join(train)} "$@"\n'
    )
    return ["bash", str(folder / "train.sh")]


def _signal(folder: Path, launcher: str, number: signal.Signals) -> None:
    place = folder / f"{launcher} {number.name}".replace("/", "-").replace(" ", "-")
    place.mkdir()
    file = recipe(place, max_steps=40, save_strategy="no", logging_steps=1)
    (place / "slow.py").write_text(PLUGIN)
    processes = "2" if launcher == "scripts/launch.sh" else "1"
    process = subprocess.Popen(
        _command(launcher, place, file), cwd=place, env=environment() | {"GPUS": processes},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        _wait(place / "out" / "loss.jsonl", process)
        if number == signal.SIGINT:  # Ctrl-C reaches the whole group
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)
        _, err = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != STOPPED:
        raise WrongResultError(f"status {process.returncode}: {err[-400:]}")
    if "Traceback" in err:
        raise WrongResultError(f"a traceback: {err[-400:]}")
    _whole(place / "out")


def _wait(file: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 400
    while not (file.exists() and file.stat().st_size):
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            raise WrongResultError(f"no step was taken: {process.communicate()[1][-400:]}")
        time.sleep(0.05)


def _whole(out: Path) -> None:
    found = checkpoints.folders(out)
    if not found:
        raise WrongResultError("there is no checkpoint")
    for folder in found:
        try:
            verify(folder)
        except CheckpointError as error:
            raise WrongResultError(f"a damaged checkpoint: {error}") from None


def _batch(folder: Path) -> None:
    """The written sbatch file with stand-ins for the programs of Slurm, two ranks."""
    place = folder / "sbatch"
    cluster = Cluster(place / "cluster")
    cluster.environment |= {**environment(), "PATH": cluster.environment["PATH"], "SLOW": "1"}
    (place / "slow.py").write_text(SLOW)
    script = written(
        place, str(slurm_recipe(place, "cut")), "--gpus-per-node", "2",
        "--plugin", str(place / "slow.py"),
    )  # fmt: skip
    done = cluster.start(script, stop=place / "cut" / "loss.jsonl")
    if not cluster.requeued.exists():
        raise WrongResultError(f"no requeue, status {done.returncode}: {done.stderr[-400:]}")
    _whole(place / "cut")


def cases(folder: Path, count: int, seed: int) -> Sequence[Case]:
    """Return `count` of the launchers with each signal; by default all."""
    made = [
        Case(f"{launcher} {number.name}", partial(_signal, folder, launcher, number), launcher)
        for launcher in ("medm train", "medm launch", "scripts/launch.sh")
        for number in (signal.SIGTERM, signal.SIGINT)
    ]
    made.append(Case("sbatch, early signal", partial(_batch, folder), "sbatch with stub srun"))
    return made if count >= len(made) else random.Random(seed).sample(made, count)


def _prepare(folder: Path) -> None:
    folder.mkdir(exist_ok=True)


PART = Part(
    "stops",
    "Stops through every launcher",
    _prepare,
    cases,
    1000,
    Limits(cpu=300, gib=8, wall=1500),
    "cases",
)
