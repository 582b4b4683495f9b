"""Windows of every kind, in every precision."""

from math import prod

import pytest
import torch

from medm.connectors.windows import Windows
from medm.types import VisionFeatures


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["projection", "average", "max"])
@pytest.mark.parametrize("grid", [(4, 5), (2, 4, 5)])
def test_every_method_works_in_every_precision_on_a_cpu(method, dtype, grid):
    tokens = torch.randn(2, prod(grid), 8, dtype=dtype, requires_grad=True)
    sides = tuple(2 if cells % 2 == 0 else 5 for cells in grid)
    windows = Windows(method, sides, grid, connector="test")
    found = windows(VisionFeatures(tokens, grid))
    assert found.dtype == dtype
    found.float().sum().backward()
    assert tokens.grad.abs().sum() > 0
    exact = windows(VisionFeatures(tokens.detach().float(), grid))
    torch.testing.assert_close(found.float(), exact, atol=0.01, rtol=0.01)
