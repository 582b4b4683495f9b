"""Objectives: a model and a batch in, named losses out. The table at the end has one line a member.

An objective knows nothing of optimisers, ranks beside its own gathering, or logging. Adding one is a new
file with an `Objective` and a line here; options of its own stand above the table, torch-free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from medm.config import Options
from medm.registry import Registry

if TYPE_CHECKING:
    from medm.objectives.base import Objective


class ObjectiveOptions(Options):
    """What every objective block of a recipe may say."""

    name: str
    """Registered name of the objective."""

    def reads(self) -> frozenset[str]:
        """Fields of the model's output that it cannot do without."""
        return frozenset()


class LanguageModelingOptions(ObjectiveOptions):
    """Next-token prediction."""

    auxiliary: dict[str, float] = {}
    """Weight of each auxiliary loss that the model reports by name (`image.connector` router balance ...). A loss
    that is not named here counts once (weight 1); weight 0 switches it off."""

    def reads(self) -> frozenset[str]:
        return frozenset({"loss"})


class ContrastiveOptions(ObjectiveOptions):
    """Two views of the same item are pulled together, all other pairs of the global batch pushed apart."""

    loss: Literal["softmax", "sigmoid"] = "softmax"
    """`softmax`: symmetric InfoNCE (CLIP, arXiv 2103.00020); `sigmoid`: every pair by itself (SigLIP, 2303.15343)."""
    first: str = "image_embeds"
    """Field of the model's output that holds one view, (B, D)."""
    second: str = "text_embeds"
    """Field that holds the other view, (B, D)."""
    gather: bool = True
    """Compare with the pairs of all processes; without it each process sees its own batch alone."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target that is spread over all pairs (`softmax` alone)."""

    def reads(self) -> frozenset[str]:
        bias = {"logit_bias"} if self.loss == "sigmoid" else set()
        return frozenset({self.first, self.second, "logit_scale", *bias})


OBJECTIVES: Registry[type[Objective]] = Registry("objective", group="medm.objectives", options=ObjectiveOptions)

OBJECTIVES.add(
    "language-modeling",
    "medm.objectives.language_modeling:LanguageModeling",
    "next-token loss over the labelled tokens, and the model's auxiliary losses",
    options=LanguageModelingOptions,
)
OBJECTIVES.add(
    "contrastive",
    "medm.objectives.contrastive:Contrastive",
    "image-text contrast over the global batch (CLIP or SigLIP loss)",
    options=ContrastiveOptions,
)
