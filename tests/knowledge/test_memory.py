"""The memory: first in first out, exact retrieval, and never a sample's own report."""

from __future__ import annotations

import sys
from typing import cast

import pytest
import torch
from torch import Tensor

from medm.config import validate
from medm.data.captions import same_label
from medm.errors import DeviceError, RecipeError
from medm.knowledge import MemoryOptions
from medm.knowledge.base import NO_OWNER, KnowledgeQuery
from medm.knowledge.memory import Memory
from tests.knowledge.tiny import build_knowledge, embedding


def memory(**options: object) -> Memory:
    return cast(Memory, build_knowledge("memory", **options))


def entries(first: int, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entries first, first + 1, ...: key (number, 0, 0, 0), text of that number, owner 100 more."""
    numbers = torch.arange(first, first + number)
    keys = torch.zeros(number, 4)
    keys[:, 0] = numbers.float()
    ids = (numbers % 12).unsqueeze(1).expand(-1, 2)
    return keys, ids, torch.ones(number, 2).bool(), numbers + 100


ALONG = torch.tensor([[1.0, 0, 0, 0]])
"""A query whose score is the number of an entry."""


def test_it_wraps_where_the_batch_does_not_divide_the_size() -> None:
    held = memory(size=6)
    held.enqueue(*entries(0, 4))
    assert (int(held.filled), int(held.next)) == (4, 4)
    assert held.owners.tolist() == [100, 101, 102, 103, -1, -1]
    held.enqueue(*entries(4, 4))
    assert (int(held.filled), int(held.next)) == (6, 2)
    assert held.owners.tolist() == [106, 107, 102, 103, 104, 105]
    assert held.keys[:, 0].tolist() == [6, 7, 2, 3, 4, 5]
    assert held.ids[:, 0].tolist() == [6, 7, 2, 3, 4, 5]
    assert held.mask.tolist() == [[True, True, False, False, False]] * 6


def test_of_more_entries_than_fit_the_newest_stay_in_their_order() -> None:
    held, one_by_one = memory(size=6), memory(size=6)
    held.enqueue(*entries(0, 2))
    held.enqueue(*entries(2, 15))
    for number in range(17):
        one_by_one.enqueue(*entries(number, 1))
    for mine, theirs in zip(held.buffers(), one_by_one.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_shorter_text_leaves_nothing_of_the_older_one() -> None:
    held = memory(size=2)
    held.enqueue(
        torch.ones(2, 4), torch.full((2, 5), 7), torch.ones(2, 5).bool(), torch.tensor([1, 2])
    )
    held.enqueue(
        torch.ones(1, 4), torch.full((1, 1), 3), torch.ones(1, 1).bool(), torch.tensor([3])
    )
    assert held.ids[0].tolist() == [3, 0, 0, 0, 0]
    assert held.mask[0].tolist() == [True, False, False, False, False]


def test_the_best_entries_come_first_with_softmax_weights() -> None:
    held = memory(size=6, k=3)
    held.enqueue(*entries(0, 5))
    indices, weights = held.retrieve(ALONG, torch.tensor([NO_OWNER]))
    assert indices.tolist() == [[4, 3, 2]]
    exponents = torch.tensor([4.0, 3.0, 2.0]).exp()
    torch.testing.assert_close(weights[0], exponents / exponents.sum())


def test_a_sample_and_duplicates_of_its_report_are_never_retrieved() -> None:
    held = memory(size=8, k=3)
    report = "No pleural effusion."
    own, same, other = (
        same_label(text, None, source="test")
        for text in (report, "no  pleural EFFUSION\n", "Small left effusion.")
    )
    assert own == same != other
    keys, ids, mask, _ = entries(0, 5)
    owners = torch.tensor([other, 3, other, own, own])
    held.enqueue(keys, ids, mask, owners)
    query = ALONG.expand(3, -1)
    indices, weights = held.retrieve(query, torch.tensor([own, other, NO_OWNER]))
    assert indices.tolist() == [[2, 1, 0], [4, 3, 1], [4, 3, 2]]
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))
    published = memory(size=8, k=1, exclude_own=False)
    published.enqueue(keys, ids, mask, owners)
    assert published.retrieve(ALONG, torch.tensor([own])).indices.tolist() == [[4]]


def test_too_few_entries_leave_places_open() -> None:
    held = memory(size=6, k=3)
    empty = held.retrieve(ALONG, torch.tensor([NO_OWNER]))
    assert empty.indices.tolist() == [[-1, -1, -1]]
    assert empty.weights.tolist() == [[0, 0, 0]]
    held.enqueue(*entries(5, 2))
    indices, weights = held.retrieve(ALONG, torch.tensor([105]))
    assert indices.tolist() == [[1, -1, -1]]
    assert weights.tolist() == [[1, 0, 0]]
    given = held.encode(embedding(), KnowledgeQuery(ALONG, torch.tensor([105])))
    assert given.mask.tolist() == [[True, True, False, False, False]]
    none = memory().encode(embedding(), KnowledgeQuery(ALONG, torch.tensor([105])))
    assert not none.mask.any() and not none.tokens.any()


def test_unfilled_places_are_not_retrieved_by_negative_scores() -> None:
    held = memory(size=6, k=2)
    held.enqueue(*entries(1, 2))
    assert held.retrieve(-ALONG, torch.tensor([NO_OWNER])).indices.tolist() == [[0, 1]]


@pytest.mark.parametrize("combine", ["sum", "concat"])
def test_texts_are_weighted_without_their_padding(combine: str) -> None:
    held = memory(size=4, k=2, combine=combine, length=2)
    keys, ids, mask, owners = entries(0, 3)
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]]).bool()
    held.enqueue(keys, ids, mask, owners)
    embed = embedding()
    tokens, found = held.encode(embed, KnowledgeQuery(ALONG, torch.tensor([NO_OWNER])))
    first, second = torch.tensor([2.0, 1.0]).softmax(0)
    vector = {
        number: embed(torch.tensor([[number]]), torch.ones(1, 1).bool())[0, 0] for number in (1, 2)
    }
    if combine == "sum":
        expected = [first * vector[2] + second * vector[1], first * vector[2]]
        assert found.tolist() == [[True, True]]
    else:
        expected = [first * vector[2], first * vector[2], second * vector[1], 0 * vector[1]]
        assert found.tolist() == [[True, True, True, False]]
    torch.testing.assert_close(tokens[0], torch.stack(expected))


def test_gradients_reach_the_features_and_not_the_memory() -> None:
    held = memory(size=4)
    held.enqueue(*entries(0, 3))
    features = ALONG.clone().requires_grad_()
    held.encode(
        embedding(), KnowledgeQuery(features, torch.tensor([NO_OWNER]))
    ).tokens.sum().backward()
    assert features.grad is not None and features.grad.abs().sum() > 0
    assert not any(buffer.requires_grad for buffer in held.buffers())


def test_a_state_dict_continues_bit_for_bit() -> None:
    held, resumed = memory(), memory()
    held.enqueue(*entries(0, 4))
    resumed.load_state_dict(held.state_dict())
    for one in (held, resumed):
        one.enqueue(*entries(4, 5))
    for mine, theirs in zip(held.buffers(), resumed.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    held.clear()
    assert held.retrieve(ALONG, torch.tensor([NO_OWNER])).indices.tolist() == [[-1, -1]]


def test_entries_that_do_not_fit_are_refused() -> None:
    held = memory()
    keys, ids, mask, owners = entries(0, 3)
    with pytest.raises(ValueError, match="of 3 entries, found"):
        held.enqueue(keys, ids[:2], mask[:2], owners)
    with pytest.raises(ValueError, match="at most 5 word pieces, found 6"):
        held.enqueue(keys, ids.repeat(1, 3), mask.repeat(1, 3), owners)


def test_a_large_memory_asks_for_faiss() -> None:
    with pytest.raises(
        RecipeError,
        match=r"up to 1000000 entries, found 1000001; set search: faiss.*medm\[retrieval\]",
    ):
        validate(MemoryOptions, {"name": "memory", "size": 1_000_001}, source="test")
    with pytest.raises(RecipeError, match="set search: faiss"):
        memory(size=1_000_001)
    with pytest.raises(RecipeError, match="at most the size of the memory, 2"):
        validate(MemoryOptions, {"name": "memory", "size": 2}, source="test")


def test_a_missing_faiss_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(DeviceError, match=r"pip install medm\[retrieval\]"):
        memory(search="faiss")


def test_faiss_finds_the_same_entries() -> None:
    pytest.importorskip("faiss", reason="the extra `retrieval` is not installed")
    exact, blocked = memory(size=60, k=3), memory(size=60, k=3, search="faiss")
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(5, 4, generator=generator)
    owners = torch.tensor([0, 1, 2, 3, NO_OWNER])
    for number in (0, 2, 45):
        given = (
            torch.randn(number, 4, generator=generator),
            torch.ones(number, 2).long(),
            torch.ones(number, 2).bool(),
            torch.randint(0, 2, (number,), generator=generator),
        )
        for one in (exact, blocked):
            one.enqueue(*given)
        mine, theirs = (one.retrieve(query, owners) for one in (exact, blocked))
        assert torch.equal(mine.indices, theirs.indices)
        torch.testing.assert_close(mine.weights, theirs.weights)
