"""The cells of the server at a small size: replies are equal, and nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cells import serving


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(serving.Lost, "requests", 60)
    monkeypatch.setattr(serving.Lost, "tokens", 8)


@pytest.mark.timeout(240)
def test_nothing_is_lost(small: Any) -> None:
    assert serving.Lost("cpu").values(1) == [0.0]
