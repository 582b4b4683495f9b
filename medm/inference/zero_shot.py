"""Probabilities of labels for single files, and maps of where a label is similar to the image."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from medm.errors import MedmError, RecipeError
from medm.imaging.preview import similarity_sheet
from medm.models.dual_encoder.embedder import Embedder


@dataclass(frozen=True, slots=True)
class Judgement:
    """Scores of one file."""

    file: str
    probabilities: dict[str, float]
    """By label, in the order of the labels; empty where there is an error."""
    maps: dict[str, Path]
    """By label the file of its similarity map, where those were asked for."""
    error: str | None = None
    """Why the file could not be read."""


def split_labels(text: str) -> list[str]:
    """Return the labels of `a; b`.

    Raises:
        RecipeError: there are fewer than two, or one twice.
    """
    labels = [part.strip() for part in text.split(";") if part.strip()]
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise RecipeError(
            f"--labels {text!r}: expected two or more different labels, separated by ';'"
        )
    return labels


def class_vectors(
    embedder: Embedder, labels: Sequence[str], templates: Sequence[str]
) -> torch.Tensor:
    """Return a vector (K, D) for each label: the ensemble of the templates.

    Raises:
        RecipeError: a template has no {}.
    """
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong:
        raise RecipeError(f"--template {wrong[0]!r}: expected one {{}} where the label stands")
    return embedder.ensembles(
        [[template.replace("{}", label) for template in templates] for label in labels]
    )


def judge(
    embedder: Embedder,
    files: Sequence[str],
    labels: Sequence[str],
    templates: Sequence[str] = ("{}",),
    *,
    heatmaps: Path | None = None,
) -> Iterator[Judgement]:
    """Yield the probabilities of the labels for each file, in order.

    Args:
        embedder: the model.
        files: images or volumes.
        labels: what is compared.
        templates: sentences with {}; several are an ensemble.
        heatmaps: folder for the similarity maps.

    Raises:
        RecipeError: a template is wrong, or the model has no vectors of patches.
    """
    texts = class_vectors(embedder, labels, templates)
    if heatmaps is not None:
        heatmaps.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(files):
        try:
            pixels = torch.from_numpy(embedder.processor.load_pixels(file))[None]
        except MedmError as error:
            yield Judgement(file, {}, {}, str(error))
            continue
        logits = embedder.logits(embedder.pixels(pixels), texts)
        found = dict(zip(labels, embedder.probabilities(logits)[0].tolist(), strict=True))
        maps = {}
        if heatmaps is not None:
            preprocess = embedder.processor.preprocess[embedder.branch]
            similarity = embedder.similarity_maps(pixels, texts)[0].numpy()
            for place, label in enumerate(labels):
                name = f"{number:03d}-{_slug(Path(file).stem)}-{place}-{_slug(label)}.png"
                sheet = similarity_sheet(Path(file), preprocess, similarity[place], label)
                sheet.save(heatmaps / name, "PNG")
                maps[label] = heatmaps / name
        yield Judgement(file, found, maps)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:40] or "x"
