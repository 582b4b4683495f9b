"""Several labels an item, each of them present, absent or unknown."""

from __future__ import annotations

from typing import Final

from torch import Tensor
from torch.nn import functional as F

from medm.errors import RecipeError
from medm.objectives.base import Objective, Output
from medm.types import Batch

TARGETS: Final = "label_targets"
"""Field of the batch: (B, L) float, 1 present, 0 absent, nan unknown."""


class Multilabel(Objective):
    """Binary cross-entropy of each known label, summed over items and labels.

    It is computed from the logits, in fp32: MOTOR takes the logarithm of a sigmoid of 100 times a
    cosine, which is exactly 0 or 1 in fp32 for most labels, so that they have no gradient.

    The output has `label_logits` (B, L); the batch has `label_targets`. A batch without a known
    label gives 0 with a graph to the model's output.
    """

    term = "labels"

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"label_logits"})

    def count(self, batch: Batch) -> Tensor:
        """Return the known labels of the batch."""
        return (~self._targets(batch).isnan()).sum()

    def loss(self, output: Output, batch: Batch) -> Tensor:
        logits, targets = output["label_logits"].float(), self._targets(batch).float()
        if logits.shape != targets.shape:
            raise RecipeError(
                f"multilabel: the model has logits of shape {tuple(logits.shape)}, and the batch "
                f"{TARGETS!r} of {tuple(targets.shape)}; expected one target for each logit"
            )
        losses = F.binary_cross_entropy_with_logits(
            logits, targets.nan_to_num(0.0), reduction="none"
        )
        return losses.masked_fill(targets.isnan(), 0.0).sum()

    def _targets(self, batch: Batch) -> Tensor:
        targets = batch.get(TARGETS)
        if not isinstance(targets, Tensor):
            raise RecipeError(
                f"multilabel: expected the batch field {TARGETS!r}, found the fields "
                f"{', '.join(sorted(batch))}; list the labels in model.labels, and give records "
                "with labels"
            )
        return targets
