"""Interface of knowledge. It depends on no file, tokenizer, data set or optimizer."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple, TypeAlias

from torch import Tensor, nn

Embed: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From ids (R, T) and their mask (R, T) bool to vectors (R, T, W): word embeddings, or a text
encoder."""


NO_OWNER = -1
"""Owner of a sample without a report: no entry of a memory is left out for it."""


class KnowledgeTokens(NamedTuple):
    """Tokens of knowledge. A tuple, so that ZeRO-3 finds its tensors."""

    tokens: Tensor
    """(B, K, D); B is 1 where all samples share them."""
    mask: Tensor
    """(B, K) bool, False for padding."""


class KnowledgeQuery(NamedTuple):
    """Samples that knowledge is retrieved for."""

    features: Tensor
    """(B, E), in the space of the memory's keys."""
    owners: Tensor
    """(B,) int64, of each sample the number of its report, equal for duplicates of the report;
    `NO_OWNER` for none."""


class Knowledge(nn.Module, metaclass=ABCMeta):
    """A source of knowledge tokens.

    A subclass without `forward` raises `TypeError` when it is constructed. It takes, by keyword,
    the fields of its options class other than `name`, `fusion` and those that the composition
    resolves. Constructing is offline.
    """

    needs_query: ClassVar[bool] = False
    """Whether the tokens depend on the sample: `forward` then needs a query."""

    dim: int
    """Width of the tokens."""

    @abstractmethod
    def forward(self, embed: Embed, query: KnowledgeQuery | None = None) -> KnowledgeTokens:
        """Return the tokens.

        Args:
            embed: embeds word pieces. A graph takes word embeddings, a memory a text encoder.
            query: samples, for knowledge with `needs_query`.

        Raises:
            ValueError: a needed query is missing.
        """

    def encode(self, embed: Embed, query: KnowledgeQuery | None = None) -> KnowledgeTokens:
        """Return the tokens, as `forward` does, with the hooks of the module (ZeRO-3)."""
        tokens: KnowledgeTokens = self(embed, query)
        return tokens
