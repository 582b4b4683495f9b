"""Fields of a published `preprocessor_config.json` that all encoders read alike."""

from __future__ import annotations

from collections.abc import Mapping

from medm.encoders.sizes import numbers, whole
from medm.types import Config

PILLOW_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's filter numbers, which the file stores."""


def published_fields(published: Mapping[str, object]) -> Config:
    """Return mean, deviation and filter, where the file has them. Raises `RecipeError`."""
    fields: Config = {}
    if published.get("resample") is not None:
        fields["interpolation"] = PILLOW_FILTERS[whole(published, "resample")]
    for own, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if published.get(theirs) is not None:
            fields[own] = numbers(published, theirs)
    return fields
