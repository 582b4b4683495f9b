"""Next-token prediction. The model gives the sum of the token loss."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from medm.objectives.base import Objective, Output
from medm.types import IGNORE_INDEX, Batch


class LanguageModeling(Objective):
    """Cross-entropy over the labeled tokens, with the auxiliary losses that the model reports.

    Args:
        auxiliary: see `LanguageModelingOptions`.
    """

    term = "language"

    def __init__(self, *, auxiliary: Mapping[str, float] | None = None) -> None:
        self.auxiliary = dict(auxiliary or {})

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"loss_sum"})

    def count(self, batch: Batch) -> Tensor:
        """Return the labeled tokens that have a token before them to be predicted from."""
        labels: Tensor = batch["labels"]  # (B, T)
        return (labels[:, 1:] != IGNORE_INDEX).sum()

    def loss(self, output: Output, batch: Batch) -> Tensor:
        return output["loss_sum"]

    def loss_of_rows(self, model: nn.Module, batch: Batch, rows: Tensor) -> Tensor | None:
        """Return the mean cross-entropy over the labeled tokens of these rows."""
        chosen = {**batch, "labels": batch["labels"].masked_fill(~rows[:, None], IGNORE_INDEX)}
        chosen.pop("label_positions", None)  # of all rows
        count = self.count(chosen)
        return model(**chosen)["loss_sum"] / count if bool(count) else None
