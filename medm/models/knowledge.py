"""Knowledge of a model: a source of tokens, and their fusion into the tokens of an encoder."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from medm.knowledge import KNOWLEDGE
from medm.knowledge.base import Embed, Knowledge, KnowledgeQuery
from medm.knowledge.fusion import CrossAttentionFusion


class KnowledgeBranch(nn.Module):
    """A source of knowledge and the layers through which tokens attend to it.

    Args:
        config: entry in the config of a checkpoint: name, keywords, and `fusion`
            (`medm.models.knowledge_files.described_knowledge`).
        dim: width of the tokens that attend.
        sizes: keywords of the source that the composition derives, such as `word_dim`.
    """

    def __init__(self, config: Mapping[str, object], *, dim: int, **sizes: object) -> None:
        super().__init__()
        own = {key: value for key, value in config.items() if key != "fusion"}
        fusion = config.get("fusion", {})
        assert isinstance(fusion, Mapping)
        self.source: Knowledge = KNOWLEDGE.constructor(own, **sizes)()
        self.fusion = CrossAttentionFusion(dim, self.source.dim, **fusion)

    def forward(self, tokens: Tensor, embed: Embed, query: KnowledgeQuery | None = None) -> Tensor:
        """Return (B, N, dim): tokens that have attended to the knowledge.

        Args:
            tokens: (B, N, dim).
            embed: embeds the word pieces of the source.
            query: the samples, for a source with `needs_query`.
        """
        return self.fusion.fuse(tokens, self.source.encode(embed, query))
