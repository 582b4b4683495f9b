"""Names of views and placeholders: one table, one parser."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from medm.errors import RecipeError
from medm.models.lvlm.options import LVLMOptions
from medm.types import KIND_OF_PLACEHOLDER, PLACEHOLDERS, View, parse_view


@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("image", View("image")),
        ("volume", View("volume")),
        ("image@sam2", View("image", "sam2")),
        ("volume@vista3d_96", View("volume", "vista3d_96")),
        ("image@dino-v2", View("image", "dino-v2")),
    ],
)
def test_a_view_is_a_kind_of_file_and_perhaps_a_name(name: str, view: View) -> None:
    assert parse_view(name) == view
    assert str(view) == name


@pytest.mark.parametrize(
    "name", ["", "picture", "image@", "@sam2", "image@SAM", "image@a.b", "image@a@b", " image"]
)
def test_other_names_are_refused_with_the_kinds(name: str) -> None:
    with pytest.raises(
        RecipeError, match=r"expected a kind of file, image or volume, alone or followed by @"
    ):
        parse_view(name)
    with pytest.raises(RecipeError, match="did you mean 'volume'"):
        parse_view("volumes")


def test_every_kind_has_one_token_and_perhaps_synonyms() -> None:
    assert PLACEHOLDERS == {"image": "<image>", "volume": "<volume>"}
    assert View("volume", "a").placeholder == "<volume>"
    assert KIND_OF_PLACEHOLDER["<image3d>"] == "volume"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "image@sam2",
            "branch 'image@sam2': a language model reads each file once.*name the branch 'image'",
        ),
        ("images", "view 'images': expected a kind of file, image or volume"),
    ],
)
def test_a_branch_of_a_language_model_is_named_by_its_kind(name: str, reason: str) -> None:
    branch: Any = {"encoder": {"name": "siglip", "path": "x"}, "connector": {"name": "mlp"}}
    model: Any = {"llm": {"name": "qwen2.5", "path": "x"}}
    TypeAdapter(LVLMOptions).validate_python({**model, "branches": {"image": branch}})
    with pytest.raises(ValueError, match=reason):
        TypeAdapter(LVLMOptions).validate_python({**model, "branches": {name: branch}})
