"""A graph of named nodes, encoded by self-attention along its edges and groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from medm.config import validate
from medm.knowledge import LayerNormForm
from medm.knowledge.attention import AttentionLayer, norm_of
from medm.knowledge.base import Embed, Knowledge, KnowledgeQuery, KnowledgeTokens
from medm.knowledge.spec import GraphSpec


class Graph(Knowledge):
    """Node tokens (1, K + 1, dim), the first of them a global node.

    The feature of a node is the mean of the embeddings of its own name's word pieces, plus a
    sinusoidal encoding of its groups, layer-normed. Layers of self-attention follow, in which nodes
    attend to themselves, along edges and within groups; the global node and all others attend to
    each other. As MOTOR (arXiv 2304.14204), whose release reads the names as one text and so gives
    wrong pieces to every node behind a name that splits.

    Args:
        graph: fields of a `GraphSpec`.
        node_ids: word pieces of each name, without special tokens.
        word_dim: width of the word embeddings.
    """

    node_ids: Tensor
    """(K, T) int64."""
    node_mask: Tensor
    """(K, T) bool."""
    connected: Tensor
    """(K + 1, K + 1) bool: row attends to column."""
    group_code: Tensor
    """(K, dim), encoding of the groups of each node."""

    def __init__(
        self,
        *,
        graph: Mapping[str, object],
        node_ids: Sequence[Sequence[int]],
        word_dim: int,
        layers: int = 2,
        heads: int = 8,
        dim: int | None = None,
        feed_forward: int = 1024,
        dropout: float = 0.1,
        layer_norm: LayerNormForm = "standard",
    ) -> None:
        super().__init__()
        self.spec = validate(GraphSpec, graph, source="graph of the knowledge")
        self.dim = dim or word_dim
        ids, mask = _padded(node_ids, self.spec)
        # Saved with the weights: a model that is opened without memory gets no other buffers.
        self.register_buffer("node_ids", ids)
        self.register_buffer("node_mask", mask)
        connected = torch.ones(len(ids) + 1, len(ids) + 1, dtype=torch.bool)
        connected[1:, 1:] = torch.tensor(self.spec.connected())
        self.register_buffer("connected", connected)
        self.register_buffer("group_code", _group_code(self.spec, self.dim))
        self.project = nn.Linear(word_dim, self.dim) if self.dim != word_dim else nn.Identity()
        self.global_node = nn.Parameter(torch.randn(self.dim) * 0.02)
        self.norm = norm_of(layer_norm, self.dim)
        self.layers = nn.ModuleList(
            AttentionLayer(
                self.dim,
                self.dim,
                width=self.dim,
                heads=heads,
                feed_forward=feed_forward,
                dropout=dropout,
                norm=layer_norm,
            )
            for _ in range(layers)
        )
        self.final_norm = norm_of(layer_norm, self.dim)

    def features(self, embed: Embed) -> Tensor:
        """Return the mean embedding of each name's own word pieces, (K, W)."""
        vectors = embed(self.node_ids, self.node_mask)  # (K, T, W)
        mask = self.node_mask.unsqueeze(-1).to(vectors.dtype)
        return (vectors * mask).sum(dim=1) / mask.sum(dim=1)

    def forward(self, embed: Embed, query: KnowledgeQuery | None = None) -> KnowledgeTokens:
        """See `Knowledge`; a graph is the same for every sample."""
        features = self.features(embed).to(self.global_node.dtype)
        nodes = self.project(features) + self.group_code.to(features.dtype)
        x = self.norm(torch.cat([self.global_node.unsqueeze(0), nodes])).unsqueeze(0)
        for layer in self.layers:
            x = layer(x, mask=self.connected.unsqueeze(0))
        tokens = self.final_norm(x)
        return KnowledgeTokens(tokens, torch.ones_like(tokens[..., 0], dtype=torch.bool))


def _padded(pieces: Sequence[Sequence[int]], spec: GraphSpec) -> tuple[Tensor, Tensor]:
    """Return ids (K, T) int64 and their mask (K, T) bool.

    Raises:
        ValueError: not one list for each node, or a name without word pieces.
    """
    if len(pieces) != len(spec.nodes):
        raise ValueError(
            f"node_ids: expected word pieces of {len(spec.nodes)} nodes, found {len(pieces)}"
        )
    for name, own in zip(spec.nodes, pieces, strict=True):
        if not own:
            raise ValueError(f"node_ids: the tokenizer has no word pieces for node {name!r}")
    longest = max(map(len, pieces))
    ids = torch.tensor([[*own, *[0] * (longest - len(own))] for own in pieces], dtype=torch.int64)
    lengths = torch.tensor([len(own) for own in pieces])
    return ids, torch.arange(longest) < lengths.unsqueeze(1)


def _group_code(spec: GraphSpec, dim: int) -> Tensor:
    """Return the mean sinusoidal encoding of the groups of each node, (K, dim).

    Zero for a node without a group. Groups count from 1; sines stand in front of the cosines.
    """
    half = (dim + 1) // 2
    rates = torch.exp(-torch.arange(half) / half * torch.log(torch.tensor(10000.0)))
    code, members = torch.zeros(len(spec.nodes), dim), torch.zeros(len(spec.nodes), 1)
    for number, nodes in enumerate(spec.groups.values(), start=1):
        angles = number * rates
        code[nodes] += torch.cat([angles.sin(), angles.cos()])[:dim]
        members[nodes] += 1
    return code / members.clamp(min=1)
