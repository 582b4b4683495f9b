"""The rows of docs/faults.md: each by the test that enforces it."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

from campaign.harness import Case, Limits, Part, WrongResultError

ROOT = Path(__file__).parents[2]


def tests() -> dict[int, str]:
    """Return the test of each row."""
    page = (ROOT / "docs" / "faults.md").read_text("utf-8")
    found = re.findall(r"^\| (\d+) \| .*\| `(tests/[^`]+)` \|$", page, re.MULTILINE)
    return {int(row): test for row, test in found}


def _run(test: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:randomly", test],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode or " passed" not in done.stdout:
        raise WrongResultError(done.stdout[-500:])


def cases(folder: Path, count: int, seed: int) -> list[Case]:
    """Return the tests of `count` rows; by default of all."""
    chosen = sorted(tests().items())
    if count < len(chosen):
        chosen = sorted(random.Random(seed).sample(chosen, count))
    return [Case(f"row {row}: {test}", partial(_run, test), "rows") for row, test in chosen]


def _prepare(folder: Path) -> None:
    if len(tests()) < 45:
        raise WrongResultError(f"docs/faults.md has {len(tests())} rows with a test")


PART = Part(
    "rows",
    "The rows of docs/faults.md, by their tests",
    _prepare,
    cases,
    1000,
    Limits(cpu=400, gib=8, wall=1200),
)
