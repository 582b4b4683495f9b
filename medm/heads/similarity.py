"""Masks as the similarity of prompts and features: their dot product at each voxel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ItemGroups:
    """Rows of M masks by the item that they belong to.

    The kernels of an item are one matrix, so that its features are not copied for each mask.

    Args:
        items: (M,) int64, the item of each mask. A GPU is waited for once.
        count: N.
    """

    def __init__(self, items: Tensor, count: int) -> None:
        self._counts: list[int] = torch.bincount(items, minlength=count).tolist()
        self._order = items.argsort(stable=True)
        self._inverse = self._order.argsort()

    def split(self, rows: Tensor) -> Sequence[Tensor]:
        """Return the rows of each of the N items, in their order; empty where it has none."""
        return rows[self._order].split(self._counts)

    def join(self, groups: Sequence[Tensor]) -> Tensor:
        """Return the rows of all items in the order of the masks."""
        return torch.cat(list(groups))[self._inverse]

    def similarity(self, features: Tensor, kernels: Tensor) -> Tensor:
        """Return the dot product of each kernel with the features of its item, (M, *grid).

        Args:
            features: (N, F, *grid).
            kernels: (M, F).
        """
        pairs = zip(self.split(kernels), features, strict=True)
        values = self.join([rows @ maps.flatten(1) for rows, maps in pairs])  # (M, V)
        return values.unflatten(1, features.shape[2:])

    def attended(self, features: Tensor, logits: Tensor) -> Tensor:
        """Return the features of each mask's most likely voxels, (M, F).

        They are the mean over the grid, weighted by the softmax of the logits.

        Args:
            features: (N, F, *grid).
            logits: (M, *grid).
        """
        weights = logits.flatten(1).softmax(dim=1)  # (M, V)
        pairs = zip(self.split(weights), features, strict=True)
        return self.join([rows @ maps.flatten(1).T for rows, maps in pairs])


def expected_iou(logits: Tensor) -> Tensor:
    """Return the IoU to expect of each mask if the sigmoids are right, (M,) in 0..1.

    A voxel is in the target with its probability p. The expected overlap is the sum of p inside the
    mask; the expected union is the number of voxels of the mask plus the sum of p outside of it. An
    empty mask has 0.

    Args:
        logits: (M, *grid).
    """
    flat = logits.float().flatten(1)
    probabilities, inside = flat.sigmoid(), flat > 0
    overlap = (probabilities * inside).sum(dim=1)
    union = inside.sum(dim=1) + (probabilities * ~inside).sum(dim=1)
    found = overlap / union.clamp(min=torch.finfo(torch.float32).tiny)
    return found.to(logits.dtype)
