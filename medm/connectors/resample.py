"""One token per window of tokens, then an MLP.

Uni-Med's three reductions (arXiv 2409.17508), on any grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from medm.connectors import Activation, Method
from medm.connectors.base import Connector
from medm.connectors.mlp import MLPConnector, build_mlp
from medm.connectors.windows import Windows
from medm.types import VisionFeatures


class ResampleConnector(Connector):
    """Reduction of windows of neighboring tokens to one token each, then an MLP.

    `method="projection"` keeps all channels of the window.

    Uni-Med's "projection" at 224 pixels is `window=[1, 4]` on a 16 x 16 grid (strips of a row, 64
    tokens of four times the width); its "avgpool" and "maxpool" are `window=2`.

    Args:
        in_dim, out_dim, grid, prefix: see `Connector`.
        others: see `ResampleOptions`.
    """

    key_map: ClassVar = MLPConnector.key_map

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        grid: tuple[int, ...],
        prefix: int = 0,
        method: Method = "projection",
        window: int | Sequence[int] = 2,
        depth: int = 2,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, grid=grid, prefix=prefix)
        self.windows = Windows(method, window, grid, connector="resample")
        self.layers = build_mlp(
            self.windows.width(in_dim), out_dim, depth=depth, activation=activation
        )

    @property
    def num_tokens(self) -> int:
        """One per window."""
        return self.windows.count

    def forward(self, features: VisionFeatures, task_ids: Tensor | None = None) -> Tensor:
        """See `Connector`."""
        return self.layers(self.windows(features))  # (B, num_tokens, out_dim)
