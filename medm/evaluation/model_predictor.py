"""A saved model of medm as a source of predictions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from medm.data.regions import REGION_FIELD
from medm.data.writing import record_of
from medm.errors import CheckpointError, DataError, MediaError, RecipeError
from medm.evaluation.options import EvalOptions
from medm.evaluation.prediction_files import read_predictions
from medm.evaluation.predictors import PREDICTORS, Items, Predictions, Predictor
from medm.files import atomic_write_text
from medm.imaging import Preprocess, resolve_inside
from medm.inference.batch import Progress, infer
from medm.inference.generator import pick_device
from medm.inference.options import InferenceOptions, InferOptions
from medm.inference.predictions import model_fingerprint
from medm.models import kind_of_config, load_config, load_processor
from medm.types import JsonObject, PredictionField


def open_model(folder: str, options: EvalOptions) -> Predictor:
    """Return the source that the kind of a saved model names, by the folder's config alone.

    Raises:
        CheckpointError: there is no model that medm saved.
    """
    path = Path(folder).expanduser()
    for name in ("config.json", "processor_config.json"):
        if not (path / name).is_file():
            found = f"no {name} in it" if path.is_dir() else "no such model folder"
            raise CheckpointError(f"{folder}: {found}; expected a model folder that medm saved")
    kind = kind_of_config(load_config(folder))
    return PREDICTORS.get(kind.predictor)(folder, options)


class SavedModelPredictor(Predictor):
    """A model folder that medm saved."""

    def __init__(self, source: str, options: EvalOptions) -> None:
        super().__init__(source, options)
        config = load_config(source)
        self._gives = kind_of_config(config).gives(config)

    @property
    def gives(self) -> frozenset[PredictionField]:
        return self._gives

    def check(self, items: Items) -> None:
        """Refuse a question whose image or volume is missing: it could only count as wrong."""
        missing: dict[str, str] = {}
        files = dict.fromkeys(media.path or "" for sample in items.scored for media in sample.media)
        for path in files:
            try:
                resolve_inside(items.root, path)
            except MediaError as error:
                missing[path] = str(error)
        if missing:
            first, reason = next(iter(missing.items()))
            raise DataError(
                f"{len(missing)} of {len(files)} images and volumes that the questions of "
                f"{items.task} name cannot be opened, the first is {first!r} ({reason}); complete "
                "the folder",
                file=str(items.root),
            )
        pick_device(self.options.device)

    def metadata(self) -> JsonObject:
        return {
            "model": self.source,
            "model_fingerprint": model_fingerprint(Path(self.source)),
            "dtype": self.options.dtype,
        }

    def preprocess(self) -> Mapping[str, Preprocess]:
        return load_processor(self.source).preprocess


class GenerationPredictor(SavedModelPredictor):
    """Replies in text and their masks, by batch inference. A run that was stopped resumes."""

    def check(self, items: Items) -> None:
        """Refuse questions about regions, too, for a model that reads none."""
        super().check(items)
        asked = any(REGION_FIELD in sample.extra for sample in items.scored)
        if asked and getattr(load_processor(self.source), "regions", None) is None:
            raise RecipeError(
                f"{items.task}: asks about regions, and {self.source} was trained without "
                "model.regions (draw or text)"
            )

    def predict(self, items: Items, *, progress: Progress | None = None) -> Predictions:
        questions, output = items.folder / "questions.jsonl", items.folder / "predictions.jsonl"
        lines = (json.dumps(record_of(sample), ensure_ascii=False) for sample in items.scored)
        atomic_write_text(questions, "\n".join(lines) + "\n")
        run = {name: getattr(self.options, name) for name in InferenceOptions.model_fields}
        if "masks" in self.gives:
            files = [media.path or "" for sample in items.scored for media in sample.media]
            # M3D scores the probabilities of its arrays, which no label map holds.
            arrays = bool(files) and all(file.endswith(".npy") for file in files)
            run |= {
                "masks": str(items.folder / "masks"),
                "mask_format": "npy" if arrays else "auto",
            }
        summary = infer(
            InferOptions(
                model=self.source,
                data=str(questions),
                root=str(items.root),
                output=str(output),
                **run,
            ),
            progress=progress,
        )
        if summary is None:  # not rank 0
            return {}
        return read_predictions(output, items.samples, limit=items.limit)

    def metadata(self) -> JsonObject:
        made = {"generation": self.options.generation.model_dump()}
        if "masks" in self.gives:
            made["segmentation"] = self.options.segmentation.model_dump()
        return {**super().metadata(), **made}
