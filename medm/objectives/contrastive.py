"""Contrast of two views over the global batch: softmax (CLIP) or sigmoid (SigLIP)."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from medm.distributed import all_gather, rank, row_counts
from medm.errors import RecipeError
from medm.objectives import SameLabel
from medm.objectives.base import Objective, Output
from medm.types import Batch

LABELS: Final = "pair_labels"
"""Field of the batch that holds a label a pair: equal where pairs have the same caption or label,
over all ranks."""


class Contrastive(Objective):
    """Contrastive loss of each rank's rows against the pairs of all ranks.

    The logits are (B, pairs of all ranks).

    Ranks may hold different numbers of pairs. The model's output has the two views under the names
    `first` and `second`, (B, D) each, a `logit_scale` (a factor, not its logarithm) and, for the
    sigmoid loss, a `logit_bias`. Views are normalized here.

    The loss is a sum over pairs, whatever `same_label` says: a pair with several positives counts
    once (softmax: the mean of their cross-entropies, as `L_out` of arXiv 2004.11362), and logits
    that are ignored leave the sum without changing the count.

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
        same_label: SameLabel = "negative",
    ) -> None:
        self.sigmoid = loss == "sigmoid"
        self.first, self.second, self.pairs = first, second, pairs
        self.same_label = same_label
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
        if self.same_label != "negative":
            self._labels(batch, len(field))
        return torch.tensor(len(field), device=field.device)

    def loss(self, output: Output, batch: Batch) -> Tensor:
        first = F.normalize(output[self.first].float(), dim=-1)  # (B, D)
        second = F.normalize(output[self.second].float(), dim=-1)  # (B, D)
        scale = output["logit_scale"]
        counts = self._counts(first)
        same = self._same(batch, counts, len(first))
        # A rank without pairs takes part in the gathering, and its sum is 0.
        if self.sigmoid:
            return self._sigmoid(first, second, counts, same, scale, output["logit_bias"])
        return self._softmax(first, second, counts, same, scale)

    def _softmax(
        self, first: Tensor, second: Tensor, counts: list[int], same: Tensor | None, scale: Tensor
    ) -> Tensor:
        every_first, every_second = self._gathered(first, counts), self._gathered(second, counts)
        partners = torch.arange(len(first), device=first.device) + self._offset(counts)  # (B,)
        rows = self._cross_entropy(scale * first @ every_second.T, partners, same)
        columns = self._cross_entropy(scale * second @ every_first.T, partners, same)
        return (rows + columns) / 2

    def _cross_entropy(self, logits: Tensor, partners: Tensor, same: Tensor | None) -> Tensor:
        """Return the sum over rows.

        Args:
            logits: (B, pairs of all ranks).
            partners: (B,) column of each row's partner.
            same: (B, pairs of all ranks) other pairs of the row's label; None without any.
        """
        smoothing = self.label_smoothing
        if same is None:
            return F.cross_entropy(logits, partners, label_smoothing=smoothing, reduction="sum")
        partner = F.one_hot(partners, logits.shape[1])
        if self.same_label == "positive":
            positives = (partner.bool() | same).to(logits.dtype)
            targets = positives / positives.sum(dim=1, keepdim=True)
            return F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
        # Columns without probability take no part in smoothing either: 0 times minus infinity.
        compared = ~same
        targets = (1 - smoothing) * partner + smoothing * compared / compared.sum(1, keepdim=True)
        logs = logits.masked_fill(same, -torch.inf).log_softmax(dim=1)
        return -(targets * logs.masked_fill(same, 0.0)).sum()

    def _sigmoid(
        self,
        first: Tensor,
        second: Tensor,
        counts: list[int],
        same: Tensor | None,
        scale: Tensor,
        bias: Tensor,
    ) -> Tensor:
        logits = scale * first @ self._gathered(second, counts).T + bias  # (B, pairs of all ranks)
        signs = -torch.ones_like(logits)
        rows = torch.arange(len(first), device=first.device)
        signs[rows, rows + self._offset(counts)] = 1.0
        if same is None:
            return -F.logsigmoid(signs * logits).sum()
        if self.same_label == "positive":
            return -F.logsigmoid(signs.masked_fill(same, 1.0) * logits).sum()
        return -F.logsigmoid(signs * logits).masked_fill(same, 0.0).sum()

    def _labels(self, batch: Batch, rows: int) -> Tensor:
        """Return the labels of the batch's pairs, (B,) int64. Raises `RecipeError`."""
        labels = batch.get(LABELS)
        if not isinstance(labels, Tensor):
            raise RecipeError(
                f"contrastive: same_label {self.same_label} reads the batch field {LABELS!r}, "
                f"found the fields {', '.join(sorted(batch))}; use a pipeline that gives it "
                "(pairs), or set same_label: negative"
            )
        if labels.shape != (rows,) or labels.is_floating_point():
            raise RecipeError(
                f"contrastive: expected {LABELS!r} to hold one integer for each of {rows} pairs, "
                f"found {labels.dtype} of shape {tuple(labels.shape)}"
            )
        return labels

    def _same(self, batch: Batch, counts: list[int], rows: int) -> Tensor | None:
        """Return which other pairs have a row's label, (B, pairs of all ranks) bool; None where
        that makes no difference.
        """
        if self.same_label == "negative":
            return None
        labels = self._labels(batch, rows)
        every = self._gathered(labels.unsqueeze(1), counts).squeeze(1)  # (pairs of all ranks,)
        same = labels.unsqueeze(1) == every
        own = torch.arange(rows, device=labels.device)
        same[own, own + self._offset(counts)] = False
        return same

    def _counts(self, view: Tensor) -> list[int]:
        """Return the rows of every rank that is compared with."""
        return row_counts(view) if self.gather else [len(view)]

    def _gathered(self, view: Tensor, counts: list[int]) -> Tensor:
        """Return the rows of every rank that is compared with, (sum of counts, D)."""
        return all_gather(view, counts) if self.gather else view

    def _offset(self, counts: list[int]) -> int:
        return sum(counts[: rank()]) if self.gather else 0
