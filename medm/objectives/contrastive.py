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
    """Every process scores its own rows against the pairs of all processes, so the logits stay (B, B * world).

    The model's output has the two views under the names `first` and `second`, (B, D) each, a `logit_scale`
    (a factor, not its logarithm) and, for the sigmoid loss, a `logit_bias`. Views are normalised here.

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
        if self.loss == "sigmoid":
            loss = self._sigmoid(first, second, scale, output["logit_bias"])
        else:
            loss = self._softmax(first, second, scale)
        return Losses(loss * self.share(batch, num_items_in_batch))

    def _softmax(self, first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
        every_first, every_second, offset = self._everywhere(first), self._everywhere(second), self._offset(first)
        targets = torch.arange(len(first), device=first.device) + offset  # (B,) column of the partner
        smoothing = self.label_smoothing
        rows = F.cross_entropy(scale * first @ every_second.T, targets, label_smoothing=smoothing)
        columns = F.cross_entropy(scale * second @ every_first.T, targets, label_smoothing=smoothing)
        return (rows + columns) / 2

    def _sigmoid(self, first: Tensor, second: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        logits = scale * first @ self._everywhere(second).T + bias  # (B, B * world)
        signs = -torch.ones_like(logits)
        rows = torch.arange(len(first), device=first.device)
        signs[rows, rows + self._offset(first)] = 1.0
        return -F.logsigmoid(signs * logits).sum() / len(first)

    def _everywhere(self, view: Tensor) -> Tensor:
        """(B * world, D): the rows of every process, in rank order, with gradient."""
        return _Gather.apply(view.contiguous()) if self._spread() else view

    def _offset(self, view: Tensor) -> int:
        return dist.get_rank() * len(view) if self._spread() else 0

    def _spread(self) -> bool:
        return self.gather and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Gather(torch.autograd.Function):
    """The rows of every process in rank order; each process gets back the sum of all gradients of its own rows."""

    @staticmethod
    def forward(ctx: Any, view: Tensor) -> Tensor:
        rows = [torch.empty_like(view) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, view)
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def _first_tensor(batch: Batch) -> Tensor:
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim():
            return value
    raise ValueError(f"expected a batch with at least one tensor of shape (B, ...), found keys {sorted(batch)}")
