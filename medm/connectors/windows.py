"""Reduction of windows of a token grid to one token each.

The tokens of a window are concatenated, averaged, or replaced by their maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, prod

from torch import Tensor
from torch.nn import functional as F

from medm.connectors import Method
from medm.types import VisionFeatures

_POOL: dict[Method, dict[int, Callable[..., Tensor]]] = {
    "average": {2: F.avg_pool2d, 3: F.avg_pool3d},
    "max": {2: F.max_pool2d, 3: F.max_pool3d},
}


class Windows:
    """Reduction of each window of a grid to one token, in the order of the grid.

    Tokens outside the grid (CLS) are dropped.

    Args:
        method: "projection" lays the cells of a window side by side on the channel axis (the layer
            that follows projects them), "average" and "max" pool each channel.
        sides: cells of a window along each axis, or one number for all. [1, 4] gives Uni-Med's
            strips of a row.
        grid: the token grid.
        connector: name for messages.

    Raises:
        ValueError: the windows do not fit the grid. Pooling takes the rest at the end of an axis as
            a smaller window; projection needs whole windows.
    """

    def __init__(
        self, method: Method, sides: int | Sequence[int], grid: tuple[int, ...], *, connector: str
    ) -> None:
        if prod(grid) == 0:
            raise ValueError(
                f"{connector}: expected tokens on a grid, found {grid}; the encoder gives class "
                "tokens alone"
            )
        wanted = (sides,) * len(grid) if isinstance(sides, int) else tuple(sides)
        if len(wanted) != len(grid) or min(wanted) < 1:
            raise ValueError(
                f"{connector}: expected one window side of at least 1 for each axis of the grid "
                f"{grid}, found {wanted}"
            )
        if method == "projection" and any(
            cells % side for cells, side in zip(grid, wanted, strict=True)
        ):
            raise ValueError(
                f"{connector}: windows of {wanted} do not divide the grid {grid}; choose sides "
                "that do, or pool"
            )
        self.method, self.grid = method, grid
        self.sides = tuple(min(side, cells) for side, cells in zip(wanted, grid, strict=True))

    @property
    def count(self) -> int:
        """Number of windows."""
        return prod(ceil(cells / side) for cells, side in zip(self.grid, self.sides, strict=True))

    def width(self, dim: int) -> int:
        """Width of a resulting token, from that of a cell."""
        return dim * prod(self.sides) if self.method == "projection" else dim

    def __call__(self, features: VisionFeatures) -> Tensor:
        """Tokens (B, prefix + prod(grid), D) to (B, count, width(D))."""
        cells = features.tokens[:, features.prefix :].unflatten(1, features.grid)  # (B, *grid, D)
        if self.method != "projection":
            cells = cells.movedim(-1, 1)  # (B, D, *grid)
            # On a CPU torch has no average over volumes in 16 bits; float32 is exact for both.
            exact = cells.float() if cells.device.type == "cpu" and cells.itemsize == 2 else cells
            pooled = _POOL[self.method][len(self.sides)](
                exact, self.sides, stride=self.sides, ceil_mode=True
            )
            return pooled.to(cells.dtype).flatten(2).transpose(1, 2)
        axes = len(self.sides)
        split = [
            n
            for size, side in zip(self.grid, self.sides, strict=True)
            for n in (size // side, side)
        ]
        cells = cells.reshape(len(cells), *split, cells.shape[-1])  # (B, g1, s1, g2, s2, ..., D)
        outer, inner = range(1, 2 * axes, 2), range(2, 2 * axes + 1, 2)
        return cells.permute(0, *outer, *inner, 2 * axes + 1).flatten(1, axes).flatten(2)
