"""Attention under a mask, and layers made of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medm.errors import RecipeError
from medm.knowledge import LayerNormForm


class UnbiasedLayerNorm(nn.Module):
    """Layer norm with the unbiased deviation, and epsilon added to it.

    As MOTOR's release (arXiv 2304.14204) computes it.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        deviation = x.std(dim=-1, keepdim=True)
        return self.weight * (x - x.mean(dim=-1, keepdim=True)) / (deviation + self.eps) + self.bias


def norm_of(form: LayerNormForm, dim: int) -> nn.Module:
    """Return a layer norm by the name of its form."""
    return nn.LayerNorm(dim) if form == "standard" else UnbiasedLayerNorm(dim)


class MaskedAttention(nn.Module):
    """Multi-head attention. A query that may attend to nothing gets zeros.

    Args:
        dim: width of the queries and of the output.
        memory_dim: width of what is attended to.
        width: inner width.
        heads: attention heads.

    Raises:
        RecipeError: the heads do not divide the width.
    """

    def __init__(self, dim: int, memory_dim: int, *, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise RecipeError(
                f"knowledge: {heads} attention heads do not divide the width {width}; set heads"
            )
        self.heads = heads
        self.query = nn.Linear(dim, width)
        self.key = nn.Linear(memory_dim, width)
        self.value = nn.Linear(memory_dim, width)
        self.output = nn.Linear(width, dim)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (B, N, dim).

        Args:
            x: (B, N, dim).
            memory: (B or 1, K, memory_dim).
            mask: (B or 1, N or 1, K) bool, True where a query attends to a key.
        """
        batch = max(len(x), len(memory))
        query, key, value = (
            layer(rows).expand(batch, -1, -1).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, rows in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        if mask is None:
            seen = F.scaled_dot_product_attention(query, key, value)
            return self.output(seen.transpose(1, 2).flatten(2))
        some = mask.any(dim=-1, keepdim=True)  # (B, N, 1)
        allowed = (mask | ~some).unsqueeze(1)  # softmax over nothing is not a number
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        return self.output(seen.transpose(1, 2).flatten(2)) * some


class AttentionLayer(nn.Module):
    """Pre-norm attention and feed-forward network, each added to its input.

    Args:
        dim: width of the tokens.
        memory_dim: width of what they attend to.
        width: inner width of the attention.
        heads: attention heads.
        feed_forward: hidden width of the feed-forward network.
        dropout: after both.
        norm: form of the layer norms.
    """

    def __init__(
        self,
        dim: int,
        memory_dim: int,
        *,
        width: int,
        heads: int,
        feed_forward: int,
        dropout: float,
        norm: LayerNormForm,
    ) -> None:
        super().__init__()
        self.attention_norm = norm_of(norm, dim)
        self.attention = MaskedAttention(dim, memory_dim, width=width, heads=heads)
        self.feed_forward_norm = norm_of(norm, dim)
        self.inner = nn.Linear(dim, feed_forward)
        self.outer = nn.Linear(feed_forward, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return (B, N, dim). Without a memory, tokens attend to each other."""
        normed = self.attention_norm(x)
        attended = self.attention(normed, normed if memory is None else memory, mask)
        x = x + self.dropout(attended)
        inner = self.dropout(F.gelu(self.inner(self.feed_forward_norm(x))))
        return x + self.dropout(self.outer(inner))
