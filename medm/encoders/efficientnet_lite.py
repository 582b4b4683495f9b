"""EfficientNet-Lite 0 to 4, a convolutional encoder.

Its tokens are pooled cells of one or several feature maps.

Inverted residual blocks with ReLU6 and without squeeze-and-excitation, padded as TensorFlow pads
("same"), because the published weights were trained there. Tensor names of `efficientnet_pytorch`
are read through `key_map`. Source of the sizes: EfficientNet-Lite (tensorflow/tpu,
efficientnet/lite), on EfficientNet (arXiv 1905.11946).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.modeling_layers import GradientCheckpointingLayer

from medm.encoders import Statistics
from medm.encoders.base import VisionEncoder
from medm.encoders.batch_norm import batch_norm
from medm.encoders.sizes import number, whole
from medm.types import Config, VisionFeatures


class Stage(NamedTuple):
    """Blocks of one resolution, before scaling by width and depth."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
HEAD_STAGE = len(STAGES) + 1
STEM_STRIDE = 2

VARIANTS: dict[str, dict[str, float]] = {
    "lite0": {"width": 1.0, "depth": 1.0},
    "lite1": {"width": 1.0, "depth": 1.1},
    "lite2": {"width": 1.1, "depth": 1.2},
    "lite3": {"width": 1.2, "depth": 1.4},
    "lite4": {"width": 1.4, "depth": 1.8},
}
BATCH_NORM_EPS = 1e-3
BATCH_NORM_MOMENTUM = 0.01
"""TensorFlow's 0.99, counted from the other end as torch does."""


def scaled_channels(channels: int, width: float) -> int:
    """Nearest multiple of 8, never more than 10 % below the exact product."""
    exact = channels * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding.

    output = ceil(input / stride), an odd row or column at the end.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', ceil(h / stride), ceil(w / stride))."""
        padding: list[int] = []
        for axis in (-1, -2):  # F.pad counts from the last axis
            size, kernel, stride = pixels.shape[axis], self.kernel_size[axis], self.stride[axis]
            missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            padding += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(pixels, padding) if any(padding) else pixels)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, and optional ReLU6."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        activate: bool = True,
        norm: type[_BatchNorm],
    ) -> None:
        super().__init__()
        self.conv = SameConv2d(in_dim, out_dim, kernel, stride=stride, groups=groups, bias=False)
        self.norm = norm(out_dim, eps=BATCH_NORM_EPS, momentum=BATCH_NORM_MOMENTUM)
        self.activate = activate

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', h', w')."""
        pixels = self.norm(self.conv(pixels))
        return F.relu6(pixels) if self.activate else pixels


class Block(GradientCheckpointingLayer):
    """Inverted residual: expand, depthwise, project.

    The input is added where the shape allows it.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        kernel: int,
        stride: int,
        expansion: int,
        norm: type[_BatchNorm],
    ) -> None:
        super().__init__()
        dim = in_dim * expansion
        self.expand = ConvNorm(in_dim, dim, norm=norm) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(dim, dim, kernel=kernel, stride=stride, groups=dim, norm=norm)
        self.project = ConvNorm(dim, out_dim, activate=False, norm=norm)
        self.residual = stride == 1 and in_dim == out_dim

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', h', w')."""
        out = self.project(self.depthwise(self.expand(pixels)))
        return out + pixels if self.residual else out


