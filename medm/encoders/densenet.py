"""DenseNet (arXiv 1608.06993) as MONAI computes it: DenseNet-121 by default.

Read are torch's published state dicts (`features.denseblock1.denselayer1.norm1`, in the files of
2017 `norm.1`), MONAI's, and chest X-ray models in either layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from monai.networks.nets.densenet import DenseNet
from torch import Tensor
from torch.nn import functional as F

from medm.encoders import Statistics
from medm.encoders.cnn import CNNEncoder, RecomputedBlock, fix_statistics
from medm.encoders.sizes import whole, wholes
from medm.types import Config

_STEM = 4
"""Stride of the first convolution and the pooling behind it."""
_FRONT = r"^(?:(?:model|densenet121)\.)*features\."


class DenseNetEncoder(CNNEncoder):
    """DenseNet up to the ReLU behind its last norm.

    DenseNet-121 has 7 x 7 cells of width 1024 at 224 pixels.

    Args:
        architecture: `init_features` (channels of the first convolution), `growth_rate` (channels
            that a layer adds), `block_config` (layers of each block), `bn_size` (width of a
            layer's inner map in growth rates), `num_channels`.
        statistics: see `CNNOptions`.
    """

    key_map: ClassVar = (
        (
            _FRONT + r"(denseblock\d+\.denselayer\d+)\.(?:layers\.)?(norm|conv)\.?([12])\.",
            r"features.\1.block.layers.\2\3.",
        ),
        (_FRONT, "features."),
    )
    ignored_keys: ClassVar = (r"^(?:(?:model|densenet121)\.)*(classifier|class_layers)\.",)

    def __init__(
        self, *, architecture: Mapping[str, object], statistics: Statistics = "running"
    ) -> None:
        super().__init__()
        sizes: Config = {
            "init_features": 64,
            "growth_rate": 32,
            "block_config": [6, 12, 24, 16],
            "bn_size": 4,
            "num_channels": 3,
            **architecture,
        }
        blocks = wholes(sizes, "block_config")
        self.channels = (whole(sizes, "num_channels"),)
        network: Any = DenseNet(
            spatial_dims=2,
            in_channels=self.channels[0],
            out_channels=1,  # of the classifier, which is left out
            init_features=whole(sizes, "init_features"),
            growth_rate=whole(sizes, "growth_rate"),
            block_config=blocks,
            bn_size=whole(sizes, "bn_size"),
        )
        self.features: Any = network.features
        fix_statistics(self.features, statistics)
        for number in range(1, len(blocks) + 1):
            block = getattr(self.features, f"denseblock{number}")
            for name, layer in list(block.named_children()):
                setattr(block, name, RecomputedBlock(layer))
        self.transitions = len(blocks) - 1
        self.dim = self.pooled_dim = int(self.features.norm5.num_features)

    def grid(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """Halved and rounded up twice by the stem, halved and rounded down by each transition."""
        least = _STEM * 2**self.transitions - _STEM + 1
        if len(spatial) != 2 or min(spatial) < least:
            raise ValueError(
                f"densenet: expected an image of at least {least} x {least} pixels, found {spatial}"
            )
        return tuple(-(-side // _STEM) // 2**self.transitions for side in spatial)

    def last_map(self, pixels: Tensor) -> Tensor:
        return F.relu(self.features(pixels))
