"""Connectors that reduce the number of tokens: average pooling, attention pooling.

Both work on grids with any number of axes, so images and volumes run the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medm.connectors import Activation
from medm.connectors.base import Connector
from medm.connectors.mlp import MLPConnector, build_mlp
from medm.connectors.windows import Windows
from medm.types import VisionFeatures


class SpatialPoolingConnector(Connector):
    """Average pooling over windows of neighboring tokens, then an MLP.

    Tokens outside the grid (CLS) are dropped.

    MedM-VL's `spatial_pooling` and M3D-LaMed's `spp` (arXiv 2404.00578) are `pool=2` on a grid of
    (8, 16, 16).

    Args:
        in_dim, out_dim, grid, prefix: see `Connector`.
        others: see `SpatialPoolingOptions`.
    """

    key_map: ClassVar = MLPConnector.key_map

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        grid: tuple[int, ...],
        prefix: int = 0,
        pool: int | Sequence[int] = 2,
        depth: int = 2,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, grid=grid, prefix=prefix)
        self.windows = Windows("average", pool, grid, connector="spatial-pooling")
        self.layers = build_mlp(in_dim, out_dim, depth=depth, activation=activation)

    @property
    def num_tokens(self) -> int:
        """One per window."""
        return self.windows.count

    def forward(self, features: VisionFeatures, task_ids: Tensor | None = None) -> Tensor:
        """See `Connector`."""
        return self.layers(self.windows(features))  # (B, num_tokens, out_dim)


class CrossAttention(nn.Module):
    """Multi-head attention with the tensors of `torch.nn.MultiheadAttention`, by the same names.

    Torch's module reads the weights of `out_proj` without calling the module. Under ZeRO-3, which
    gathers the sharded weights when a module is called, they would be missing.
    """

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))  # query, key, value
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """Queries (B, Q, dim) over tokens (B, N, dim) to (B, Q, dim)."""
        dim = query.shape[-1]
        q = F.linear(query, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
        k, v = F.linear(tokens, self.in_proj_weight[dim:], self.in_proj_bias[dim:]).chunk(2, dim=-1)
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v)
        )  # (B, heads, tokens, dim / heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class AttentionPoolingConnector(Connector):
    """Learned queries attend to all tokens, then an MLP.

    MedM-VL's `attn_pooling`, with its tensor names and shapes.

    Args:
        in_dim, out_dim, grid, prefix: see `Connector`.
        others: see `AttentionPoolingOptions`.
    """

    key_map: ClassVar = ((r"^(?:.*\.)?(query|attn\..+)$", r"\1"), *MLPConnector.key_map)

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        grid: tuple[int, ...],
        prefix: int = 0,
        queries: int | None = None,
        heads: int = 8,
        depth: int = 2,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, grid=grid, prefix=prefix)
        if in_dim % heads:
            raise ValueError(
                f"attention-pooling: {heads} heads do not divide the encoder's width of {in_dim}"
            )
        count = queries or prod(grid[-2:])
        if count == 0:
            raise ValueError(
                f"attention-pooling: the grid {grid} has no cells to take a number of queries from"
            )
        self.queries = count
        self.query = nn.Parameter(torch.randn(count, in_dim))
        self.attn = CrossAttention(in_dim, heads=heads)
        self.layers = build_mlp(in_dim, out_dim, depth=depth, activation=activation)

    @property
    def num_tokens(self) -> int:
        """One per query."""
        return self.queries

    def forward(self, features: VisionFeatures, task_ids: Tensor | None = None) -> Tensor:
        """See `Connector`."""
        tokens = features.tokens
        query = self.query.expand(len(tokens), -1, -1)  # (B, queries, in_dim)
        return self.layers(self.attn(query, tokens))  # (B, queries, out_dim)
