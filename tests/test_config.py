"""Recipes: read, overridden and refused with the place and the nearest word."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from medm.config import Options, apply_overrides, parse_value, read_yaml, validate
from medm.errors import RecipeError
from medm.registry import NamedBlock, Registry


class Plain(Options):
    name: str


class Deep(Plain):
    depth: int = Field(default=2, ge=1)


PARTS: Registry[Any] = Registry("part", group="medm.tests.none", options=Plain)
PARTS.add("plain", "medm.errors:MedmError", "no options of its own")
PARTS.add("deep", "medm.errors:MedmError", "has a depth", options=Deep)


class Section(Options):
    part: Annotated[Plain, NamedBlock(PARTS)]
    rate: float = 1.0
    items: list[Deep] = []


def problems(value: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        validate(Section, value, source="r.yaml")
    return str(caught.value)


def test_a_block_is_checked_by_the_part_it_names() -> None:
    assert validate(Section, {"part": "deep"}, source="").part == Deep(name="deep", depth=2)
    assert (
        validate(Section, {"part": {"name": "deep", "depth": 3}}, source="").model_dump()["part"][
            "depth"
        ]
        == 3
    )
    assert "part: unknown key 'depth' (known: name)" in problems(
        {"part": {"name": "plain", "depth": 3}}
    )
    assert "part: unknown part 'dep': did you mean 'deep'?" in problems({"part": "dep"})
    assert "part.depth: expected greater than or equal to 1, found 0" in problems(
        {"part": {"name": "deep", "depth": 0}}
    )


def test_every_problem_has_its_place() -> None:
    text = problems({"rate": "fast", "items": [{"name": "a"}, {"name": "b", "depht": 1}]})
    assert "part: missing; this key is required" in text
    assert "rate: expected a number, found 'fast'" in text
    assert "items.1: unknown key 'depht': did you mean 'depth'?" in text
    assert text.startswith("r.yaml: 3 problem(s)")


def test_types_are_not_bent() -> None:
    assert "rate" in problems({"part": "deep", "rate": "1.0"})
    assert "depth" in problems({"part": {"name": "deep", "depth": 2.5}})
    assert validate(Section, {"part": "deep", "rate": 2}, source="").rate == 2.0


def test_yaml_reads_scientific_notation_and_refuses_double_keys(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("rate: 2e-4\nother: 1E5\nname: e5\n")
    assert read_yaml(file) == {"rate": 2e-4, "other": 1e5, "name": "e5"}
    file.write_text("a: 1\nb: 2\na: 3\n")
    with pytest.raises(RecipeError, match="line 3: key 'a' is written twice"):
        read_yaml(file)
    file.write_text("a: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(RecipeError, match="line 1: not valid YAML"):
        read_yaml(file)
    file.write_text("- a\n")
    with pytest.raises(RecipeError, match="expected a mapping of keys at the top, found list"):
        read_yaml(file)
    file.write_text("a: [1\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        read_yaml(file)
    with pytest.raises(RecipeError, match="no such recipe"):
        read_yaml(tmp_path / "gone.yaml")


def test_overrides_reach_sections_lists_and_names_with_dots() -> None:
    recipe = {"parts": {"image.connector": {"lr": 1.0}}, "data": {"train": [{"path": "a"}]}}
    changed = apply_overrides(
        recipe,
        [
            "parts.image.connector.lr=2e-5",
            "data.train.0.weight=3",
            "train.max_steps=10",
            "flags=[a, b]",
        ],
    )
    assert changed == {
        "parts": {"image.connector": {"lr": 2e-5}},
        "data": {"train": [{"path": "a", "weight": 3}]},
        "train": {"max_steps": 10},
        "flags": ["a", "b"],
    }
    assert recipe == {"parts": {"image.connector": {"lr": 1.0}}, "data": {"train": [{"path": "a"}]}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("no-equals", "expected dotted.key=value"),
        ("data.train.7.path=x", "'7' is not a position in a list of 1 items"),
        ("short.name=x", "'short' holds 'mlp', not a block"),
    ],
)
def test_overrides_that_lead_nowhere_are_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        apply_overrides({"data": {"train": [{"path": "a"}]}, "short": "mlp"}, [override])


def test_values_are_yaml() -> None:
    assert [parse_value(text) for text in ("1e-3", "true", "null", "[1, x]", "text")] == [
        1e-3,
        True,
        None,
        [1, "x"],
        "text",
    ]


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "n", "y", "No", "YES"])
def test_words_stay_words(word: str) -> None:
    """`train.save_strategy=no` means the word: YAML 1.1 would make it false."""
    assert parse_value(word) == word
    assert parse_value(f"[{word}]") == [word]
