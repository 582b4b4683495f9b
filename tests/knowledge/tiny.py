"""Knowledge of the smallest sizes, and an embedding of word pieces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medm.knowledge import KNOWLEDGE
from medm.knowledge.base import Embed, Knowledge, KnowledgeQuery

WORD_DIM, KEY_DIM = 8, 4

GRAPH: dict[str, Any] = {
    "nodes": ["heart", "big heart", "bone", "rib"],
    "edges": [[0, 1]],
    "groups": {"bone": [2, 3]},
}
PIECES = [[3], [5, 3], [7], [9, 2, 4]]
"""Word pieces of the nodes: some names split."""

TINY_KNOWLEDGE: dict[str, dict[str, Any]] = {
    "graph": {
        "graph": GRAPH,
        "node_ids": PIECES,
        "word_dim": WORD_DIM,
        "heads": 2,
        "feed_forward": 16,
    },
    "memory": {"key_dim": KEY_DIM, "length": 5, "word_dim": WORD_DIM, "size": 6, "k": 2},
}


def build_knowledge(name: str, **options: Any) -> Knowledge:
    torch.manual_seed(0)
    return KNOWLEDGE.constructor({"name": name, **TINY_KNOWLEDGE[name], **options})().eval()


def embedding(seed: int = 1) -> Embed:
    torch.manual_seed(seed)
    table = nn.Embedding(12, WORD_DIM)

    def embed(ids: Tensor, mask: Tensor) -> Tensor:
        assert ids.shape == mask.shape
        return table(ids).detach()

    return embed


def query(owners: list[int], seed: int = 2) -> KnowledgeQuery:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(owners), KEY_DIM, generator=generator)
    return KnowledgeQuery(features, torch.tensor(owners))
