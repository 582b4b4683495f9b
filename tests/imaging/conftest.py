"""Warnings that are given once in a process are given anew in each test."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def fresh_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medm.imaging.notices._logged", set())
