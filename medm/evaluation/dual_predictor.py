"""A saved dual encoder as a source of predictions: vectors, and scores of texts."""

from __future__ import annotations

import json

from medm.errors import RecipeError
from medm.evaluation.model_predictor import SavedModelPredictor
from medm.evaluation.prediction_files import read_predictions
from medm.evaluation.predictors import Items, Predictions
from medm.files import atomic_write_text
from medm.inference.batch import Progress, infer
from medm.inference.options import EmbedOptions, RunOptions
from medm.types import JsonObject, Sample


class DualEncoderPredictor(SavedModelPredictor):
    """Vectors of files and captions, and the scores of the texts of classes. A run that was stopped
    resumes.
    """

    def check(self, items: Items) -> None:
        """Refuse labels without texts, and items of several files, too."""
        super().check(items)
        if items.labels:
            raise RecipeError(
                f"{items.task}: scores labels by name, and {self.source} scores texts of classes; "
                "choose zero-shot with a card of these labels"
            )
        if several := [sample for sample in items.scored if len(sample.media) > 1]:
            raise RecipeError(
                f"{items.task}: {len(several)} items have several files, the first is "
                f"{several[0].id!r}, and {self.source} takes one. Set images to first where the "
                "task has that option"
            )

    def predict(self, items: Items, *, progress: Progress | None = None) -> Predictions:
        records, output = items.folder / "items.jsonl", items.folder / "predictions.jsonl"
        lines = (json.dumps(_record(sample), ensure_ascii=False) for sample in items.scored)
        atomic_write_text(records, "\n".join(lines) + "\n")
        run = {name: getattr(self.options, name) for name in RunOptions.model_fields}
        wants_vectors = "embeddings" in items.needs
        summary = infer(
            EmbedOptions(
                model=self.source,
                data=str(records),
                root=str(items.root),
                output=str(output),
                captions=wants_vectors,
                vectors="files" if wants_vectors else "none",
                class_texts={
                    name: {one: list(texts) for one, texts in classes.items()}
                    for name, classes in items.class_texts.items()
                },
                **run,
            ),
            progress=progress,
        )
        if summary is None:  # not rank 0
            return {}
        return read_predictions(output, items.samples, limit=items.limit)


def _record(sample: Sample) -> JsonObject:
    """An item as a record of a pair: its file, its captions, and the set of its classes."""
    (media,) = sample.media
    record: JsonObject = {"id": sample.id, media.branch: media.path}
    if sample.extra.get("captions"):
        record["captions"] = list(sample.extra["captions"])
    if sample.extra.get("set") is not None:
        record["task"] = sample.extra["set"]
    return record
