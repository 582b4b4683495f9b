"""Replies of a language model to items of a benchmark while it is trained.

They are written by transformers' `generate`, in padded batches: it takes the model as the training
holds it, with adapters, under autocast and under ZeRO-3. `medm.inference` answers faster, from a
model of its own, and gives the same greedy replies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from medm.llms.lm_head import stop_tokens
from medm.types import AnswerItem, Example, JsonObject

if TYPE_CHECKING:
    import numpy as np

    from medm.models.lvlm.modeling import LVLMForConditionalGeneration
    from medm.models.lvlm.processing import LVLMProcessor


_GREEDY: dict[str, Any] = {
    "do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 50,
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0, "min_length": 0,
}  # fmt: skip
"""Settings in place of those that a published model brings, which `medm.inference` does not use."""


class ConversationAnswerer:
    """Greedy replies to batches of questions.

    Args:
        model: on its device, in eval mode.
        processor: of the model.
        max_new_tokens: longest reply in tokens.
    """

    max_files = None

    def __init__(
        self,
        model: LVLMForConditionalGeneration,
        processor: LVLMProcessor,
        *,
        max_new_tokens: int,
    ) -> None:
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self._stops = stop_tokens(model.generation_config)

    @torch.no_grad()
    def answer(self, items: Sequence[AnswerItem]) -> list[JsonObject]:
        """Return `reply`, `tokens` and `finished` of each item, in order.

        Under ZeRO-3 every rank calls it at the same time, with as many items or fewer.
        """
        inputs = self.processor.pad([encode_item(self.processor, item) for item in items])
        replies = self.model.generate(
            **inputs.to(self.model.device),
            **_GREEDY,
            use_cache=True,  # gradient checkpointing switches it off in the config
            max_new_tokens=self.max_new_tokens,
        )[:, inputs["input_ids"].shape[1] :]
        return [self._line(ids) for ids in replies.tolist()]

    def _line(self, ids: list[int]) -> JsonObject:
        """Return the fields of one reply, whose row is padded behind its end."""
        lengths = (length for length in range(1, len(ids) + 1) if self._ends(ids[:length]))
        length = next(lengths, None)
        kept = ids[:length]
        return {
            "reply": self.processor.text(kept),
            "tokens": len(kept),
            "finished": length is not None,
        }

    def _ends(self, ids: list[int]) -> bool:
        """Return whether a reply ends with the last of these tokens."""
        sequence = self.model.config.end_sequence
        return ids[-1] in self._stops or (bool(sequence) and ids[-len(sequence) :] == sequence)


def encode_item(processor: LVLMProcessor, item: AnswerItem) -> Example:
    """Return the prompt of an item, up to where the reply begins.

    Raises:
        DataError: the model does not read the item, see `LVLMProcessor.encode`.
    """
    pixels: dict[str, list[np.ndarray]] = {}
    for media, array in zip(item.sample.media, item.pixels, strict=True):
        pixels.setdefault(media.branch, []).append(array)
    return processor.encode(item.sample, pixels, generation=True)
