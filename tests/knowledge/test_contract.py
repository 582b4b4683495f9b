"""What every registered kind of knowledge must do."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from medm.knowledge import KNOWLEDGE
from medm.knowledge.base import Knowledge, KnowledgeQuery, KnowledgeTokens
from medm.knowledge.memory import Memory
from tests.knowledge.tiny import KEY_DIM, TINY_KNOWLEDGE, build_knowledge, embedding, query

every_knowledge = pytest.mark.parametrize("name", KNOWLEDGE.names())


def ready(name: str) -> Knowledge:
    """Knowledge that has something to give."""
    knowledge = build_knowledge(name)
    if isinstance(knowledge, Memory):
        generator = torch.Generator().manual_seed(3)
        keys = torch.randn(4, KEY_DIM, generator=generator)
        ids = torch.randint(1, 12, (4, 3), generator=generator)
        mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
        knowledge.enqueue(keys, ids, mask, torch.tensor([1, 2, 3, 4]))
    return knowledge


def asked(knowledge: Knowledge) -> KnowledgeQuery | None:
    return query([1, 7]) if knowledge.needs_query else None


def test_every_knowledge_has_a_tiny_block() -> None:
    assert set(TINY_KNOWLEDGE) == set(KNOWLEDGE.names())


@every_knowledge
def test_tokens_and_mask_agree(name: str) -> None:
    knowledge = ready(name)
    given = knowledge.encode(embedding(), asked(knowledge))
    assert isinstance(given, KnowledgeTokens)
    assert given.tokens.shape[:2] == given.mask.shape
    assert given.tokens.shape[0] == (2 if knowledge.needs_query else 1)
    assert given.tokens.shape[2] == knowledge.dim
    assert given.mask.dtype == torch.bool and given.mask.any(dim=1).all()
    assert given.tokens.isfinite().all()


@every_knowledge
def test_the_words_change_the_tokens(name: str) -> None:
    knowledge = ready(name)
    first = knowledge.encode(embedding(1), asked(knowledge)).tokens
    assert not torch.allclose(first, knowledge.encode(embedding(5), asked(knowledge)).tokens)


@every_knowledge
def test_a_state_dict_carries_all_that_it_knows(name: str) -> None:
    knowledge, other = ready(name), build_knowledge(name)
    with torch.no_grad():
        for weight in knowledge.parameters():
            weight.add_(0.1)
    assert [*other.state_dict()] == [*knowledge.state_dict()]
    other.load_state_dict(knowledge.state_dict())
    for mine, theirs in zip(
        knowledge.encode(embedding(), asked(knowledge)),
        other.encode(embedding(), asked(other)),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


@every_knowledge
def test_half_precision_keeps_ids_and_masks(name: str) -> None:
    knowledge = ready(name).to(torch.bfloat16)
    kinds = {key: value.dtype for key, value in knowledge.state_dict().items()}
    assert all(
        kind != torch.bfloat16
        for key, kind in kinds.items()
        if key in ("node_ids", "node_mask", "connected", "ids", "mask", "owners", "next", "filled")
    )
    given = asked(knowledge)
    half = given and KnowledgeQuery(given.features.to(torch.bfloat16), given.owners)
    embed = embedding()
    tokens = knowledge.encode(lambda ids, mask: embed(ids, mask).to(torch.bfloat16), half).tokens
    assert tokens.dtype == torch.bfloat16 and tokens.isfinite().all()


def test_knowledge_that_needs_a_query_says_so() -> None:
    memory = cast(Memory, ready("memory"))
    with pytest.raises(ValueError, match="needs a query"):
        memory.encode(embedding())
