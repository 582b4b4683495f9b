"""Zero-shot classification on the page: probabilities of labels and maps of similarity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from medm.errors import RecipeError
from medm.imaging.preview import similarity_sheet
from medm.inference.zero_shot import class_vectors
from medm.serving.errors import ServingError
from medm.serving.files import StoredFile
from medm.serving.worker import Worker


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
    pixels = torch.from_numpy(np.stack([worker.pixels(file.kind, file.path)]))
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
        path = Path(file.path)
        for place, label in enumerate(labels):
            maps[label] = similarity_sheet(path, preprocess, similarity[place], label)
    return Scores(dict(zip(labels, found, strict=True)), maps, note)
