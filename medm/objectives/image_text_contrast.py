"""Image-text contrast against soft targets, as ALBEF (arXiv 2107.07651) and BLIP train it."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from medm.errors import RecipeError
from medm.objectives.base import Objective, Output
from medm.types import Batch

PAIRS: Final = "input_ids"
"""Field of the batch with one row a pair."""


def pairs(batch: Batch, *, objective: str) -> Tensor:
    """Return the number of pairs of a batch, an int64 scalar.

    Args:
        batch: with one row a pair in `input_ids`.
        objective: name for messages.

    Raises:
        RecipeError: the batch has no such field.
    """
    field = batch.get(PAIRS)
    if not isinstance(field, Tensor):
        raise RecipeError(
            f"{objective}: expected the batch field {PAIRS!r} with one row a pair, found the "
            f"fields {', '.join(sorted(batch))}; use records with reports"
        )
    return torch.tensor(len(field), device=field.device)


class ImageTextContrast(Objective):
    """Cross-entropy of an image's scores against soft targets, and of a text's; their mean.

    The output has `itc_logits_image` and `itc_logits_text` (B, candidates), of this rank's images
    and texts against texts and images of all ranks and of the queue, and `itc_targets_image` and
    `itc_targets_text` of the same shapes, whose rows are probabilities. Arithmetic is in fp32.
    """

    term = "itc"

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(
            {
                "itc_logits_image",
                "itc_logits_text",
                "itc_targets_image",
                "itc_targets_text",
            }
        )

    def count(self, batch: Batch) -> Tensor:
        """Return the pairs of the batch."""
        return pairs(batch, objective="itc")

    def loss(self, output: Output, batch: Batch) -> Tensor:
        image, text = (
            F.cross_entropy(
                output[f"itc_logits_{side}"].float(),
                output[f"itc_targets_{side}"].float(),
                reduction="sum",
            )
            for side in ("image", "text")
        )
        return (image + text) / 2
