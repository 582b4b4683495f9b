"""Zero-shot classification on the page: probabilities of labels and maps of similarity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from medm.errors import RecipeError
from medm.imaging.options import ImagePreprocess
from medm.imaging.preview import similarity_sheet_of_pixels
from medm.imaging.tiles import whole_image
from medm.inference.zero_shot import class_vectors
from medm.serving.errors import ServingError
from medm.serving.files import StoredFile
from medm.serving.worker import Worker

_MAX_LABELS = 32
"""Each of them is encoded, and has a map."""
_MAX_LENGTH = 500
"""Characters of a label."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one file by one model."""

    probabilities: dict[str, float]
    """By label, in the order of the labels."""
    maps: dict[str, Image.Image]
    """By label a sheet with the similarity of each patch; empty where the model has none."""
    note: str = ""
    """Why there are no maps."""


def read_labels(text: str) -> list[str]:
    """Return labels, one of each line. Raises `ServingError`."""
    labels = [line.strip() for line in text.splitlines() if line.strip()]
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise ServingError("invalid_value", "expected two or more different labels, one a line")
    if len(labels) > _MAX_LABELS or any(len(label) > _MAX_LENGTH for label in labels):
        raise ServingError(
            "invalid_value",
            f"expected at most {_MAX_LABELS} labels of at most {_MAX_LENGTH} characters each",
        )
    return labels


def score(worker: Worker, file: StoredFile, labels: Sequence[str], template: str) -> Scores:
    """Return the scores of an upload.

    Args:
        worker: of a dual encoder.
        file: image or volume; it is decoded in a limited process.
        labels: two or more.
        template: sentence with one {} where the label stands.

    Raises:
        ServingError: the file or the template cannot be used.
    """
    worker.require_ready("dual-encoder")
    decoded = worker.pixels(file.kind, file.path)
    pixels = torch.from_numpy(np.stack([decoded]))
    embedder = worker.embedder
    assert embedder is not None

    def run() -> tuple[list[float], np.ndarray | None, str]:
        texts = class_vectors(embedder, labels, [template])
        found = embedder.probabilities(embedder.logits(embedder.pixels(pixels), texts))[0].tolist()
        try:
            return found, embedder.similarity_maps(pixels, texts)[0].numpy(), ""
        except RecipeError as error:
            return found, None, f"No heat map: {error}"

    try:
        found, similarity, note = worker.call(run).result()
    except RecipeError as error:
        raise ServingError("invalid_value", str(error).removeprefix("--")) from None
    maps: dict[str, Image.Image] = {}
    if similarity is not None:
        preprocess = embedder.processor.preprocess[embedder.branch]
        if isinstance(preprocess, ImagePreprocess) and preprocess.tiles is not None:
            preprocess = whole_image(preprocess, file.form.shape)
            decoded = worker.decoders.pixels(file.path, preprocess)
        for place, label in enumerate(labels):
            maps[label] = similarity_sheet_of_pixels(
                decoded, preprocess, similarity[place], label, axes=file.form.axes
            )
    return Scores(dict(zip(labels, found, strict=True)), maps, note)
