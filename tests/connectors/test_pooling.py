"""Spatial and attention pooling: hand-computed averages, torch's own attention, and grids that do
not divide."""

from math import ceil, prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medm.connectors.pooling import AttentionPoolingConnector, SpatialPoolingConnector
from medm.types import VisionFeatures
from tests.connectors.tiny import IN_DIM, build_connector, features_on


def without_mlp(connector):
    connector.layers = torch.nn.Identity()
    return connector


def test_average_of_two_by_two_by_hand():
    # grid 2 x 4, one channel: rows 0 1 2 3 and 4 5 6 7; windows (0 1 4 5) and (2 3 6 7); a class
    # token of 99 in front
    tokens = torch.tensor([99.0, 0, 1, 2, 3, 4, 5, 6, 7]).view(1, 9, 1)
    connector = without_mlp(SpatialPoolingConnector(in_dim=1, out_dim=1, grid=(2, 4), prefix=1))
    assert connector(VisionFeatures(tokens, (2, 4), 1)).flatten().tolist() == [2.5, 4.5]


def test_the_last_window_averages_the_cells_that_are_left():
    tokens = torch.tensor([1.0, 2, 3, 10, 20, 30, 100, 200, 300]).view(1, 9, 1)
    connector = without_mlp(SpatialPoolingConnector(in_dim=1, out_dim=1, grid=(3, 3)))
    assert connector(VisionFeatures(tokens, (3, 3))).flatten().tolist() == [
        8.25,
        16.5,
        150.0,
        300.0,
    ]


def test_the_published_volume_gives_256_tokens_in_place_order():
    grid = (8, 16, 16)
    connector = without_mlp(build_connector("spatial-pooling", grid, prefix=1))
    features = features_on(grid, prefix=1, batch=1)
    expected = (
        features.tokens[:, 1:]
        .reshape(1, 4, 2, 8, 2, 8, 2, IN_DIM)
        .mean(dim=(2, 4, 6))
        .reshape(1, 256, IN_DIM)
    )
    assert connector.num_tokens == 256
    torch.testing.assert_close(connector(features), expected, atol=1e-6, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    grid=st.lists(st.integers(1, 7), min_size=2, max_size=3).map(tuple),
    pool=st.integers(1, 9),
    prefix=st.integers(0, 2),
)
def test_any_grid_and_window(grid, pool, prefix):
    connector = without_mlp(build_connector("spatial-pooling", grid, prefix, pool=pool))
    features = features_on(grid, prefix, batch=1)
    pooled = connector(features)
    assert pooled.shape[1] == connector.num_tokens == prod(ceil(side / pool) for side in grid)
    # Averages stay inside the range of what was averaged, and a constant map stays constant.
    assert pooled.max() <= features.tokens.max() + 1e-6
    ones = VisionFeatures(torch.ones_like(features.tokens), grid, prefix)
    torch.testing.assert_close(connector(ones), torch.ones_like(pooled))


def test_a_window_for_each_axis():
    assert build_connector("spatial-pooling", (8, 4, 4), pool=[4, 2, 1]).num_tokens == 2 * 2 * 4


@pytest.mark.parametrize("pool", [[2, 2], [2, 2, 0]])
def test_windows_that_do_not_belong_to_the_grid_are_refused(pool):
    with pytest.raises(ValueError, match=r"each axis of the grid \(8, 4, 4\), found"):
        build_connector("spatial-pooling", (8, 4, 4), pool=pool)


def test_class_tokens_alone_cannot_be_pooled():
    with pytest.raises(ValueError, match="class tokens alone"):
        build_connector("spatial-pooling", (0,), prefix=1)


def test_attention_pooling_equals_torch_attention_under_the_same_names():
    connector = build_connector("attention-pooling", (2, 4, 4), prefix=1)
    reference = torch.nn.MultiheadAttention(IN_DIM, 4, batch_first=True)
    reference.load_state_dict(connector.attn.state_dict(), strict=True)
    features = features_on((2, 4, 4), prefix=1)
    query = connector.query.expand(2, -1, -1)
    expected = connector.layers(reference(query, features.tokens, features.tokens)[0])
    torch.testing.assert_close(connector(features), expected, atol=1e-6, rtol=1e-6)


def test_queries_come_from_one_slice_of_the_volume():
    connector = AttentionPoolingConnector(in_dim=8, out_dim=4, grid=(32, 16, 16), heads=2)
    assert connector.num_tokens == 256
    assert connector.query.shape == (256, 8)


def test_heads_that_do_not_divide_are_refused_with_numbers():
    with pytest.raises(ValueError, match="5 heads do not divide the encoder's width of 16"):
        build_connector("attention-pooling", (4, 4), heads=5)


def test_published_names_of_the_projector():
    names = set(build_connector("attention-pooling", (4, 4)).state_dict())
    assert names == {
        "query",
        "attn.in_proj_weight",
        "attn.in_proj_bias",
        "attn.out_proj.weight",
        "attn.out_proj.bias",
        "layers.0.weight",
        "layers.0.bias",
        "layers.2.weight",
        "layers.2.bias",
    }
