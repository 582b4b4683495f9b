"""Next-token prediction. The model computes the token loss; auxiliary losses are added by name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from medm.objectives.base import Losses, Objective
from medm.types import IGNORE_INDEX, Batch


class LanguageModeling(Objective):
    """Mean cross-entropy over the labelled tokens of the step, plus weighted auxiliary losses.

    Args:
        auxiliary: see `LanguageModelingOptions`.
    """

    def __init__(self, *, auxiliary: Mapping[str, float] | None = None) -> None:
        self.auxiliary = dict(auxiliary or {})

    def num_items(self, batch: Batch) -> Tensor:
        """Labelled tokens that have a token before them to be predicted from."""
        labels: Tensor = batch["labels"]  # (B, T)
        return (labels[:, 1:] != IGNORE_INDEX).sum()

    def loss_of_rows(self, model: nn.Module, batch: Batch, rows: Tensor) -> Tensor | None:
        """Mean cross-entropy over the labelled tokens of these rows; the others are run, and teach nothing."""
        chosen = {**batch, "labels": batch["labels"].masked_fill(~rows[:, None], IGNORE_INDEX)}
        chosen.pop("label_positions", None)  # of all rows
        return model(**chosen).loss if bool(self.num_items(chosen)) else None

    def __call__(self, model: nn.Module, batch: Batch, num_items_in_batch: Tensor | int | None = None) -> Losses:
        output = model(**batch, num_items_in_batch=num_items_in_batch)
        total, parts = output.loss, {}
        for name, value in (getattr(output, "losses", None) or {}).items():
            weight = self.auxiliary.get(name, 1.0)
            term = weight * self.share(batch, num_items_in_batch) * value
            total = total + term
            parts[name] = term.detach()
        return Losses(total, {"language": output.loss.detach(), **parts} if parts else {})
