"""Stand-ins for the programs of Slurm on one machine, which run the tasks of a job step.

`srun` does what its manual says of the options that medm writes: it starts SLURM_NTASKS tasks,
ends the step with all its processes at the first task that fails, and returns the highest status.
SIGUSR1 stands for the early signal of the time limit: it reaches the first process of each task.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SRUN = """#!{python}
import os, signal, subprocess, sys, time
from pathlib import Path
options = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
first = next(i for i, word in enumerate(sys.argv) if i and not word.startswith("--"))
assert options["kill-on-bad-exit"] == "1" and int(options["wait"]) > 0, sys.argv
tasks = []
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
for rank in range(int(os.environ["SLURM_NTASKS"])):
    own = {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}}
    with open(options["output"].replace("%t", str(rank)), "ab") as log:
        tasks.append(subprocess.Popen(
            sys.argv[first:], env=os.environ | own, stdout=log, stderr=log, start_new_session=True))
Path(os.environ["STEP"]).write_text(str(os.getpid()))
def below(parent):
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                yield from below(int(path.parent.name))
        except OSError:
            pass
    yield parent
while any(task.poll() is None for task in tasks):
    if any(task.poll() for task in tasks):
        for process in [process for task in tasks if task.poll() is None for process in below(task.pid)]:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
    time.sleep(0.05)
codes = [task.returncode for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$*" >>"$REQUEUED"; exit "${SCONTROL_STATUS:-0}"; fi
"""

SBATCH = """#!/bin/sh
echo "$*" >>"$SUBMITTED"
echo "$((100 + $(wc -l <"$SUBMITTED")))"
"""


class Cluster:
    """A folder with the programs, and the jobs that run there."""

    def __init__(self, folder: Path, *, tasks: int = 2) -> None:
        self.folder, self.step = folder, folder / "step"
        self.requeued, self.submitted = folder / "requeued", folder / "submitted"
        programs = folder / "programs"
        programs.mkdir(parents=True)
        for name, text in (
            ("srun", SRUN.format(python=sys.executable)),
            ("scontrol", SCONTROL),
            ("sbatch", SBATCH),
        ):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.environment = os.environ | {
            "PATH": os.pathsep.join([str(programs), os.environ.get("PATH", os.defpath)]),
            "SLURM_NTASKS": str(tasks),
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "STEP": str(self.step),
            "REQUEUED": str(self.requeued),
            "SUBMITTED": str(self.submitted),
        }

    def start(
        self, script: Path, *arguments: str, job: int = 17, stop: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a batch script once.

        Args:
            script: the script.
            arguments: of the script.
            job: its number.
            stop: send the early signal when this file has content.
        """
        self.step.unlink(missing_ok=True)
        size = stop.stat().st_size if stop is not None and stop.exists() else 0
        run = subprocess.Popen(
            ["bash", str(script), *arguments],
            env=self.environment | {"SLURM_JOB_ID": str(job)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        until = time.monotonic() + 300
        while stop is not None and not (
            self.step.exists() and stop.exists() and stop.stat().st_size > size
        ):
            assert run.poll() is None and time.monotonic() < until, self.told(run)
            time.sleep(0.02)
        if stop is not None:
            os.kill(int(self.step.read_text()), signal.SIGUSR1)
        out, err = run.communicate(timeout=300)
        return subprocess.CompletedProcess(run.args, run.returncode, out, err)

    def told(self, run: subprocess.Popen[str]) -> str:
        """Return what a job wrote, for a failed test."""
        run.kill()
        logs = sorted(self.folder.rglob("*-rank*.log"))
        return "".join([*run.communicate(), *(log.read_text() for log in logs)])
