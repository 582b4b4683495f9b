"""Where recipes are: files of one's own by path, shipped ones by name (`medm-vl-2d/pretrain`)."""

from __future__ import annotations

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
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def find(recipe: str | Path) -> Path:
    """The file of a recipe given by path or by shipped name. Raises `RecipeError` with the nearest name."""
    path = Path(recipe)
    if path.is_file():
        return path
    known = shipped()
    name = str(recipe).removesuffix(".yaml").removeprefix("recipes/")
    if name in known:
        return known[name]
    raise RecipeError(f"{recipe}: no such file, and no recipe of medm{suggest(name, known)}")


def summary(path: Path) -> str:
    """The first comment line of a recipe: what it is."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("#"):
                return line.lstrip("# ").strip()
            if line.strip():
                break
    return ""
