"""Scores of the classes of labelled sets by the texts that describe them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from medm.types import Embedder


class ClassScores:
    """Scores of classes, set by set. The texts of all classes are encoded once, here.

    Args:
        embedder: the model.
        texts: by set and class the texts that describe the class.
    """

    def __init__(
        self, embedder: Embedder, texts: Mapping[str, Mapping[str, Sequence[str]]]
    ) -> None:
        self.embedder = embedder
        self._sets = {
            name: (list(classes), embedder.ensembles(list(classes.values())))
            for name, classes in texts.items()
        }

    def of(self, vector: Tensor, name: str) -> dict[str, float]:
        """Return the scores of the classes of a set for the vector (D,) of a file."""
        classes, vectors = self._sets[name]
        logits = self.embedder.logits(vector[None], vectors)[0]
        return dict(zip(classes, logits.tolist(), strict=True))
