"""Stop of transformers' `generate` at a sequence of tokens, where no single token ends a reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class EndSequence(StoppingCriteria):
    """Ends a row whose last tokens are a given sequence.

    Args:
        sequence: token ids, at least one.
    """

    def __init__(self, sequence: Sequence[int]) -> None:
        self.sequence = list(sequence)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return (B,) bool for token ids (B, T)."""
        count = len(self.sequence)
        if input_ids.shape[1] < count:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        wanted = torch.tensor(self.sequence, device=input_ids.device)
        return (input_ids[:, -count:] == wanted).all(dim=1)
