"""Convolutional encoders over images whose network is a module of another library.

The network stays that of the library. Its batch norms are replaced where statistics are fixed, and
its blocks are wrapped, so that their activations can be recomputed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from medm.encoders import Statistics
from medm.encoders.base import VisionEncoder
from medm.encoders.batch_norm import batch_norm
from medm.encoders.preprocessor_file import published_fields
from medm.encoders.sizes import whole
from medm.types import Config, VisionFeatures

_IMAGENET: Config = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


class RecomputedBlock(GradientCheckpointingLayer):
    """A block of the network, whose activations training may recompute.

    Args:
        block: (B, C, h, w) to (B, C', h', w').
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', h', w')."""
        output: Tensor = self.block(pixels)
        return output


class CNNEncoder(VisionEncoder):
    """One token per cell of the last map; the pooled vector is their mean.

    A subclass builds the network, and sets `dim`, `pooled_dim` and `channels`.
    """

    default_size: ClassVar[int] = 224
    """Side of the input in pixels, where neither recipe nor published preprocessing says one."""

    @abstractmethod
    def last_map(self, pixels: Tensor) -> Tensor:
        """(B, C, height, width) to (B, dim, rows, columns), the sizes of `grid`."""

    def forward(self, pixels: Tensor) -> VisionFeatures:
        """pixels: (B, C, height, width)."""
        grid = self.grid(tuple(pixels.shape[2:]))
        cells = self.last_map(pixels.to(self.device_and_dtype["dtype"]))
        return VisionFeatures(
            tokens=cells.flatten(2).transpose(1, 2),  # (B, prod(grid), dim)
            grid=grid,
            pooled=cells.mean(dim=(2, 3)),
        )

    def rename_published(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add the counts of batches, which files of old releases of torch do not have.

        They do not enter the computation.
        """
        counts = {
            name.replace("running_mean", "num_batches_tracked"): torch.tensor(0)
            for name in tensors
            if name.endswith(".running_mean")
        }
        return {**counts, **tensors}

    @classmethod
    def preprocess_from(
        cls,
        published: Mapping[str, object],
        architecture: Mapping[str, object],
        image_size: int | None = None,
    ) -> Config:
        """Return ImageNet's, or what the published file says.

        The shorter side is resized to the size, and the longer one is cropped.
        """
        size = published.get("size")
        fits_square = isinstance(size, Mapping) and {"height", "width"} <= size.keys()
        side = image_size or _side(published) or cls.default_size
        channels = whole({"num_channels": 3, **architecture}, "num_channels")
        usual = _IMAGENET if channels == 3 else {"mean": [0.5] * channels, "std": [0.5] * channels}
        cropped = bool(published.get("do_center_crop")) or not fits_square
        return {
            "size": [side, side],
            "fit": "crop" if cropped else "squash",
            "channels": channels,
            **usual,
            **published_fields(published),
        }


def fix_statistics(network: nn.Module, statistics: Statistics) -> None:
    """Replace the 2-D batch norms of a network by those of the chosen statistics, in place."""
    kind = batch_norm(statistics, axes=2)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and type(child) is not kind:
                setattr(parent, name, kind(child.num_features, child.eps, child.momentum))


def _side(published: Mapping[str, object]) -> int | None:
    """Return the side of the square that a `preprocessor_config.json` makes, or None."""
    for key in ("crop_size", "size") if published.get("do_center_crop") else ("size",):
        size = published.get(key)
        sides = list(size.values()) if isinstance(size, Mapping) else [size]
        found = [one for one in sides if isinstance(one, int) and not isinstance(one, bool)]
        if found:
            return min(found)
    return None