class EfficientNetLiteEncoder(VisionEncoder):
    """Maps of the chosen stages, averaged to one common grid and joined on the channel axis.

    Stages after the last chosen one are not built. Pooled is the mean of the last map.

    Args:
        architecture: sizes that replace those of the variant: `width` and `depth` (multipliers),
            `stem` and `head` (channels), `in_channels`.
        others: see `EfficientNetLiteOptions`.
    """

    key_map: ClassVar = (
        (r"^_conv_stem\.", "stem.conv."),
        (r"^_bn0\.", "stem.norm."),
        (r"^_blocks\.(\d+)\._expand_conv\.", r"blocks.\1.expand.conv."),
        (r"^_blocks\.(\d+)\._bn0\.", r"blocks.\1.expand.norm."),
        (r"^_blocks\.(\d+)\._depthwise_conv\.", r"blocks.\1.depthwise.conv."),
        (r"^_blocks\.(\d+)\._bn1\.", r"blocks.\1.depthwise.norm."),
        (r"^_blocks\.(\d+)\._project_conv\.", r"blocks.\1.project.conv."),
        (r"^_blocks\.(\d+)\._bn2\.", r"blocks.\1.project.norm."),
        (r"^_conv_head\.", "head.conv."),
        (r"^_bn1\.", "head.norm."),
    )
    ignored_keys: ClassVar = (r"^_fc\.",)
    truncated_keys: ClassVar = (r"^blocks\.\d+\.", r"^head\.")

    def __init__(
        self,
        *,
        architecture: Mapping[str, object],
        variant: str = "lite0",
        stages: Sequence[int] = (5, 7),
        pool: int | None = None,
        statistics: Statistics = "running",
    ) -> None:
        super().__init__()
        sizes: Config = {
            "stem": 32,
            "head": 1280,
            "in_channels": 3,
            **VARIANTS[variant],
            **architecture,
        }
        if not stages or any(stage not in range(1, HEAD_STAGE + 1) for stage in stages):
            raise ValueError(
                f"efficientnet-lite: expected stages from 1 to {HEAD_STAGE}, found {list(stages)}"
            )
        norm = batch_norm(statistics, axes=2)
        channels = [scaled_channels(stage.channels, number(sizes, "width")) for stage in STAGES]

        self.stages, self.pool = tuple(stages), pool
        self.channels = (whole(sizes, "in_channels"),)
        self.stem = ConvNorm(
            *self.channels, whole(sizes, "stem"), kernel=3, stride=STEM_STRIDE, norm=norm
        )
        self.blocks = nn.ModuleList()
        self.stage_of_block: dict[int, int] = {}
        dim = whole(sizes, "stem")
        for position, (stage, out_dim) in enumerate(zip(STAGES, channels, strict=True), start=1):
            if position > max(self.stages):
                break
            # The family keeps the first and last stage at their length, so that small variants stay
            # fast.
            scaled = (
                stage.repeats
                if position in (1, len(STAGES))
                else math.ceil(stage.repeats * number(sizes, "depth"))
            )
            for repeat in range(scaled):
                stride = stage.stride if repeat == 0 else 1
                self.blocks.append(
                    Block(
                        dim,
                        out_dim,
                        kernel=stage.kernel,
                        stride=stride,
                        expansion=stage.expansion,
                        norm=norm,
                    )
                )
                dim = out_dim
            self.stage_of_block[len(self.blocks) - 1] = position
        self.head = (
            ConvNorm(dim, whole(sizes, "head"), norm=norm) if HEAD_STAGE in self.stages else None
        )

        widths = [*channels, whole(sizes, "head")]
        self.dim = sum(widths[stage - 1] for stage in self.stages)
        self.pooled_dim = widths[max(self.stages) - 1]
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    @classmethod
    def preprocess_from(
        cls,
        published: Mapping[str, object],
        architecture: Mapping[str, object],
        image_size: int | None = None,
    ) -> Config:
        """Return (value - 127) / 128 of 8-bit RGB, as the family was trained.

        Images are padded to a square, so that no margin is lost.
        """
        side = image_size or 224
        channels = whole({"in_channels": 3, **architecture}, "in_channels")
        return {
            "size": [side, side],
            "fit": "pad",
            "interpolation": "bicubic",
            "channels": channels,
            "mean": [127 / 255] * channels,
            "std": [128 / 255] * channels,
        }

    def grid(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """Return `pool` cells per side, or the size of the coarsest chosen map.

        Raises `ValueError` when that map is too coarse.
        """
        if len(spatial) != 2:
            raise ValueError(
                f"efficientnet-lite: expected an input of (height, width), found {spatial}"
            )
        stride = STEM_STRIDE * math.prod(stage.stride for stage in STAGES[: max(self.stages)])
        coarsest = tuple(math.ceil(size / stride) for size in spatial)
        if self.pool is None:
            return coarsest
        if self.pool > min(coarsest):
            raise ValueError(
                f"efficientnet-lite: pool {self.pool} asks for more cells than the {coarsest} of "
                f"stage {max(self.stages)} at input {spatial}; use a larger image or an earlier "
                "stage"
            )
        return (self.pool, self.pool)

    def forward(self, pixels: Tensor) -> VisionFeatures:
        """pixels: (B, in_channels, height, width)."""
        rows, columns = self.grid(tuple(pixels.shape[2:]))
        maps: dict[int, Tensor] = {}
        hidden = self.stem(pixels.to(self.stem.conv.weight.dtype))
        for index, block in enumerate(self.blocks):
            hidden = block(hidden)
            if index in self.stage_of_block:
                maps[self.stage_of_block[index]] = hidden  # (B, C, h, w)
        if self.head is not None:
            maps[HEAD_STAGE] = self.head(hidden)
        cells = torch.cat(
            [F.adaptive_avg_pool2d(maps[stage], (rows, columns)) for stage in self.stages], dim=1
        )
        return VisionFeatures(
            tokens=cells.flatten(2).transpose(1, 2),  # (B, prod(grid), dim)
            grid=(rows, columns),
            pooled=maps[max(maps)].mean(dim=(2, 3)),
        )
