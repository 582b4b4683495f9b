"""What every test finds as if it were the first of its process."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _log_levels() -> Iterator[None]:
    """Commands that run inside the tests' process set the level of medm's log, which later tests
    read."""
    logger = logging.getLogger("medm")
    level = logger.level
    yield
    logger.setLevel(level)
