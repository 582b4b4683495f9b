"""Preprocessing as data: what is done to the pixels of one branch, saved in every checkpoint.

The same object serves training, inference and serving. Torch-free; the work is done in `medm.imaging`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from medm.config import Options


class ImagePreprocess(Options):
    """A 2-D image to a normalised array (C, height, width) of float32."""

    kind: Literal["image"] = "image"
    """2-D."""
    size: list[int] = Field(default=[224, 224], min_length=2, max_length=2)
    """Height and width of the result, in pixels."""
    fit: Literal["squash", "crop", "pad"] = "squash"
    """How an image of another shape is made to fit: resized without regard to its aspect (SigLIP), resized by its
    shorter side and cropped in the centre (CLIP), or resized by its longer side and padded with `mean` (LLaVA "pad")."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    """Resampling filter, Pillow's by name."""
    channels: Literal[1, 3] = 3
    """1 keeps grey images grey; 3 repeats grey to red, green and blue."""
    mean: list[float] = [0.5, 0.5, 0.5]
    """Subtracted from values in 0..1, one a channel."""
    std: list[float] = [0.5, 0.5, 0.5]
    """Divides after the mean is subtracted."""
    window: list[float] | None = None
    """Lower and upper raw value that become 0 and 1 in images of more than 8 bits (HU for CT). Without it such an
    image uses its DICOM window where the file has one, else its full declared range."""
