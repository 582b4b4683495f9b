"""What is said where published files are not there; nothing is looked up on a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from medm.config import validate
from medm.errors import CheckpointError, RecipeError
from medm.models import build
from medm.models.lvlm.options import LVLMOptions
from tests.tiny import lvlm_section, save_llm


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such", r"model\.llm\.path: /no/such: no such folder$"),
        ("./weights", r"model\.llm\.path: \./weights: no such folder$"),
        ("a/b/c", r"model\.llm\.path: a/b/c: no such folder$"),
        (
            "someone/not-cached-2b",
            r"Without a network: .*hf download someone/not-cached-2b --local-dir DIR\) and set model\.llm\.path=DIR",
        ),
    ],
)
def test_a_language_model_that_is_not_there(source: str, message: str) -> None:
    with pytest.raises((CheckpointError, RecipeError), match=message):
        build(
            validate(
                LVLMOptions,
                lvlm_section(Path("x")) | {"llm": {"name": "auto", "path": source}},
                source="test",
            )
        )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such", r"^/no/such: no such folder$"),
        ("someone/not-cached", r"hf download someone/not-cached"),
    ],
)
def test_an_encoder_that_is_not_there(tmp_path: Path, source: str, message: str) -> None:
    section = lvlm_section(save_llm("qwen2.5", tmp_path / "llm"), path=source)
    del section["branches"]["image"]["encoder"]["architecture"]
    with pytest.raises(CheckpointError, match=message):
        build(validate(LVLMOptions, section, source="test"))
