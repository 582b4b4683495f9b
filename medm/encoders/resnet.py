"""ResNet (arXiv 1512.03385) as transformers' `ResNetModel` computes it: ResNet-18 to ResNet-152.

Read are transformers' folders (microsoft/resnet-50, -101) and state dicts under torch's own names
(`conv1`, `layer1.0.conv1`, `fc`).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from medm.encoders import Statistics
from medm.encoders.cnn import CNNEncoder, RecomputedBlock, fix_statistics
from medm.errors import RecipeError
from medm.types import Config

_STAGES = 4
_FIELDS = (
    "num_channels", "embedding_size", "hidden_sizes", "depths", "layer_type", "hidden_act",
    "downsample_in_first_stage", "downsample_in_bottleneck",
)  # fmt: skip
"""Fields of `ResNetConfig` that are sizes."""
_STEM = 4
"""Stride of the first convolution and the pooling behind it."""

_TORCH_NAMES = tuple(
    pair
    for stage in range(_STAGES)
    for pair in (
        *(
            (
                rf"^layer{stage + 1}\.(\d+)\.{theirs}{number + 1}\.",
                rf"tower.encoder.stages.{stage}.layers.\1.block.layer.{number}.{own}.",
            )
            for number in range(3)
            for theirs, own in (("conv", "convolution"), ("bn", "normalization"))
        ),
        *(
            (
                rf"^layer{stage + 1}\.(\d+)\.downsample\.{number}\.",
                rf"tower.encoder.stages.{stage}.layers.\1.block.shortcut.{own}.",
            )
            for number, own in enumerate(("convolution", "normalization"))
        ),
    )
)
"""A block's layers are numbered from 1 in torch's names, and its stages are, too."""


class ResNetEncoder(CNNEncoder):
    """ResNet without its classifier. ResNet-101 has 7 x 7 cells of width 2048 at 224 pixels.

    Args:
        architecture: fields of transformers' `ResNetConfig`; without any, ResNet-50.
        statistics: see `CNNOptions`.
    """

    key_map: ClassVar = (
        (
            r"^(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.",
            r"tower.encoder.stages.\1.layers.\2.block.",
        ),
        (r"^(?:resnet\.)?embedder\.", "tower.embedder."),
        (r"^conv1\.", "tower.embedder.embedder.convolution."),
        (r"^bn1\.", "tower.embedder.embedder.normalization."),
        *_TORCH_NAMES,
    )
    ignored_keys: ClassVar = (r"^(classifier|fc)\.",)

    def __init__(
        self, *, architecture: Mapping[str, Any], statistics: Statistics = "running"
    ) -> None:
        super().__init__()
        config: Any = ResNetConfig(**architecture)
        tower: Any = ResNetModel(config)
        fix_statistics(tower, statistics)
        for stage in tower.encoder.stages:
            stage.layers = nn.Sequential(*(RecomputedBlock(block) for block in stage.layers))
        self.tower = tower
        halvings = len(config.depths) - (0 if config.downsample_in_first_stage else 1)
        self.stride = _STEM * 2**halvings
        self.channels = (int(config.num_channels),)
        self.dim = self.pooled_dim = int(config.hidden_sizes[-1])

    @classmethod
    def architecture_from(cls, published: Mapping[str, object]) -> Config:
        """Return the sizes of a `config.json`. Raises `RecipeError` for another model's."""
        if published and (kind := published.get("model_type")) != "resnet":
            raise RecipeError(f"resnet takes folders of type 'resnet', found {kind!r}")
        return {name: published[name] for name in _FIELDS if name in published}

    def grid(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """A cell for each stride, the last ones perhaps cut."""
        if len(spatial) != 2 or min(spatial) < 1:
            raise ValueError(f"resnet: expected an image of (height, width), found {spatial}")
        return tuple(ceil(side / self.stride) for side in spatial)

    def last_map(self, pixels: Tensor) -> Tensor:
        cells: Tensor = self.tower(pixels).last_hidden_state
        return cells
