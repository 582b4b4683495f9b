"""Contrast of two views over the global batch: softmax (CLIP) or sigmoid (SigLIP)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medm.distributed import all_gather, rank, row_counts
from medm.objectives.base import Losses, Objective
from medm.types import Batch


class Contrastive(Objective):
    """Every process scores its own rows against the pairs of all processes, so the logits stay (B, pairs of all).

    Processes may hold different numbers of pairs. The model's output has the two views under the names `first` and
    `second`, (B, D) each, a `logit_scale` (a factor, not its logarithm) and, for the sigmoid loss, a `logit_bias`.
    Views are normalised here.

    Args:
        options: see `ContrastiveOptions`.
    """

    def __init__(
        self, *, loss: str = "softmax", first: str = "image_embeds", second: str = "text_embeds", gather: bool = True,
        label_smoothing: float = 0.0,
    ) -> None:  # fmt: skip
        self.loss, self.first, self.second = loss, first, second
        self.gather, self.label_smoothing = gather, label_smoothing

    def num_items(self, batch: Batch) -> Tensor:
        """Pairs: the length of the batch's first tensor."""
        tensor = _first_tensor(batch)
        return torch.tensor(len(tensor), device=tensor.device)

    def __call__(self, model: nn.Module, batch: Batch, num_items_in_batch: Tensor | int | None = None) -> Losses:
        output = model(**batch)
        first = F.normalize(output[self.first].float(), dim=-1)  # (B, D)
        second = F.normalize(output[self.second].float(), dim=-1)  # (B, D)
        scale = output["logit_scale"]
        counts = self._counts(first)
        if self.loss == "sigmoid":
            total = self._sigmoid(first, second, counts, scale, output["logit_bias"])
        else:
            total = self._softmax(first, second, counts, scale)
        # A process that got no pair still took part in the gathering, and has a loss of 0.
        return Losses(total / max(len(first), 1) * self.share(batch, num_items_in_batch))

    def _softmax(self, first: Tensor, second: Tensor, counts: list[int], scale: Tensor) -> Tensor:
        every_first, every_second = self._gathered(first, counts), self._gathered(second, counts)
        targets = torch.arange(len(first), device=first.device) + self._offset(counts)  # (B,) column of the partner
        smoothing = self.label_smoothing
        rows = F.cross_entropy(scale * first @ every_second.T, targets, label_smoothing=smoothing, reduction="sum")
        columns = F.cross_entropy(scale * second @ every_first.T, targets, label_smoothing=smoothing, reduction="sum")
        return (rows + columns) / 2

    def _sigmoid(self, first: Tensor, second: Tensor, counts: list[int], scale: Tensor, bias: Tensor) -> Tensor:
        logits = scale * first @ self._gathered(second, counts).T + bias  # (B, pairs of all processes)
        signs = -torch.ones_like(logits)
        rows = torch.arange(len(first), device=first.device)
        signs[rows, rows + self._offset(counts)] = 1.0
        return -F.logsigmoid(signs * logits).sum()

    def _counts(self, view: Tensor) -> list[int]:
        """Return the rows of every rank that is compared with."""
        return row_counts(view) if self.gather else [len(view)]

    def _gathered(self, view: Tensor, counts: list[int]) -> Tensor:
        """Return the rows of every rank that is compared with, (sum of counts, D)."""
        return all_gather(view, counts) if self.gather else view

    def _offset(self, counts: list[int]) -> int:
        return sum(counts[: rank()]) if self.gather else 0


def _first_tensor(batch: Batch) -> Tensor:
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim():
            return value
    raise ValueError(f"expected a batch with at least one tensor of shape (B, ...), found keys {sorted(batch)}")
