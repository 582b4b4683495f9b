"""Contrast of two views over the global batch: softmax (CLIP) or sigmoid (SigLIP)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from medm.objectives.base import Losses, Objective
from medm.types import Batch


class Contrastive(Objective):
    """Every process scores its own rows against the pairs of all processes, so the logits stay (B, pairs of all).

    Processes may hold different numbers of pairs. The model's output has the two views under the names `first` and
    `second`, (B, D) each, a `logit_scale` (a factor, not its logarithm) and, for the sigmoid loss, a `logit_bias`.
    Views are normalised here.

    Args:
        loss: "softmax" or "sigmoid".
        first: output field of one view.
        second: output field of the other.
        gather: compare with the pairs of all processes; gradients flow back to the process they came from.
        label_smoothing: of the softmax loss.
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
        sizes = self._sizes(first)
        if self.loss == "sigmoid":
            total = self._sigmoid(first, second, sizes, scale, output["logit_bias"])
        else:
            total = self._softmax(first, second, sizes, scale)
        # A process that got no pair still took part in the gathering, and has a loss of 0.
        return Losses(total / max(len(first), 1) * self.share(batch, num_items_in_batch))

    def _softmax(self, first: Tensor, second: Tensor, sizes: list[int], scale: Tensor) -> Tensor:
        every_first, every_second = self._everywhere(first, sizes), self._everywhere(second, sizes)
        targets = torch.arange(len(first), device=first.device) + self._offset(sizes)  # (B,) column of the partner
        smoothing = self.label_smoothing
        rows = F.cross_entropy(scale * first @ every_second.T, targets, label_smoothing=smoothing, reduction="sum")
        columns = F.cross_entropy(scale * second @ every_first.T, targets, label_smoothing=smoothing, reduction="sum")
        return (rows + columns) / 2

    def _sigmoid(self, first: Tensor, second: Tensor, sizes: list[int], scale: Tensor, bias: Tensor) -> Tensor:
        logits = scale * first @ self._everywhere(second, sizes).T + bias  # (B, pairs of all processes)
        signs = -torch.ones_like(logits)
        rows = torch.arange(len(first), device=first.device)
        signs[rows, rows + self._offset(sizes)] = 1.0
        return -F.logsigmoid(signs * logits).sum()

    def _sizes(self, view: Tensor) -> list[int]:
        """Rows of every process in rank order: the last batch of an epoch may be dealt unevenly."""
        if not self._spread():
            return [len(view)]
        sizes = [torch.zeros((), dtype=torch.int64, device=view.device) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, torch.tensor(len(view), device=view.device))
        return [int(size) for size in sizes]

    def _everywhere(self, view: Tensor, sizes: list[int]) -> Tensor:
        """(sum of sizes, D): the rows of every process, in rank order, with gradient."""
        return _Gather.apply(view, sizes) if self._spread() else view

    def _offset(self, sizes: list[int]) -> int:
        return sum(sizes[: dist.get_rank()]) if self._spread() else 0

    def _spread(self) -> bool:
        return self.gather and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Gather(torch.autograd.Function):
    """The rows of every process in rank order; each process gets back the sum of all gradients of its own rows."""

    @staticmethod
    def forward(ctx: Any, view: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        # Gathering takes tensors of one shape; what fills them up is cut off again.
        padded = F.pad(view, (0, 0, 0, max(sizes) - len(view)))  # (most rows, D)
        rows = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(rows, padded)
        return torch.cat([part[:size] for part, size in zip(rows, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total.split(ctx.sizes)[dist.get_rank()], None


def _first_tensor(batch: Batch) -> Tensor:
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim():
            return value
    raise ValueError(f"expected a batch with at least one tensor of shape (B, ...), found keys {sorted(batch)}")
