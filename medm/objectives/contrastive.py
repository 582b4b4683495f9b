"""Contrast of two views over the global batch: softmax (CLIP) or sigmoid (SigLIP)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from medm.distributed import all_gather, rank, row_counts
from medm.errors import RecipeError
from medm.objectives.base import Objective, Output
from medm.types import Batch


class Contrastive(Objective):
    """Contrastive loss of each rank's rows against the pairs of all ranks.

    The logits are (B, pairs of all ranks).

    Ranks may hold different numbers of pairs. The model's output has the two views under the names
    `first` and `second`, (B, D) each, a `logit_scale` (a factor, not its logarithm) and, for the
    sigmoid loss, a `logit_bias`. Views are normalized here.

    Args:
        options: see `ContrastiveOptions`.
    """

    term = "contrast"

    def __init__(
        self,
        *,
        loss: str = "softmax",
        first: str = "image_embeds",
        second: str = "text_embeds",
        pairs: str = "input_ids",
        gather: bool = True,
        label_smoothing: float = 0.0,
    ) -> None:
        self.sigmoid = loss == "sigmoid"
        self.first, self.second, self.pairs = first, second, pairs
        self.gather, self.label_smoothing = gather, label_smoothing

    @property
    def reads(self) -> frozenset[str]:
        bias = {"logit_bias"} if self.sigmoid else set()
        return frozenset({self.first, self.second, "logit_scale", *bias})

    def count(self, batch: Batch) -> Tensor:
        """Return the pairs: the rows of the batch field `pairs`."""
        field = batch.get(self.pairs)
        if not isinstance(field, Tensor) or not field.dim():
            raise RecipeError(
                f"contrastive: expected the batch field {self.pairs!r} as a tensor of one row "
                f"per pair, found the fields {', '.join(sorted(batch))}; set the objective's "
                "option pairs to one of them"
            )
        return torch.tensor(len(field), device=field.device)

    def loss(self, output: Output, batch: Batch) -> Tensor:
        first = F.normalize(output[self.first].float(), dim=-1)  # (B, D)
        second = F.normalize(output[self.second].float(), dim=-1)  # (B, D)
        scale = output["logit_scale"]
        counts = self._counts(first)
        # A rank without pairs takes part in the gathering, and its sum is 0.
        if self.sigmoid:
            return self._sigmoid(first, second, counts, scale, output["logit_bias"])
        return self._softmax(first, second, counts, scale)

    def _softmax(self, first: Tensor, second: Tensor, counts: list[int], scale: Tensor) -> Tensor:
        every_first, every_second = self._gathered(first, counts), self._gathered(second, counts)
        targets = torch.arange(len(first), device=first.device) + self._offset(
            counts
        )  # (B,) column of the partner
        smoothing = self.label_smoothing
        rows = F.cross_entropy(
            scale * first @ every_second.T, targets, label_smoothing=smoothing, reduction="sum"
        )
        columns = F.cross_entropy(
            scale * second @ every_first.T, targets, label_smoothing=smoothing, reduction="sum"
        )
        return (rows + columns) / 2

    def _sigmoid(
        self, first: Tensor, second: Tensor, counts: list[int], scale: Tensor, bias: Tensor
    ) -> Tensor:
        logits = scale * first @ self._gathered(second, counts).T + bias  # (B, pairs of all ranks)
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
