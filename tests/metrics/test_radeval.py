"""The bridge to RadEval, with a stand-in for the package: it needs models of several gigabytes."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

import medm.metrics.radeval as module
from medm.errors import DeviceError
from medm.metrics import METRICS
from medm.metrics.base import Resampling
from medm.metrics.radeval import radeval


def test_its_absence_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "radeval", None)
    with pytest.raises(DeviceError, match=r"pip install 'RadEval>=2\.2' \(or 'medm\[report\]'\)"):
        METRICS.get("radeval")(["a"], ["a"])


def test_scores_of_reports_become_means_with_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Evaluator:
        def __init__(self, **options: Any) -> None:
            asked.update(options)

        def __call__(self, *, refs: list[str], hyps: list[str]) -> dict[str, Any]:
            same = [float(a == b) for a, b in zip(refs, hyps, strict=True)]
            return {"radgraph_simple": same, **({"broken": 0.5} if refs == ["z"] else {})}

    monkeypatch.setitem(sys.modules, "radeval", SimpleNamespace(RadEval=Evaluator))
    monkeypatch.setattr(module, "version", lambda name: "2.2.1")
    (result,) = radeval(
        ["a", "b", "c", "x"], ["a", "b", "y", "y"], resampling=Resampling(rounds=50)
    )
    assert (result.name, result.value, result.n) == ("radeval/radgraph_simple", 0.5, 4)
    assert result.low < 0.5 < result.high
    assert asked == {"metrics": ["radgraph"], "per_sample": True, "show_progress": False}
    assert radeval(["", "b"], ["", "b"], resampling=Resampling(rounds=0))[0].per_item == [0, 1]
    with pytest.raises(ValueError, match="expected 1 numbers under 'broken'"):
        radeval(["z"], ["z"])
