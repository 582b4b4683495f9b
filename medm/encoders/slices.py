"""A 2-D encoder over the slices of a volume, as MedM-VL-CT-Chest does: every slice is one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from medm.encoders import ENCODERS
from medm.encoders.base import VisionEncoder
from medm.encoders.sizes import wholes
from medm.errors import RecipeError
from medm.types import Config, VisionFeatures

DEFAULT_SLICES = 32


class SlicesEncoder(VisionEncoder):
    """Tokens of every slice on one grid (slices, rows, columns). Slices do not see each other here.

    Args:
        architecture: has no sizes of its own; they stand in the block of the inner encoder.
        others: see `SlicesOptions`.
    """

    axes: ClassVar[int] = 3

    def __init__(
        self, *, architecture: Mapping[str, object], encoder: Mapping[str, object]
    ) -> None:
        super().__init__()
        if architecture:
            raise RecipeError(
                f"slices: sizes belong in the inner encoder's block, found {sorted(architecture)}"
            )
        described = {
            key: value for key, value in encoder.items() if key not in ("path", "image_size")
        }
        self.encoder: VisionEncoder = ENCODERS.constructor(described)()
        if self.encoder.axes != 2:
            raise RecipeError(
                f"slices: expected an encoder of 2-D images, found {encoder['name']!r}"
            )
        if self.encoder.prefix:
            raise RecipeError(
                "slices: class tokens of single slices have no place on the grid; use tokens "
                "'patch'"
            )
        self.channels = self.encoder.channels
        self.dim, self.pooled_dim = self.encoder.dim, self.encoder.pooled_dim

    @classmethod
    def preprocess_from(
        cls,
        published: Mapping[str, object],
        architecture: Mapping[str, object],
        image_size: int | Sequence[int] | None = None,
    ) -> Config:
        """Return HU -1000..1000 to 0..1 and 32 slices of the inner encoder's size.

        Channels, mean and standard deviation are those of the inner encoder.

        Args:
            published: preprocessing of the inner encoder, as its own `preprocess_from` gives it.
            architecture: empty.
            image_size: slices, rows and columns; one number is the side of 32 slices.
        """
        size = [DEFAULT_SLICES, *wholes({"size": [224, 224], **published}, "size")]
        if image_size is not None:
            size = (
                [DEFAULT_SLICES, image_size, image_size]
                if isinstance(image_size, int)
                else list(image_size)
            )
        return {
            "scale": "hu",
            "windows": [[-1000.0, 1000.0]],
            "crop_foreground": 0.0,
            "size": size,
            "channels": published.get("channels", 3),
            "mean": published.get("mean", [0.5]),
            "std": published.get("std", [0.5]),
        }

    def grid(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """One layer of the grid per slice."""
        if len(spatial) != 3:
            raise ValueError(
                f"slices: expected an input of (slices, rows, columns), found {spatial}"
            )
        return (spatial[0], *self.encoder.grid(spatial[1:]))

    def forward(self, pixels: Tensor) -> VisionFeatures:
        """pixels: (B, C, slices, rows, columns)."""
        batch, depth = pixels.shape[0], pixels.shape[2]
        images = pixels.transpose(1, 2).flatten(0, 1)  # (B * slices, C, rows, columns)
        features = self.encoder(images)
        return VisionFeatures(
            tokens=features.tokens.unflatten(0, (batch, depth)).flatten(
                1, 2
            ),  # (B, slices * cells, dim)
            grid=(depth, *features.grid),
            pooled=None
            if features.pooled is None
            else features.pooled.unflatten(0, (batch, depth)).mean(dim=1),
        )
