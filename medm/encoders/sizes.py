"""Sizes from the JSON of a recipe or a published config, each checked for its type."""

from __future__ import annotations

from collections.abc import Mapping

from medm.errors import RecipeError


def number(sizes: Mapping[str, object], key: str) -> float:
    """Return a number. Raises `RecipeError`."""
    value = sizes[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecipeError(f"{key}: expected a number, found {value!r}")
    return float(value)


def whole(sizes: Mapping[str, object], key: str) -> int:
    """Return a whole number. Raises `RecipeError`."""
    value = number(sizes, key)
    if not value.is_integer():
        raise RecipeError(f"{key}: expected a whole number, found {value!r}")
    return int(value)


def numbers(sizes: Mapping[str, object], key: str) -> list[float]:
    """Return a list of numbers. Raises `RecipeError`."""
    value = sizes[key]
    if not isinstance(value, (list, tuple)):
        raise RecipeError(f"{key}: expected a list of numbers, found {value!r}")
    return [number({key: one}, key) for one in value]


def wholes(sizes: Mapping[str, object], key: str) -> list[int]:
    """Return a list of whole numbers. Raises `RecipeError`."""
    value = sizes[key]
    if not isinstance(value, (list, tuple)):
        raise RecipeError(f"{key}: expected a list of whole numbers, found {value!r}")
    return [whole({key: one}, key) for one in value]
