"""Keys of the `model` section that every kind of model has beside its options. Torch-free."""

from __future__ import annotations

from typing import ClassVar

from medm.config import Options
from medm.types import PredictionField


class ModelOptions(Options):
    """The `model` section of a recipe."""

    kind: str
    """Registered name of the kind of model."""

    def part_names(self) -> frozenset[str] | None:
        """Names of the parts that the `parts` section may train; None where a kind does not say."""
        return None

    def output_fields(self) -> frozenset[str] | None:
        """Fields of the output of the model that this section describes; by default `outputs`."""
        return self.outputs

    def untaught_parts(self, read: frozenset[str]) -> dict[str, str]:
        """Parts that no objective teaches, and why.

        Args:
            read: fields of the model's output that the objectives read.
        """
        return {}

    def missing_fields_advice(self, missing: frozenset[str]) -> str:
        """Say how this section gives fields of the output that it lacks; "" where it cannot."""
        return ""

    def predicted_fields(self) -> frozenset[PredictionField]:
        """Fields of predictions that the kind gives during the training (`ModelKind.answerer`)."""
        return frozenset()

    longest_reply: ClassVar[int | None] = None
    """Longest reply in tokens during the training where a monitor sets none; None for kinds whose
    replies a monitor cannot bound."""

    scores_texts: ClassVar[bool] = False
    """True if the kind defines `ModelKind.embedder`: its models score texts for an image."""

    outputs: ClassVar[frozenset[str] | None] = None
    """`ModelKind.outputs` of the kind, so that a recipe is checked without importing it; None asks
    the kind."""
