"""Image-text matching with hard negatives, as ALBEF (arXiv 2107.07651) and BLIP train it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from medm.objectives.base import Objective, Output
from medm.objectives.image_text_contrast import pairs
from medm.types import IGNORE_INDEX, Batch


class ImageTextMatching(Objective):
    """Cross-entropy of two classes, no match and match, over three rows for each pair.

    The output has `itm_logits` (3B, 2) and `itm_labels` (3B,): the true pair, the text with a wrong
    image and the image with a wrong text. Where the batch of all ranks has no other pair to draw
    from, the label is `IGNORE_INDEX`: the row leaves the sum, and the count stays three a pair.
    """

    term = "itm"

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"itm_logits", "itm_labels"})

    def count(self, batch: Batch) -> Tensor:
        """Return three rows for each pair of the batch."""
        return 3 * pairs(batch, objective="itm")

    def loss(self, output: Output, batch: Batch) -> Tensor:
        return F.cross_entropy(
            output["itm_logits"].float(),
            output["itm_labels"],
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )
