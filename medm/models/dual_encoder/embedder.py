"""Vectors of images, volumes and texts by a dual encoder, and what is made of them: scores of
classes and similarity maps. Knows nothing of files of records, processes or training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from medm.errors import DataError
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
        with torch.no_grad():
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

    @torch.no_grad()
    def pixels(self, pixels: Tensor) -> Tensor:
        """Return vectors (N, D) of preprocessed pixels (N, C, *spatial), as `images`."""
        chunks = pixels.split(self.batch_size)
        return torch.cat(
            [_unit(self.model.get_image_features(self._placed(chunk))) for chunk in chunks]
        )

    @torch.no_grad()
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

    @torch.no_grad()
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
