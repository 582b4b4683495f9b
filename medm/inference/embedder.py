"""A saved dual encoder over batches of records: vectors of files and captions, scores of classes.

Knows nothing of annotation files, output files or processes; `medm.inference.batch` runs it over
many records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from medm.inference.loading import load_model
from medm.inference.options import EmbedOptions
from medm.models.class_scores import ClassScores
from medm.types import BaseSample, JsonObject

if TYPE_CHECKING:
    from medm.models.dual_encoder.embedder import Embedder


def load_embedder(
    folder: str, *, device: torch.device, dtype: str = "saved", batch_size: int = 32
) -> Embedder:
    """The dual encoder of a folder on a device.

    Raises:
        CheckpointError: see `medm.models.load`; or the model is no dual encoder, which is known
            before weights are read.
    """
    from medm.models.dual_encoder.embedder import Embedder
    from medm.models.dual_encoder.modeling import DualEncoder
    from medm.models.dual_encoder.processing import DualEncoderProcessor

    model, processor = load_model(
        folder,
        DualEncoder,
        refusal="gives no vectors; expected a model of kind dual-encoder",
        device=device,
        dtype=dtype,
    )
    assert isinstance(processor, DualEncoderProcessor)
    return Embedder(model, processor, batch_size=batch_size)


@dataclass(slots=True)
class FileBatch:
    """Files of several records."""

    pixels: dict[str, Tensor]
    """By branch (N, C, *spatial)."""
    captions: list[tuple[str, ...]]
    """Of each record, all of them."""
    sets: list[str]
    """Of each record the set of class texts that it is scored with."""


def make_files(examples: Sequence[Any], samples: Sequence[BaseSample]) -> FileBatch:
    """Return the files of examples of pairs as one batch."""
    (branch,) = examples[0].pixels
    arrays = [example.pixels[branch][0] for example in examples]
    return FileBatch(
        pixels={branch: torch.from_numpy(np.stack(arrays).astype(np.float32, copy=False))},
        captions=[tuple(getattr(sample, "captions", ())) for sample in samples],
        sets=[sample.task or "" for sample in samples],
    )


@dataclass(frozen=True, slots=True)
class Embedding:
    """Vectors and scores of one record."""

    vector: list[float] | None = None
    """Of the file, of length 1."""
    text_vectors: list[list[float]] | None = None
    """Of the captions."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """By class."""

    def line(self) -> JsonObject:
        """Return its fields of the output line."""
        line: JsonObject = {}
        if self.scores:
            line |= {"scores": dict(self.scores)}
        if self.vector is not None:
            line |= {"embedding": self.vector}
        if self.text_vectors is not None:
            line |= {"text_embeddings": self.text_vectors}
        return line


class EmbeddingEngine:
    """Vectors and scores of batches of files.

    Args:
        embedder: the model.
        options: what is asked for.
    """

    def __init__(self, embedder: Embedder, options: EmbedOptions) -> None:
        self.embedder, self.options = embedder, options
        self._scores = ClassScores(embedder, options.class_texts) if options.class_texts else None

    def generate(self, batch: FileBatch) -> list[Embedding]:
        """Return what is asked for of each file, in order."""
        (pixels,) = batch.pixels.values()
        vectors = self.embedder.pixels(pixels)
        captions: list[list[list[float]] | None] = [None] * len(vectors)
        if self.options.captions:
            flat = [text for texts in batch.captions for text in texts]
            rows = iter(self.embedder.texts(flat).tolist() if flat else [])
            captions = [[next(rows) for _ in texts] for texts in batch.captions]
        listed = vectors.tolist() if self.options.vectors == "files" else [None] * len(vectors)
        return [
            Embedding(
                listed[row],
                captions[row],
                self._scores.of(vectors[row], batch.sets[row]) if self._scores else {},
            )
            for row in range(len(vectors))
        ]
