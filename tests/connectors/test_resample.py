"""Windows: Uni-Med's published shapes, computed as its formulas say, and true windows on images and
volumes."""

import pytest
import torch
from torch.nn import functional as F

from medm.connectors.resample import ResampleConnector
from medm.connectors.windows import Windows
from medm.types import VisionFeatures
from tests.connectors.tiny import build_connector, features_on


def published_projection(tokens, rate):
    """[B, 256, C] to [B, 256 / rate, C * rate]: consecutive tokens in one reshape."""
    batch, count, width = tokens.shape
    return tokens.reshape(batch, count // rate, width * rate)


def published_pool(tokens, pool):
    batch, count, width = tokens.shape
    side = int(count**0.5)
    cells = pool(tokens.transpose(1, 2).reshape(batch, width, side, side), 2, 2)
    return cells.reshape(batch, width, -1).transpose(1, 2)


def test_published_shapes_and_values():
    tokens = torch.randn(2, 257, 1408)
    features = VisionFeatures(tokens, (16, 16), prefix=1)
    cases = {
        "projection": ([1, 4], published_projection(tokens[:, 1:], 4), 5632),
        "average": (2, published_pool(tokens[:, 1:], F.avg_pool2d), 1408),
        "max": (2, published_pool(tokens[:, 1:], F.max_pool2d), 1408),
    }
    for method, (sides, expected, width) in cases.items():
        windows = Windows(method, sides, (16, 16), connector="resample")
        assert (windows.count, windows.width(1408)) == (64, width)
        torch.testing.assert_close(windows(features), expected)


def test_a_true_window_holds_its_four_neighbours():
    # Cell (row, column) holds 10 * row + column.
    tokens = torch.tensor([[10.0 * row + column for column in range(4)] for row in range(4)]).view(
        1, 16, 1
    )
    windows = Windows("projection", 2, (4, 4), connector="resample")
    assert windows(VisionFeatures(tokens, (4, 4)))[0].tolist() == [
        [0, 1, 10, 11], [2, 3, 12, 13], [20, 21, 30, 31], [22, 23, 32, 33]
    ]  # fmt: skip


def test_a_window_of_a_volume_holds_its_eight_neighbours():
    tokens = torch.tensor(
        [100.0 * d + 10 * h + w for d in range(2) for h in range(2) for w in range(4)]
    ).view(1, 16, 1)
    windows = Windows("projection", 2, (2, 2, 4), connector="resample")
    assert windows(VisionFeatures(tokens, (2, 2, 4)))[0].tolist() == [
        [0, 1, 10, 11, 100, 101, 110, 111],
        [2, 3, 12, 13, 102, 103, 112, 113],
    ]


def test_channels_of_a_cell_stay_together():
    features = features_on((2, 4))
    windows = Windows("projection", [1, 2], (2, 4), connector="resample")
    assert torch.equal(windows(features)[:, 0], features.tokens[:, :2].flatten(1))


def test_projection_needs_whole_windows_and_pooling_does_not():
    with pytest.raises(
        ValueError, match=r"resample: windows of \(2, 2\) do not divide the grid \(3, 4\)"
    ):
        build_connector("resample", (3, 4))
    assert build_connector("resample", (3, 4), method="max").num_tokens == 4


def test_the_mlp_follows_the_windows():
    connector = ResampleConnector(in_dim=16, out_dim=24, grid=(4, 4), window=[1, 4])
    features = features_on((4, 4))
    expected = connector.layers(published_projection(features.tokens, 4))
    assert connector.layers[0].in_features == 64
    torch.testing.assert_close(connector(features), expected)
