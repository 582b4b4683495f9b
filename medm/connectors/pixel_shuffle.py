"""Squares of neighboring tokens to one token, then norm and MLP: the projector of InternVL.

InternVL 1.5 and later (arXiv 2404.16821) and what is built on it (Sa2VA, UniBiomed).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from medm.connectors import Activation, PixelShuffleVersion
from medm.connectors.base import Connector
from medm.connectors.mlp import build_mlp
from medm.connectors.windows import Windows
from medm.types import VisionFeatures


class PixelShuffleConnector(Connector):
    """Pixel shuffle, layer norm, MLP.

    A window of 2 is InternVL's `downsample_ratio` of 0.5: a grid of 32 x 32 becomes 16 x 16 tokens
    of four times the width. Tokens outside the grid (CLS) are dropped.

    Args:
        in_dim, out_dim, grid, prefix: see `Connector`.
        others: see `PixelShuffleOptions`.
    """

    # InternVL (`mlp1.`), InternVL in transformers (`multi_modal_projector.`).
    key_map: ClassVar = (
        (r"^(?:.*\.)?mlp1\.0\.", "norm."),
        (r"^(?:.*\.)?mlp1\.1\.", "layers.0."),
        (r"^(?:.*\.)?mlp1\.3\.", "layers.2."),
        (r"^(?:.*\.)?layer_norm\.", "norm."),
        (r"^(?:.*\.)?linear_1\.", "layers.0."),
        (r"^(?:.*\.)?linear_2\.", "layers.2."),
    )

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        grid: tuple[int, ...],
        prefix: int = 0,
        window: int | Sequence[int] = 2,
        version: PixelShuffleVersion = "v2",
        depth: int = 2,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, grid=grid, prefix=prefix)
        self.windows = Windows("projection", window, grid, connector="pixel-shuffle")
        self.version = version
        width = self.windows.width(in_dim)
        self.norm = nn.LayerNorm(width)
        self.layers = build_mlp(width, out_dim, depth=depth, activation=activation)

    @property
    def num_tokens(self) -> int:
        """One per window."""
        return self.windows.count

    def forward(self, features: VisionFeatures, task_ids: Tensor | None = None) -> Tensor:
        """See `Connector`."""
        tokens = self.windows(features)  # (B, num_tokens, width)
        if self.version == "v1":
            sides = zip(self.grid, self.windows.sides, strict=True)
            cells = tokens.unflatten(1, [cells // side for cells, side in sides])
            tokens = cells.transpose(-3, -2).flatten(1, -2)
        return self.layers(self.norm(tokens))  # (B, num_tokens, out_dim)
