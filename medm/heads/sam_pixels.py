"""Preprocessing of the SAM family, in the fields of `medm.imaging`."""

from __future__ import annotations

from collections.abc import Mapping

from medm.types import Config

_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's filter numbers, which `preprocessor_config.json` stores."""


def square_pixels(published: Mapping[str, object], size: int | list[int]) -> Config:
    """Return the fields for a square image, resized without regard to its aspect.

    Filter and statistics are those of `preprocessor_config.json`; without one bilinear, and
    ImageNet's.

    Args:
        published: content of the file, or empty.
        size: side in pixels, or rows and columns.
    """
    resample = published.get("resample")
    return {
        "size": [size, size] if isinstance(size, int) else list(size),
        "fit": "squash",
        "interpolation": _FILTERS.get(resample if isinstance(resample, int) else 2, "bilinear"),
        "mean": published.get("image_mean") or [0.485, 0.456, 0.406],
        "std": published.get("image_std") or [0.229, 0.224, 0.225],
    }
