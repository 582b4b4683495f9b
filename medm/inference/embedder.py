"""Vectors of images, volumes and texts by a saved dual encoder, and what is made of them: scores of
classes and similarity maps.

Knows nothing of annotation files, output files or processes; `medm.inference.batch` runs it over
many records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from medm.errors import CheckpointError, DataError
from medm.inference.options import EmbedOptions
from medm.types import BaseSample, JsonObject

if TYPE_CHECKING:
    from medm.models.dual_encoder.modeling import DualEncoder
    from medm.models.dual_encoder.processing import DualEncoderProcessor


class Embedder:
    """A dual encoder that is ready.

    Args:
        model: on its device.
        processor: of the model.
        batch_size: images or texts that are encoded at once.
    """

    def __init__(
        self, model: DualEncoder, processor: DualEncoderProcessor, *, batch_size: int = 32
    ) -> None:
        self.model, self.processor, self.batch_size = model, processor, batch_size
        (self.branch,) = processor.preprocess
        with torch.inference_mode():
            scale, bias = model.scale()
        self.scale = float(scale)
        """Factor of a cosine in a score."""
        self.bias = None if bias is None else float(bias)
        """Summand of a score; a model that has one judges each text by itself (SigLIP)."""

    def images(self, items: Sequence[object]) -> Tensor:
        """Return vectors (N, D) of length 1, in float32 on the CPU.

        Args:
            items: paths, images of Pillow or arrays, as `DualEncoderProcessor` takes them.

        Raises:
            DataError: one cannot be read.
        """
        arrays = [self.processor.load_pixels(item) for item in items]
        return self.pixels(torch.from_numpy(np.stack(arrays)))

    @torch.inference_mode()
    def pixels(self, pixels: Tensor) -> Tensor:
        """Return vectors (N, D) of preprocessed pixels (N, C, *spatial), as `images`."""
        chunks = pixels.split(self.batch_size)
        return torch.cat(
            [_unit(self.model.get_image_features(self._placed(chunk))) for chunk in chunks]
        )

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return vectors (N, D) of length 1 of texts, in float32 on the CPU."""
        rows = []
        for start in range(0, len(texts), self.batch_size):
            encoded = self.processor.encode_text(texts[start : start + self.batch_size])
            ids, mask = (encoded[name].to(self.model.device) for name in _TEXT_INPUTS)
            rows.append(_unit(self.model.get_text_features(ids, mask)))
        if not rows:
            raise DataError("expected one or more texts, found none")
        return torch.cat(rows)

    def ensembles(self, classes: Sequence[Sequence[str]]) -> Tensor:
        """Return one vector (K, D) of length 1 for each class: the mean of the vectors of its
        texts, each of length 1 before.
        """
        flat = list(dict.fromkeys(text for texts in classes for text in texts))
        vectors = dict(zip(flat, self.texts(flat), strict=True))
        return torch.stack(
            [
                normalize(torch.stack([vectors[text] for text in texts]).mean(dim=0), dim=0)
                for texts in classes
            ]
        )

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return the scores (N, K) of vectors (N, D) and (K, D)."""
        return self.scale * images @ texts.T + (self.bias or 0.0)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return probabilities (N, K): over the texts together, or of each text by itself where the
        model has a bias.
        """
        return logits.softmax(dim=-1) if self.bias is None else logits.sigmoid()

    @torch.inference_mode()
    def similarity_maps(self, pixels: Tensor, texts: Tensor) -> Tensor:
        """Return the cosine of each text with each cell of the token grid, (N, K, *grid).

        The vector of a cell is what norm and projection make of its token alone. Nothing trains it
        to match a text: in models with a class token only that token is trained so.

        Args:
            pixels: (N, C, *spatial).
            texts: (K, D), of length 1.

        Raises:
            RecipeError: the image vector of the model is not made of tokens.
        """
        maps = []
        for chunk in pixels.split(self.batch_size):
            cells, grid = self.model.get_patch_features(self._placed(chunk))
            maps.append((texts @ _unit(cells).transpose(1, 2)).unflatten(2, grid))
        return torch.cat(maps)

    def _placed(self, pixels: Tensor) -> Tensor:
        return pixels.to(**self.model.image.encoder.device_and_dtype)


_TEXT_INPUTS = ("input_ids", "attention_mask")


def _unit(vectors: Tensor) -> Tensor:
    return normalize(vectors.float(), dim=-1).cpu()


def load_embedder(
    folder: str, *, device: torch.device, dtype: str = "saved", batch_size: int = 32
) -> Embedder:
    """The dual encoder of a folder on a device.

    Raises:
        CheckpointError: see `medm.models.load`; or the model is no dual encoder, which is known
            before weights are read.
    """
    from medm.models import kind_of_config, load, load_config
    from medm.models.dual_encoder.modeling import DualEncoder
    from medm.models.dual_encoder.processing import DualEncoderProcessor

    model_class = kind_of_config(load_config(folder)).model_class
    if not issubclass(model_class, DualEncoder):
        raise CheckpointError(
            f"{folder}: holds a {model_class.__name__}, which gives no vectors; expected a model "
            "of kind dual-encoder"
        )
    model, processor = load(folder)
    assert isinstance(model, DualEncoder)
    assert isinstance(processor, DualEncoderProcessor)
    model.merge_adapters()
    nn.Module.to(model, device=device, dtype=None if dtype == "saved" else getattr(torch, dtype))
    model.requires_grad_(False)
    model.eval()
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
    """What a dual encoder gives for one record."""

    vector: list[float] | None = None
    """Of the file, of length 1."""
    text_vectors: list[list[float]] | None = None
    """Of the captions."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """By class."""

    def line(self) -> JsonObject:
        """Return what an output file says of it."""
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
        self._classes = {
            name: (list(texts), embedder.ensembles(list(texts.values())))
            for name, texts in options.class_texts.items()
        }

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
            Embedding(listed[row], captions[row], self._scores(vectors[row], batch.sets[row]))
            for row in range(len(vectors))
        ]

    def _scores(self, vector: Tensor, name: str) -> dict[str, float]:
        if not self._classes:
            return {}
        names, texts = self._classes[name]
        logits = self.embedder.logits(vector[None], texts)[0]
        return dict(zip(names, logits.tolist(), strict=True))
