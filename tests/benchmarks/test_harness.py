"""The benchmarks' own promises: one cell that fails costs no other, time is kept, figures are
written as they come."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest

from benchmarks import __main__ as command
from benchmarks import limits
from benchmarks.cells import CELLS
from benchmarks.harness import Figure, GateError, Ratio


class Even(Ratio):
    """Both sides sleep as long as each other's double says."""

    name, title, peer = "even", "sleeping", "more sleep"
    targets: ClassVar = {"cpu": 1.5}

    def gate(self) -> str:
        return "both sleep"

    def run_peer(self) -> float:
        time.sleep(0.004)
        return 1

    def run_ours(self) -> float:
        time.sleep(0.002)
        return 1


class Wrong(Even):
    """Its gate finds other numbers."""

    name = "wrong"

    def gate(self) -> str:
        raise GateError("1 is not 2")


class Broken(Figure):
    """Raises where it should measure."""

    name, title, peer = "broken", "nothing", "-"
    targets: ClassVar = {"cpu": 1.0}

    def values(self, rounds: int) -> list[float]:
        raise RuntimeError("no such kernel\nand more lines")


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *given: str) -> dict[str, dict[str, object]]:
    monkeypatch.setattr(command, "CELLS", [Broken, Wrong, Even])
    fixed = limits.Limits("a machine", 1, 1e9, 1e9, 1e9)
    monkeypatch.setattr(command, "measure_limits", lambda **_: fixed)
    monkeypatch.setattr(command, "draw", lambda *_: None)
    monkeypatch.setattr(
        sys, "argv", ["benchmarks", "--output", str(folder), "--rounds", "4", *given]
    )
    try:
        command.main()
    except SystemExit as stop:
        assert stop.code == "failed: broken"
    found: dict[str, dict[str, object]] = json.loads((folder / "cpu.json").read_text())["cells"]
    return found


def test_a_cell_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cells = run(monkeypatch, tmp_path)
    assert (
        cells["broken"]["status"] == "failed"
        and cells["broken"]["gate"] == "FAILED: RuntimeError: no such kernel"
    )
    assert cells["wrong"]["status"] == "gate failed" and math.isnan(
        float(str(cells["wrong"]["value"]))
    )
    assert cells["even"]["reached"] is True and len(cells["even"]["raw"]) == 4  # type: ignore[arg-type]
    assert "| even |" in (tmp_path / "cpu.md").read_text()


def test_time_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = run(monkeypatch, tmp_path, "--minutes", "0.00001", "even", "broken")
    assert list(cells) == ["even"], "in the order that was given; the next one is not begun"
    assert len(cells["even"]["raw"]) == 3, "fewest rounds"  # type: ignore[arg-type]
    assert "no time is left for broken" in capsys.readouterr().out


def test_cells_have_names_of_their_own_and_profiles() -> None:
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    assert {profile for cell in CELLS for profile in cell.targets} == {"cpu", "h200"}


def test_a_missing_package_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "SimpleITK":
            raise limits.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(limits, "version", version)
    assert limits.versions()["SimpleITK"] == "-"
