"""Fusion: tokens of an encoder attend to tokens of knowledge."""

from __future__ import annotations

from torch import Tensor, nn

from medm.knowledge import LayerNormForm, Start
from medm.knowledge.attention import AttentionLayer
from medm.knowledge.base import KnowledgeTokens


class CrossAttentionFusion(nn.Module):
    """Layers of pre-norm cross-attention and feed-forward network, without self-attention.

    As MOTOR (arXiv 2304.14204) adds knowledge to image tokens. The keywords are the fields of
    `medm.knowledge.FusionOptions`.

    Args:
        dim: width of the encoder's tokens.
        knowledge_dim: width of the knowledge tokens.
    """

    def __init__(
        self,
        dim: int,
        knowledge_dim: int,
        *,
        layers: int = 2,
        heads: int = 8,
        width: int | None = None,
        feed_forward: int = 1024,
        dropout: float = 0.1,
        start: Start = "random",
        mask_padding: bool = True,
        layer_norm: LayerNormForm = "standard",
    ) -> None:
        super().__init__()
        self.mask_padding = mask_padding
        self.layers = nn.ModuleList(
            AttentionLayer(
                dim,
                knowledge_dim,
                width=width or dim,
                heads=heads,
                feed_forward=feed_forward,
                dropout=dropout,
                norm=layer_norm,
            )
            for _ in range(layers)
        )
        if start == "identity":
            for layer in self.layers:
                assert isinstance(layer, AttentionLayer)
                for last in (layer.attention.output, layer.outer):
                    nn.init.zeros_(last.weight)
                    nn.init.zeros_(last.bias)

    def forward(self, tokens: Tensor, knowledge: Tensor, mask: Tensor) -> Tensor:
        """Return (B, N, dim). A sample whose knowledge is all padding gets no attention term.

        Args:
            tokens: (B, N, dim).
            knowledge: (B or 1, K, knowledge_dim).
            mask: (B or 1, K) bool, False for padding.
        """
        allowed = mask.unsqueeze(1) if self.mask_padding else None  # (B or 1, 1, K)
        memory = knowledge.to(tokens.dtype)
        for layer in self.layers:
            tokens = layer(tokens, memory, allowed)
        return tokens

    def fuse(self, tokens: Tensor, knowledge: KnowledgeTokens) -> Tensor:
        """Return (B, N, dim), as `forward` does, with the hooks of the module (ZeRO-3)."""
        fused: Tensor = self(tokens, knowledge.tokens, knowledge.mask)
        return fused
