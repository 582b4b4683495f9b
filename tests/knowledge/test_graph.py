"""Graphs: features by each name's own word pieces, attention where the graph allows it."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

from medm.config import validate
from medm.errors import RecipeError
from medm.knowledge.graph import Graph
from medm.knowledge.spec import GraphSpec
from tests.knowledge.tiny import GRAPH, PIECES, build_knowledge, embedding


def graph(**options: object) -> Graph:
    return cast(Graph, build_knowledge("graph", **options))


def one_hot(ids: Tensor, mask: Tensor) -> Tensor:
    """Word pieces 0 to 11 as vectors of 12, so that a mean can be read off."""
    return torch.nn.functional.one_hot(ids, 12).float()


def test_a_name_that_splits_is_the_mean_of_its_own_pieces() -> None:
    features = graph(word_dim=12, dim=8).features(one_hot)
    expected = torch.zeros(4, 12)
    expected[0, 3] = 1
    expected[1, [5, 3]] = 1 / 2
    expected[2, 7] = 1
    expected[3, [9, 2, 4]] = 1 / 3
    torch.testing.assert_close(features, expected)


def test_a_name_that_splits_leaves_the_other_features_alone() -> None:
    """MOTOR's release reads all names as one text, where one that splits shifts those behind."""
    longer = [PIECES[0], [5, 8, 1, 3], *PIECES[2:]]
    before, after = (
        graph(node_ids=ids, word_dim=12, dim=8).features(one_hot) for ids in (PIECES, longer)
    )
    same = (before == after).all(dim=1)
    assert same.tolist() == [True, False, True, True]


def test_nodes_see_themselves_their_edges_their_groups_and_the_global_node() -> None:
    assert graph().connected.int().tolist() == [
        [1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 1],
        [1, 0, 0, 1, 1],
    ]


def test_a_node_depends_on_those_that_it_sees_alone() -> None:
    """With one layer: "heart" sees "big heart", and not "rib"."""
    one = graph(layers=1)
    plain = embedding()
    before = one.encode(plain).tokens[0]

    def changed(ids: Tensor, mask: Tensor) -> Tensor:
        vectors = plain(ids, mask).clone()
        vectors[3, :, 0] += 1.0  # the node "rib"
        return vectors

    after = one.encode(changed).tokens[0]
    moved = [not torch.allclose(a, b) for a, b in zip(before, after, strict=True)]
    assert moved == [True, False, False, True, True]


def test_the_encoder_equals_a_straight_computation() -> None:
    one = graph(layers=1, heads=2)
    embed = embedding()
    layer = one.layers[0]

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, unbiased=False, keepdim=True) + 1e-5
        ).sqrt()

    vectors = embed(one.node_ids, one.node_mask)
    means = torch.stack([vectors[row, : len(own)].mean(0) for row, own in enumerate(PIECES)])
    rates = 10000.0 ** (-torch.arange(4) / 4)
    code = torch.cat([rates.sin(), rates.cos()])  # of group 1, in which nodes 2 and 3 are
    means[2:] += code
    x = norm(torch.cat([one.global_node[None], means]))
    q, k, v = (
        part(norm(x)).view(5, 2, 4).transpose(0, 1)
        for part in (layer.attention.query, layer.attention.key, layer.attention.value)
    )
    scores = (q @ k.transpose(1, 2) / 2.0).masked_fill(~one.connected, -torch.inf)
    x = x + layer.attention.output((scores.softmax(-1) @ v).transpose(0, 1).reshape(5, 8))
    inner = layer.inner(norm(x))
    x = x + layer.outer(inner * 0.5 * (1 + torch.erf(inner / 2**0.5)))
    torch.testing.assert_close(one.encode(embed).tokens[0], norm(x), atol=1e-5, rtol=1e-4)


def test_a_shuffled_graph_changes_the_tokens() -> None:
    spec = validate(GraphSpec, GRAPH, source="test")
    mixed = spec.shuffled(0)
    assert sorted(mixed.nodes) == sorted(spec.nodes)
    assert all(a != b for a, b in zip(mixed.nodes, spec.nodes, strict=True))
    assert (mixed.edges, mixed.groups) == (spec.edges, spec.groups)
    assert mixed == spec.shuffled(0)
    assert mixed != spec.shuffled(1)
    pieces = dict(zip(spec.nodes, PIECES, strict=True))
    shuffled = graph(graph=mixed.model_dump(), node_ids=[pieces[name] for name in mixed.nodes])
    plain = graph()
    shuffled.load_state_dict(
        {**plain.state_dict(), "node_ids": shuffled.node_ids, "node_mask": shuffled.node_mask}
    )
    # Even as a set the tokens differ: the names have other neighbors.
    first, second = (one.encode(embedding()).tokens.sum(dim=1) for one in (plain, shuffled))
    assert not torch.allclose(first, second, atol=1e-4)


def test_the_groups_of_a_node_are_averaged() -> None:
    both = {**GRAPH, "groups": {"a": [2], "b": [2, 3]}}
    code = graph(graph=both).group_code
    alone = graph(graph={**GRAPH, "groups": {"a": [2], "b": [3]}}).group_code
    torch.testing.assert_close(code[2], (alone[2] + alone[3]) / 2)
    assert not code[:2].any()


def test_the_unbiased_norm_divides_by_the_unbiased_deviation() -> None:
    from medm.knowledge.attention import norm_of

    row = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    expected = (row - 3) / ((14 / 3) ** 0.5 + 1e-6)
    torch.testing.assert_close(norm_of("unbiased", 4)(row), expected)
    assert not torch.allclose(norm_of("standard", 4)(row), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": ["a", "a"]}, "'a' stands twice"),
        ({"nodes": ["a", " "]}, "blank text at 1"),
        ({"nodes": ["a", "b"], "edges": [[0, 2]]}, r"below 2, found \[0, 2\]"),
        ({"nodes": ["a", "b"], "edges": [[1, 1]]}, "two different positions"),
        ({"nodes": ["a"], "groups": {"g": []}}, r"groups.g: expected positions"),
    ],
)
def test_a_graph_that_contradicts_itself_is_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        validate(GraphSpec, changes, source="test")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="word pieces of 4 nodes, found 1"):
        graph(node_ids=[[1]])
    with pytest.raises(ValueError, match="no word pieces for node 'bone'"):
        graph(node_ids=[[1], [2], [], [3]])
    with pytest.raises(RecipeError, match="3 attention heads do not divide the width 8"):
        graph(heads=3)
