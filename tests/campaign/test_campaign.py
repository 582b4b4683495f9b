"""The fault campaign: its harness tells the outcomes apart, and a short seeded part finds nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from campaign.harness import (
    OUTCOMES,
    Case,
    Limits,
    Part,
    WrongResultError,
    run_cases,
    run_in_jobs,
)
from campaign.parts import PARTS, load
from medm.errors import MedmError

ROOT = Path(__file__).parents[2]


def _raise(error: BaseException) -> None:
    raise error


def _spin() -> None:
    while True:
        pass


def _take_memory() -> None:
    assert len(bytearray(b"x") * (200 * 2**20))


TRIALS = {
    "as intended": lambda: None,
    "message": lambda: _raise(MedmError("no such file")),
    "traceback": lambda: _raise(KeyError("a")),
    "wrong result": lambda: _raise(WrongResultError("2 instead of 1")),
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "hang": _spin,
    "over budget": _take_memory,
}


def test_every_outcome_is_told_and_the_cases_behind_a_crash_run() -> None:
    assert set(TRIALS) == set(OUTCOMES)
    cases = [Case(name, run) for name, run in TRIALS.items()]
    outcomes = run_cases(cases, Limits(cpu=0.5, gib=0.1, wall=60), "trials")
    assert [(one.case, one.outcome) for one in outcomes] == [(name, name) for name in TRIALS]
    assert outcomes[1].detail == "no such file"


def test_jobs_give_the_same_outcomes_in_the_same_order() -> None:
    cases = [
        Case(f"{name} {number}", run, f"group {number}")
        for number in range(3)
        for name, run in TRIALS.items()
        if name not in ("hang", "over budget")
    ]
    limits = Limits(cpu=5, gib=1, wall=60)
    for apart in ("groups", "cases"):
        part = Part("trials", "", lambda folder: None, lambda *_: cases, 1, limits, apart)
        one, three = run_in_jobs(cases, part, 1), run_in_jobs(cases, part, 3)
        assert [(o.case, o.group, o.outcome) for o in one] == [
            (o.case, o.group, o.outcome) for o in three
        ]
        assert [o.outcome for o in three] == [case.name.rpartition(" ")[0] for case in cases]


def test_a_child_that_sleeps_is_ended_by_the_clock() -> None:
    [outcome] = run_cases([Case("sleep", signal.pause)], Limits(wall=0.5), "trials")
    assert outcome.outcome == "hang"


@pytest.mark.parametrize("name", PARTS)
def test_every_part_loads_and_is_on_its_page(name: str) -> None:
    assert load(name).name == name
    assert f"| `{name}` |" in (ROOT / "docs" / "campaign.md").read_text("utf-8")


def test_a_short_seeded_campaign_finds_nothing(tmp_path: Path) -> None:
    parts = ["media", "masks", "records", "caches", "model_files", "http"]
    command = [sys.executable, "-m", "campaign", "--count", "12", "--seed", "1"]
    for part in parts:
        command += ["--only", part]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "table.md")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = json.loads((tmp_path / "table.json").read_text())
    assert [part["name"] for part in table["parts"]] == parts
    tried = {
        part["name"]: sum(map(sum, map(dict.values, part["counts"].values())))
        for part in table["parts"]
    }
    assert min(tried.values()) >= 70
    assert "| **all** |" in (tmp_path / "table.md").read_text()
