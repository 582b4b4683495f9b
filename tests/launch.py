"""Starts a module of the tests on several processes, as torchrun does for a training."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The environment's own programs first: another ninja would build DeepSpeed's parts anew, which
# takes a minute.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
COMPILER = all(
    shutil.which(program, path=PATH) for program in (os.environ.get("CXX", "g++"), "ninja")
)
needs_compiler = pytest.mark.skipif(
    not COMPILER, reason="DeepSpeed builds its communication op, and there is no g++ or ninja"
)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def environment() -> dict[str, str]:
    """Of processes that use DeepSpeed on the CPU; what it builds is kept between runs."""
    kept = {"TORCH_EXTENSIONS_DIR": str(ROOT / ".cache" / "torch_extensions")}
    return {**kept, **os.environ, "PATH": PATH, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def on_two_processes(module: str, *arguments: str) -> None:
    """Run `python -m module arguments` twice, connected; fails with what both printed."""
    on_processes(2, module, *arguments)


def on_processes(count: int, module: str, *arguments: str) -> None:
    """Run `python -m module arguments` on connected processes; fails with what they printed."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count),
        "--master_port", str(free_port()), "-m", module, *arguments,
    ]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1000,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
