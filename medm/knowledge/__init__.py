"""Knowledge: tokens of a graph or a memory that vision tokens attend to.

The table at the end has one line per member.

To add one, write a file with a `Knowledge` and a line here. Its options stand above the table and
are torch-free. Knowledge depends on no file, tokenizer, data set or optimizer: the composition
reads graphs, gives word pieces and embeds them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import Field, model_validator

from medm.config import Options
from medm.registry import Registry

if TYPE_CHECKING:
    from medm.knowledge.base import Knowledge

LayerNormForm: TypeAlias = Literal["standard", "unbiased"]
Start: TypeAlias = Literal["random", "identity"]
Combine: TypeAlias = Literal["sum", "concat"]
Search: TypeAlias = Literal["exact", "faiss"]

EXACT_LIMIT = 1_000_000
"""Entries of a memory that are searched exactly by torch, at most."""


class FusionOptions(Options):
    """Cross-attention from the tokens of an encoder to tokens of knowledge."""

    layers: int = Field(default=2, ge=1)
    """Number of layers, each a cross-attention and a feed-forward network."""
    heads: int = Field(default=8, ge=1)
    """Attention heads; must divide `width`. MOTOR has 6."""
    width: int | None = Field(default=None, ge=1)
    """Width of queries, keys and values. Default: that of the encoder's tokens."""
    feed_forward: int = Field(default=1024, ge=1)
    """Hidden width of the feed-forward network."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout after the attention and after the feed-forward network."""
    start: Start = "random"
    """Untrained weights: `random`, or `identity`, which leaves the tokens as they are until it is
    trained. Use `identity` to add knowledge to a trained model."""
    mask_padding: bool = True
    """Leave padding of the knowledge tokens out of the attention. false attends to padding, which
    is a flaw of MOTOR's release."""
    layer_norm: LayerNormForm = "standard"
    """`standard`, or `unbiased`: divided by the unbiased deviation plus epsilon, as MOTOR's release
    computes it."""


class KnowledgeOptions(Options):
    """Options of every kind of knowledge."""

    name: str
    """Registered name."""
    fusion: FusionOptions = FusionOptions()
    """How tokens of an encoder attend to the knowledge."""


class GraphOptions(KnowledgeOptions):
    """A graph of named nodes, encoded by attention along its edges and groups."""

    file: str = "chest"
    """Name of a graph that comes with medm (`chest`), or path of a .json or .csv file
    (docs/knowledge.md). A saved model holds the graph."""
    shuffle: int | None = None
    """Seed of a control experiment: the names change places, and the shape of the graph stays.
    Default: not shuffled."""
    layers: int = Field(default=2, ge=1)
    """Number of layers of masked self-attention."""
    heads: int = Field(default=8, ge=1)
    """Attention heads; must divide `dim`. MOTOR has 6."""
    dim: int | None = Field(default=None, ge=1)
    """Width of the node tokens. Default: that of the word embeddings."""
    feed_forward: int = Field(default=1024, ge=1)
    """Hidden width of the feed-forward network."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout after the attention and after the feed-forward network."""
    layer_norm: LayerNormForm = "standard"
    """As in `fusion`."""


class MemoryOptions(KnowledgeOptions):
    """A first-in first-out memory of texts, retrieved by the features of a sample."""

    size: int = Field(default=65536, ge=1)
    """Number of entries; the oldest are replaced."""
    k: int = Field(default=3, ge=1)
    """Number of entries that are retrieved for a sample."""
    combine: Combine = "sum"
    """`sum`: the encoded texts are added by position, weighted by the softmax of their scores
    (MOTOR). `concat`: they stand one behind the other, each scaled by its weight."""
    exclude_own: bool = True
    """Never retrieve an entry of the sample's own report or of a duplicate of it. false can leak
    the report that is to be predicted, which is a flaw of MOTOR's release."""
    search: Search = "exact"
    """`exact` computes all scores in torch, for up to 1,000,000 entries. `faiss` searches in blocks
    on the CPU and needs the extra `retrieval`."""

    @model_validator(mode="after")
    def _searchable(self) -> MemoryOptions:
        if self.k > self.size:
            raise ValueError(f"k: expected at most the size of the memory, {self.size}")
        if self.search == "exact" and self.size > EXACT_LIMIT:
            raise ValueError(
                f"size: exact search takes up to {EXACT_LIMIT} entries, found {self.size}; set "
                "search: faiss, which needs `pip install medm[retrieval]`"
            )
        return self


KNOWLEDGE: Registry[type[Knowledge]] = Registry(
    "knowledge", group="medm.knowledge", options=KnowledgeOptions
)

KNOWLEDGE.add(
    "graph",
    "medm.knowledge.graph:Graph",
    "a graph of named nodes, encoded along its edges and groups (MOTOR)",
    options=GraphOptions,
)
KNOWLEDGE.add(
    "memory",
    "medm.knowledge.memory:Memory",
    "a memory of texts such as report triplets, retrieved by features (MOTOR)",
    options=MemoryOptions,
)
