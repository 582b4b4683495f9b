"""Pixel shuffle of InternVL: the order of cells and channels of both versions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medm.connectors import PixelShuffleVersion
from medm.connectors.pixel_shuffle import PixelShuffleConnector
from medm.types import VisionFeatures


def published(x: Tensor, version: str, scale: float = 0.5) -> Tensor:
    """InternVL's steps: fold columns into channels, exchange, fold rows, exchange back in v2."""
    n, rows, columns, dim = x.shape
    x = x.reshape(n, rows, int(columns * scale), int(dim / scale)).transpose(1, 2)
    x = x.reshape(n, int(columns * scale), int(rows * scale), int(dim / scale**2))
    return x if version == "v1" else x.transpose(1, 2)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_tokens_are_in_the_published_order(version: PixelShuffleVersion) -> None:
    cells = torch.rand(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    connector = PixelShuffleConnector(in_dim=5, out_dim=3, grid=(4, 6), version=version)
    expected = published(cells, version).flatten(1, 2)
    assert connector.num_tokens == 6
    found = connector(VisionFeatures(cells.flatten(1, 2), (4, 6)))
    torch.testing.assert_close(found, connector.layers(connector.norm(expected)))


def test_first_token_of_the_second_row_by_hand() -> None:
    """Cell (row, column) of a 4 x 4 grid holds 10 * row + column."""
    cells = torch.tensor([[10.0 * r + c for c in range(4)] for r in range(4)]).view(1, 16, 1)
    firsts = {}
    for version in ("v1", "v2"):
        connector = PixelShuffleConnector(in_dim=1, out_dim=4, grid=(4, 4), version=version)
        connector.norm, connector.layers = torch.nn.Identity(), torch.nn.Identity()
        firsts[version] = connector(VisionFeatures(cells, (4, 4)))[0, 1].tolist()
    assert firsts == {"v1": [20, 21, 30, 31], "v2": [2, 3, 12, 13]}


def test_a_grid_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pixel-shuffle: windows of \(2, 2\) do not divide"):
        PixelShuffleConnector(in_dim=4, out_dim=4, grid=(3, 4))
