"""Batch norm for convolutional encoders whose batches are too small to estimate statistics from."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from medm.encoders import Statistics


class FixedBatchNorm(_BatchNorm):
    """Batch norm on any number of axes that always uses its stored statistics.

    Scale and shift can be learned.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalize with the stored statistics, also in training."""
        return F.batch_norm(
            pixels,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=False,
            eps=self.eps,
        )


def batch_norm(statistics: Statistics, *, axes: int) -> type[_BatchNorm]:
    """Return the batch norm class for the statistics and the number of axes."""
    if statistics == "running":
        return FixedBatchNorm
    return nn.BatchNorm3d if axes == 3 else nn.BatchNorm2d
