"""Recipes: read, overridden and refused with the place and the nearest word."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from medm.config import Options, apply_overrides, parse_value, read_yaml, validate
from medm.errors import RecipeError
from medm.registry import NamedBlock, Registry
from tests.crafted import yaml_aliases


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


BAD_VALUES = {
    "nul": "\0",
    "control character": "x\x01y",
    "key that is a list": "{[a, b]: 1}",
    "key that is a mapping": "{{a: b}: 1}",
    "date that is none": "2024-99-99",
    "time that is none": "2001-01-01 99:99:99",
    "integer of 5,000 digits": "1" * 5000,
    "integer of 50,000 hexadecimal digits": "0x" + "f" * 50_000,
    "300 brackets": "[" * 300 + "]" * 300,
    "3,000 brackets": "[" * 3000 + "]" * 3000,
    "300 blocks": "{a: " * 300 + "1" + "}" * 300,
    "alias to itself": "&a [*a]",
    "alias to a block around it": "&a {b: {c: *a}}",
    "number that is none": "!!int x",
    "truth that is none": "!!bool x",
    "moment that is none": "!!timestamp x",
    "set of lists": "!!set {[a]: 1}",
    "infinity": ".inf",
    "no number": ".nan",
    "number beyond all floats": "1e999",
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_row_34_oddities_of_yaml_are_messages(tmp_path: Path, name: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"a: 1\nb: {BAD_VALUES[name]}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"recipe\.yaml(, line 2)?: "):
        read_yaml(recipe)
    with pytest.raises(RecipeError, match="cannot read the value") as error:
        apply_overrides({}, [f"b={BAD_VALUES[name]}"])
    assert len(str(error.value)) < 600


def test_row_35_nested_aliases_are_counted_and_not_expanded(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    yaml_aliases(40)(recipe)
    started = time.process_time()
    with pytest.raises(RecipeError, match="more than 100000 values"):
        read_yaml(recipe)
    assert time.process_time() - started < 1


def test_row_35_a_recipe_without_end_is_not_read() -> None:
    with pytest.raises(RecipeError, match="larger than 1048576 bytes"):
        read_yaml("/dev/zero")


@pytest.mark.parametrize("value", ["0", "1e9"])
def test_a_limit_in_the_environment_is_a_whole_number(value: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "medm", "list"],
        env={**os.environ, "MEDM_MAX_RECIPE_BYTES": value},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "MEDM_MAX_RECIPE_BYTES (environment): expected a whole number" in done.stderr


def test_a_key_of_an_override_is_not_deeper_than_a_recipe() -> None:
    with pytest.raises(RecipeError, match="nested deeper than 100 levels"):
        apply_overrides({}, [".".join(["a"] * 10_000) + "=1"])
    assert apply_overrides({}, ["a.b.c=1"]) == {"a": {"b": {"c": 1}}}
