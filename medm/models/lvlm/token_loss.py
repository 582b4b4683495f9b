"""The loss over labeled tokens: the LM head runs on the labeled positions alone, in chunks.

The head is the largest matrix of a small LLM, and most positions of a conversation carry no label.
Every rank takes part even without a label, since the weights may be spread over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from medm.llms.lm_head import lm_logits
from medm.types import IGNORE_INDEX

if TYPE_CHECKING:
    from medm.llms.lm_head import CausalLM

HEAD_CHUNK = 4096
"""Labeled positions whose logits are in memory at a time; more of them are computed in chunks, and
again for gradients."""


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Cross-entropy over the labeled tokens of a batch."""

    sum: Tensor
    """A scalar; zero that depends on the LM head where no token is labeled."""
    count: int
    """Labeled tokens that have a token before them."""

    def mean(self, num_items: Tensor | int | None) -> Tensor:
        """Return the sum divided by `num_items`.

        Without it, by the labeled tokens of this batch.
        """
        if not self.count:
            return self.sum
        return self.sum / (self.count if num_items is None else num_items)


def loss_of_logits(logits: Tensor, labels: Tensor, positions: Tensor | None) -> TokenLoss:
    """Return the cross-entropy at the labeled positions of logits that exist at every position.

    Args:
        logits: (B, T, V).
        labels: (B, T), not shifted.
        positions: (L,), from which of the B * T positions a label is predicted; a GPU is waited for
            without it.
    """
    chosen, targets = _labeled(logits, labels, positions)  # (L, V), (L,)
    return TokenLoss(_cross_entropy(chosen, targets), len(targets))


def loss_of_hidden_states(
    hidden: Tensor, labels: Tensor, positions: Tensor | None, *, language_model: CausalLM
) -> TokenLoss:
    """Return the cross-entropy at the labeled positions of the decoder's output, (B, T, D).

    Args are those of `loss_of_logits`; besides them:
        language_model: owner of the LM head.
    """
    chosen, targets = _labeled(hidden, labels, positions)  # (L, D), (L,)

    def loss_of(hidden: Tensor, targets: Tensor) -> Tensor:
        return _cross_entropy(lm_logits(language_model, hidden), targets)

    # Under ZeRO-3 each rank has to call the head equally often, however many labels it has.
    if len(targets) <= HEAD_CHUNK or hasattr(
        language_model.get_output_embeddings().weight, "ds_id"
    ):
        total = loss_of(chosen, targets)
    else:
        chunks = zip(chosen.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
        total = sum(checkpoint(loss_of, *chunk, use_reentrant=False) for chunk in chunks)
    return TokenLoss(total, len(targets))


def _labeled(values: Tensor, labels: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the values (L, ...) from which labels are predicted, and the labels (L,).

    Without any label the values are those of the first position of each sample, so that the head
    has an input.
    """
    if positions is None:
        rows, columns = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        positions = rows * labels.shape[1] + columns
    targets = labels.flatten()[positions + 1]  # (L,)
    chosen = values.flatten(0, 1).index_select(0, positions) if len(targets) else values[:, 0]
    return chosen, targets


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum over (L, V) and (L,).

    If nothing is learned, it is a zero that depends on every logit.
    """
    if len(targets):
        return F.cross_entropy(logits.float(), targets, reduction="sum")
    return logits.sum() * 0.0
