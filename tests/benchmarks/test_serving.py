"""The clients of the cells of the server: nothing is lost, and what is lost is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.cells import serving
from benchmarks.harness import GateError
from benchmarks.server import Running, ask_all, mixed_requests, save_model
from medm.serving.options import ServeOptions
from tests.serving.live import running


def test_nothing_is_lost_and_a_lost_request_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path, serving.SMALL)
    log = tmp_path / "log"
    log.write_text("")
    bodies = mixed_requests(20, side=serving.SMALL.image_size, tokens=8)
    cell: Any = serving.Lost("cpu")
    with running(ServeOptions(model=str(model), name="model", slots=4, queue=8), key=None) as live:
        here = Running(None, int(live.url.rpartition(":")[2]), log)  # type: ignore[arg-type]
        assert cell._lost(here, bodies, 0) == 0
        outcomes = ask_all(here.port, bodies[:4], at_once=4)
        assert [outcome.status for outcome in outcomes] == [200] * 4
        assert all(outcome.complete for outcome in outcomes)
        assert len({outcome.reply for outcome in outcomes}) == 4
        assert cell._lost(here, [body | {"n": 2} for body in bodies[:4]], 0) == 4
        log.write_text("Traceback")
        with pytest.raises(GateError, match="holds an error"):
            cell._lost(here, bodies[:1], 0)
