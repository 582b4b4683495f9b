"""State beside the weights that contrast with soft targets needs: a queue, and draws of negatives.

Everything here is a function of the batch of all ranks, so that each rank comes to the same values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FeatureQueue(nn.Module):
    """The last vectors of images and texts, first in, first out.

    It starts empty, and wraps where the batches do not divide its length.

    Args:
        size: number of pairs; 0 keeps none.
        dim: width of a vector.
    """

    image: Tensor
    """(size, dim)."""
    text: Tensor
    """(size, dim)."""
    owners: Tensor
    """(size,) int64, of each pair the number of its text."""
    filled: Tensor
    """Pairs that are held, a scalar."""
    next: Tensor
    """Place of the next pair, a scalar."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("image", torch.zeros(size, dim))
        self.register_buffer("text", torch.zeros(size, dim))
        self.register_buffer("owners", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    def clear(self) -> None:
        """Empty the queue."""
        for buffer in self.buffers():
            buffer.zero_()

    def held(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return images (Q, dim), texts (Q, dim) and owners (Q,) of the pairs that are held."""
        count = int(self.filled)
        return self.image[:count], self.text[:count], self.owners[:count]

    @torch.no_grad()
    def add(self, image: Tensor, text: Tensor, owners: Tensor) -> None:
        """Put pairs in place of the oldest ones.

        Args:
            image: (B, dim), of all ranks in rank order.
            text: (B, dim).
            owners: (B,) int64.
        """
        count = len(owners)
        if not self.size or not count:
            return
        kept = min(count, self.size)
        first = int(self.next) + count - kept
        places = torch.arange(first, first + kept, device=owners.device) % self.size
        self.image[places] = image[-kept:].to(self.image.dtype)
        self.text[places] = text[-kept:].to(self.text.dtype)
        self.owners[places] = owners[-kept:]
        self.next.fill_((int(self.next) + count) % self.size)
        self.filled.fill_(min(self.size, int(self.filled) + count))


def soft_targets(similarities: Tensor, positives: Tensor, alpha: float) -> Tensor:
    """Return targets (B, C): a mixture of the momentum model's softmax and of the true partners.

    Args:
        similarities: (B, C) of the momentum model, divided by the temperature.
        positives: (B, C) bool, the partners of each row; at least one.
        alpha: share of the momentum model.
    """
    partners = positives.to(similarities.dtype)
    partners = partners / partners.sum(dim=1, keepdim=True)
    return alpha * similarities.softmax(dim=1) + (1 - alpha) * partners


def hard_negatives(similarities: Tensor, allowed: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a wrong partner for each row: the more similar, the likelier (ALBEF, arXiv 2107.07651).

    Args:
        similarities: (B, C), divided by the temperature.
        allowed: (B, C) bool, which candidates are wrong for a row.
        places: (B,) float64 in [0, 1), where each row cuts its distribution.

    Returns:
        (B,) int64, the candidates; and (B,) bool, False for a row without any, whose candidate is
        then 0.
    """
    weights = (similarities.double().softmax(dim=1) + 1e-4) * allowed
    sums = weights.cumsum(dim=1)
    found = torch.searchsorted(sums, (places * sums[:, -1]).unsqueeze(1), right=True).squeeze(1)
    possible = allowed.any(dim=1)
    return torch.where(possible, found.clamp(max=sums.shape[1] - 1), 0), possible


def draws(seed: int, rows: int, device: torch.device) -> Tensor:
    """Return where each row of the batch of all ranks cuts its distributions, (2, rows) float64.

    Args:
        seed: number of the batch, so that a resumed run draws what a run in one piece draws.
        rows: pairs of all ranks.
        device: of the result.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, rows, generator=generator, dtype=torch.float64).to(device)
