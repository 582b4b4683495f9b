"""A benchmark, a kind of model and its source of predictions as another package brings them: in one
plug-in file."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, ProcessorMixin

from medm.evaluation.predictors import PREDICTORS, Items, Predictions, Predictor
from medm.imaging import ImagePreprocess, Preprocess, load_pixels
from medm.metrics.base import MetricResult
from medm.metrics.classification import auroc
from medm.models import MODELS
from medm.models.base import MedmModel, ModelKind
from medm.tasks import TASKS
from medm.tasks.base import Prediction, Record, Task, make_sample
from medm.types import Media, PredictionField, Sample

if TYPE_CHECKING:
    from medm.inference.batch import Progress


class GradeConfig(PreTrainedConfig):
    model_type = "medm-grade"

    invert: bool = False
    confident: bool = True


class GradeModel(MedmModel):
    config_class = GradeConfig


class GradeProcessor(ProcessorMixin):
    pass


class Grade(ModelKind):
    config_class, model_class, processor_class = GradeConfig, GradeModel, GradeProcessor
    predictor = "grade"

    def gives(self, config: PreTrainedConfig) -> frozenset[PredictionField]:
        return frozenset({"scores"} if config.confident else {"embeddings"})

    def build(self, options: Any) -> Any:
        raise NotImplementedError("a score needs no weights here")


class GradePredictor(Predictor):
    """The mean of the pixels is the score."""

    @property
    def gives(self) -> frozenset[PredictionField]:
        return Grade().gives(GradeConfig.from_pretrained(self.source))

    def predict(self, items: Items, *, progress: Progress | None = None) -> Predictions:
        sign = -1 if GradeConfig.from_pretrained(self.source).invert else 1
        return {
            str(sample.id): Prediction("", scores=[sign * self._mean(items.root, sample)])
            for sample in items.scored
        }

    def _mean(self, root: Path, sample: Sample) -> float:
        pixels = load_pixels(root / str(sample.media[0].path), self.preprocess()["image"])
        return float(pixels.mean())

    def preprocess(self) -> Mapping[str, Preprocess]:
        return {"image": ImagePreprocess(size=[8, 8])}


class BrightOrDark(Task):
    """Is the image bright?"""

    needs = frozenset({"scores"})
    tag = "grade"
    layout = "labels.json: file to 0 or 1"

    def samples(
        self, folder: Path, split: str = "test", **_rng: random.Random | None
    ) -> Iterator[Sample]:
        for name, label in json.loads((folder / "labels.json").read_text()).items():
            yield make_sample(
                "Bright?", id=name, tag=self.tag, answer=str(label), media=[Media("image", name)]
            )

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        scores = [record["scores"][0] if record.get("scores") else 0.0 for record in records]
        labels = [int(record["answer"]) for record in records]
        return auroc(scores, labels, resampling=self.resampling_of(records))


if __name__.startswith("medm_plugin_"):
    MODELS.add("grade", Grade, "for the test")
    PREDICTORS.add("grade", GradePredictor, "for the test")
    TASKS.add("bright-or-dark", BrightOrDark, "for the test")
