"""Start-up time of the command line."""

from __future__ import annotations

import subprocess
import sys
from typing import ClassVar

from benchmarks.harness import Figure, GateError, seconds


class Help(Figure):
    """P15."""

    name, title, peer, at_most = "P15", "seconds to `medm --help`", "-", True
    targets: ClassVar = {"cpu": 0.3}

    def gate(self) -> str:
        script = "import sys; from medm.cli.app import app; print('torch' in sys.modules)"
        loaded = subprocess.run(
            [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True
        ).stdout
        if loaded.strip() != "False":
            raise GateError("the command line imports torch")
        return "no torch is imported"

    def values(self, rounds: int) -> list[float]:
        command = [sys.executable, "-m", "medm", "--help"]
        runs = [
            seconds(lambda: subprocess.run(command, capture_output=True, check=True))
            for _ in range(rounds + 1)
        ]
        return runs[1:]
