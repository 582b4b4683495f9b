"""Lookup of recipes: a user's files by path, shipped ones by name (`medm-vl-2d/pretrain`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medm.errors import RecipeError, suggest

_PACKAGE = Path(__file__).parents[1]
_PLACES = (_PACKAGE.parent / "recipes", _PACKAGE / "recipes")
"""In a checkout, and in an installed package (see setup.py)."""


def shipped() -> dict[str, Path]:
    """Name to file of every recipe that comes with medm, sorted."""
    folder = next((place for place in _PLACES if place.is_dir()), None)
    if folder is None:
        return {}
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.yaml"))
    }


def find(recipe: str | Path) -> Path:
    """Return the file of a recipe given by path or by shipped name.

    Raises `RecipeError` with the nearest name.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    known = shipped()
    name = str(recipe).removesuffix(".yaml").removeprefix("recipes/")
    if name in known:
        return known[name]
    raise RecipeError(f"{recipe}: no such file, and no recipe of medm{suggest(name, known)}")


def refuse_options(command: str, words: Sequence[str], known: Sequence[str] = ()) -> None:
    """Raise `RecipeError` for an option of another program.

    The message says what to write in its place.

    Args:
        command: of medm, which took options that it does not know as words.
        words: recipe and overrides, as they were typed.
        known: options that the command has.
    """
    for position, word in enumerate(words):
        if not word.startswith("-"):
            continue
        name, equals, value = word.lstrip("-").partition("=")
        following = words[position + 1] if position + 1 < len(words) else ""
        value = value if equals else following if following and "=" not in following else "VALUE"
        key = name.replace("-", "_")
        if key in ("config", "config_file", "recipe", "cfg", "cfg_path", "yaml"):
            recipe = "RECIPE" if value == "VALUE" else value
            raise RecipeError(
                f"{word}: the recipe comes without an option: medm {command} {recipe}"
            )
        if key in _keys("train"):
            raise RecipeError(
                f"{word}: keys of the recipe come without dashes: write train.{key}={value}"
            )
        if key in _keys("data") or key in ("output_dir", "init_from") or "." in name:
            full = f"data.{key}" if key in _keys("data") else name
            raise RecipeError(
                f"{word}: keys of the recipe come without dashes: write {full}={value}"
            )
        raise RecipeError(f"{word}: no such option of 'medm {command}'{suggest(word, known)}")


def _keys(section: str) -> frozenset[str]:
    """Names of the keys in a section of a training recipe."""
    from medm.data.options import DataOptions
    from medm.training.options import TrainOptions

    return frozenset((TrainOptions if section == "train" else DataOptions).model_fields)


def summary(path: Path) -> str:
    """The first comment line of a recipe: what it is."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("#"):
                return line.lstrip("# ").strip()
            if line.strip():
                break
    return ""
