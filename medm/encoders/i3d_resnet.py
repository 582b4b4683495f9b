"""ResNet inflated to volumes (I3ResNet), with published tensor names.

CT backbone of Merlin (arXiv 2406.06512) and Astra.

A ResNet-152 whose 3x3 kernels became 3x3x3. Every kernel but the first strides the slices as it
strides rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.modeling_layers import GradientCheckpointingLayer

from medm.encoders import Statistics
from medm.encoders.base import VisionEncoder
from medm.encoders.batch_norm import batch_norm
from medm.encoders.sizes import whole, wholes
from medm.types import Config, VisionFeatures

STRIDES = (16, 32, 32)
"""Voxels per cell along slices, rows and columns."""
PUBLISHED_SIZE = (160, 224, 224)
EXPANSION = 4


class Bottleneck(GradientCheckpointingLayer):
    """1x1x1, 3x3x3 (which strides), 1x1x1 convolutions, each with batch norm, around a residual."""

    def __init__(self, in_dim: int, dim: int, *, stride: int, norm: type[_BatchNorm]) -> None:
        super().__init__()
        out_dim = dim * EXPANSION
        self.conv1, self.bn1 = nn.Conv3d(in_dim, dim, 1, bias=False), norm(dim)
        self.conv2, self.bn2 = (
            nn.Conv3d(dim, dim, 3, stride=stride, padding=1, bias=False),
            norm(dim),
        )
        self.conv3, self.bn3 = nn.Conv3d(dim, out_dim, 1, bias=False), norm(out_dim)
        self.downsample = (
            nn.Identity()
            if stride == 1 and in_dim == out_dim
            else nn.Sequential(
                nn.Conv3d(in_dim, out_dim, 1, stride=stride, bias=False), norm(out_dim)
            )
        )

    def forward(self, voxels: Tensor) -> Tensor:
        """(B, C, d, h, w) to (B, C', d', h', w')."""
        out = F.relu(self.bn1(self.conv1(voxels)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(voxels))


class I3DResNetEncoder(VisionEncoder):
    """ResNet with one token per cell of the last map; the pooled vector is their mean.

    The map has 10 x 7 x 7 cells of width 2048 at 160 x 224 x 224.

    The published tower takes (X, Y, Z) and turns it to (Z, X, Y) first; here the preprocessing
    hands over the slices in front (orientation SRA), so that the axes of the grid are slices, rows
    and columns as everywhere.

    Args:
        architecture: `layers` (blocks of the four stages), `width` (channels of the first),
            `num_channels` (of the first kernel; a volume with one channel is repeated to it).
        others: see `I3DResNetOptions`.
    """

    axes: ClassVar[int] = 3
    key_map: ClassVar = (
        (r"^(?:(?:visual_encoder\.model\.)?encode_image\.i3_resnet\.)?(conv1|bn1)\.", r"\1."),
        (r"^(?:(?:visual_encoder\.model\.)?encode_image\.i3_resnet\.)?layer(\d)\.", r"stages.\1."),
    )
    ignored_keys: ClassVar = (
        r"(^|\.)(classifier|contrastive_head)\.",
        r"^(visual_encoder\.model\.)?encode_text\.",
        r"logit_scale$",
    )

    def __init__(
        self, *, architecture: Mapping[str, object], statistics: Statistics = "running"
    ) -> None:
        super().__init__()
        sizes: Config = {"layers": [3, 8, 36, 3], "width": 64, "num_channels": 3, **architecture}
        norm = batch_norm(statistics, axes=3)
        width, channels = whole(sizes, "width"), whole(sizes, "num_channels")
        self.channels = (1, channels)
        self.conv1 = nn.Conv3d(
            channels, width, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False
        )
        self.bn1 = norm(width)
        self.stages = nn.ModuleDict()
        dim = width
        for number, count in enumerate(wholes(sizes, "layers"), start=1):
            blocks = []
            for index in range(count):
                stride = 2 if index == 0 and number > 1 else 1
                blocks.append(Bottleneck(dim, width * 2 ** (number - 1), stride=stride, norm=norm))
                dim = width * 2 ** (number - 1) * EXPANSION
            self.stages[str(number)] = nn.Sequential(*blocks)
        self.dim = self.pooled_dim = dim
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @classmethod
    def preprocess_from(
        cls,
        published: Mapping[str, object],
        architecture: Mapping[str, object],
        image_size: int | Sequence[int] | None = None,
    ) -> Config:
        """Astra's for chest CT, by name."""
        size = list(PUBLISHED_SIZE)
        if image_size is not None:
            size = (
                [size[0], image_size, image_size]
                if isinstance(image_size, int)
                else list(image_size)
            )
        return {"convention": "astra", "size": size}

    def grid(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """A cell for 16 slices, 32 rows and 32 columns, the last ones perhaps cut."""
        if len(spatial) != 3:
            raise ValueError(
                f"i3d-resnet: expected an input of (slices, rows, columns), found {spatial}"
            )
        return tuple(ceil(size / stride) for size, stride in zip(spatial, STRIDES, strict=True))

    def forward(self, pixels: Tensor) -> VisionFeatures:
        """pixels: (B, 1 or num_channels, slices, rows, columns)."""
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, self.channels[-1], -1, -1, -1)
        cells = F.relu(self.bn1(self.conv1(pixels.to(self.conv1.weight.dtype))))
        cells = F.max_pool3d(cells, 3, stride=2, padding=1)
        for stage in self.stages.values():
            cells = stage(cells)  # (B, C, d, h, w)
        return VisionFeatures(
            tokens=cells.flatten(2).transpose(1, 2),  # (B, prod(grid), dim)
            grid=tuple(cells.shape[2:]),
            pooled=cells.mean(dim=(2, 3, 4)),
        )
