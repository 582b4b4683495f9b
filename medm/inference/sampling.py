"""Sampling of the next token of one request.

A request draws from its own generator, so its reply does not depend on the requests that are
decoded with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings under which the tokens of one request are drawn."""

    temperature: float
    """Above 0; the lower, the closer to greedy decoding."""
    top_k: int = 0
    """Draw only from this many of the most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Draw only from the most probable tokens that together have this probability."""
    seed: int = 0
    """Seed of the request's own generator."""

    def warpers(self) -> LogitsProcessorList:
        """Return the processors of transformers for these settings, in the order of `generate`."""
        warpers = LogitsProcessorList([TemperatureLogitsWarper(float(self.temperature))])
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers


class Sampler:
    """Draws the tokens of one request.

    Args:
        sampling: its settings.
        device: of the logits.
    """

    def __init__(self, sampling: Sampling, *, device: torch.device) -> None:
        self._warpers = sampling.warpers()
        self._generator = torch.Generator(device).manual_seed(sampling.seed)
        self._before: Tensor | None = None

    def draw(self, logits: Tensor) -> Tensor:
        """Return a token, (1,), for the logits of one row, (1, V)."""
        self._before = self._generator.get_state()
        no_ids = cast(
            torch.LongTensor, torch.empty(1, 0, dtype=torch.long)
        )  # none of these processors reads them
        warped = self._warpers(no_ids, cast(torch.FloatTensor, logits.float()))
        return torch.multinomial(warped.softmax(dim=-1), 1, generator=self._generator)[0]

    def keep(self) -> None:
        """Keep the token that was drawn last."""
        self._before = None

    def undo(self) -> None:
        """Take back the last draw if it was not kept: the next one draws the same."""
        if self._before is not None:
            self._generator.set_state(self._before)
            self._before = None
