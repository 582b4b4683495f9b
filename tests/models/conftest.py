"""Tiny published parts, written once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def llms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family name to a folder with a random language model and its tokenizer."""
    root = tmp_path_factory.mktemp("llms")
    return {family: tiny.save_llm(family, root / family) for family in tiny.FAMILIES}
