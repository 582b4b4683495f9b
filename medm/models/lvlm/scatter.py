"""Vision tokens at the places of their placeholders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scatter(
    embeds: Tensor, input_ids: Tensor, tokens: Tensor, *, placeholder_id: int, branch: str = ""
) -> Tensor:
    """Put vision tokens where the placeholders are.

    Args:
        embeds: (B, T, D).
        input_ids: (B, T).
        tokens: (N, M, D), in the order of the placeholders.
        placeholder_id: the token to replace.
        branch: name, for the message.

    Returns:
        (B, T, D), a new tensor.

    Raises:
        ValueError: the counts differ. Going on would give one sample the image of another.
    """
    places = input_ids == placeholder_id  # (B, T)
    given = tokens.shape[0] * tokens.shape[1]
    check(
        places.sum() == given,
        lambda: (
            f"branch '{branch}': {int(places.sum())} placeholder tokens in the text, but "
            f"{tokens.shape[0]} items of {tokens.shape[1]} tokens = {given}; the processor and "
            "the model do not belong together"
        ),
    )
    # Of a size that is known beforehand, so that a GPU is not waited for; the gradients of a masked
    # scatter are.
    positions = places.flatten().nonzero_static(size=given).squeeze(1)  # (N * M,)
    filled = embeds.flatten(0, 1).index_copy(0, positions, tokens.flatten(0, 1).to(embeds.dtype))
    return filled.view_as(embeds)


def check(condition: Tensor, message: Any) -> None:
    """Raise `ValueError` when a tensor condition is false.

    On an accelerator it does not wait for the condition.
    """
    if condition.device.type == "cpu":
        if not bool(condition):
            raise ValueError(message())
    else:
        torch._assert_async(condition)
