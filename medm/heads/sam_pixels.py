"""Preprocessing of the SAM family, in the fields of `medm.imaging`."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image

from medm.types import Config


def square_pixels(published: Mapping[str, object], size: int | list[int]) -> Config:
    """Return the fields for a square image, resized without regard to its aspect.

    Filter and statistics are those of `preprocessor_config.json`; without one bilinear, and
    ImageNet's.

    Args:
        published: content of the file, or empty.
        size: side in pixels, or rows and columns.
    """
    resample = published.get("resample")
    number = resample if isinstance(resample, int) else Image.Resampling.BILINEAR
    return {
        "size": [size, size] if isinstance(size, int) else list(size),
        "fit": "squash",
        "interpolation": Image.Resampling(number).name.lower(),
        "mean": published.get("image_mean") or [0.485, 0.456, 0.406],
        "std": published.get("image_std") or [0.229, 0.224, 0.225],
    }
