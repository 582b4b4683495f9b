"""Sources of predictions for the items of a benchmark. Torch-free.

A `Predictor` names the fields that it gives, a `Task` the fields that it needs, and the two are
compared before a benchmark is read and before a weight is loaded. A file of another program's
predictions is one source (`medm.evaluation.prediction_files`), a saved model another: the kind of
model names the line of the table below that opens its folders (`ModelKind.predictor`).

The contract lives here and not in `medm.inference`, which knows no benchmarks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeAlias, get_args

from medm.errors import RecipeError
from medm.evaluation.options import EvalOptions
from medm.imaging import Preprocess
from medm.registry import Registry
from medm.tasks.base import Prediction
from medm.types import JsonObject, PredictionField, Sample

if TYPE_CHECKING:
    from medm.inference.batch import Progress

Predictions: TypeAlias = Mapping[str, Prediction]
"""Predictions by the id of their item."""

FIELDS: tuple[PredictionField, ...] = get_args(PredictionField)

_FILE_FORMATS: dict[PredictionField, str] = {
    "text": 'objects with an "id" and a "text"',
    "masks": 'a JSONL with a line {"id": ..., "mask": FILE} an item (docs/evaluation.md)',
    "scores": 'lines with "scores": a number, or one for each class',
    "embeddings": 'lines with "embedding": a vector, and "text_embeddings": one for each caption',
    "matches": 'lines with "matches": by id of another item the score of its text with the images',
}
"""Form of each field in a file of predictions."""


@dataclass(frozen=True, slots=True)
class Items:
    """The items of one benchmark, to be predicted."""

    task: str
    """Name of the benchmark."""
    samples: Sequence[Sample]
    """Every item that was read; predictions may belong to any of them."""
    limit: int | None
    """Only the first N are scored."""
    root: Path
    """Folder of the benchmark, which media paths are relative to."""
    folder: Path
    """Output folder."""
    needs: frozenset[PredictionField] = frozenset({"text"})
    """What the benchmark scores."""
    class_texts: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    """By the field `set` of an item and by class the texts that scores are of."""
    labels: Sequence[str] = ()
    """Names of the labels that scores are of, where they belong to no texts."""
    matched: int = 0
    """Best candidates of each query whose matches are scored."""

    @property
    def scored(self) -> Sequence[Sample]:
        """The items that are scored."""
        return self.samples[: self.limit]


class Predictor(ABC):
    """A source of predictions.

    Args:
        source: the folder or file.
        options: of the run.

    Raises:
        CheckpointError, DataError: it cannot be opened. Weights are not read.
    """

    what: ClassVar[str] = "model"
    """Word for the source in messages."""
    beyond_limit: ClassVar[bool] = False
    """It may hold predictions of items that are not scored, so that all items have to be known."""

    def __init__(self, source: str, options: EvalOptions) -> None:
        self.source, self.options = source, options

    @property
    @abstractmethod
    def gives(self) -> frozenset[PredictionField]:
        """Fields that its predictions hold, known without weights."""

    def check(self, items: Items) -> None:  # noqa: B027 (a source without demands needs none)
        """Refuse items and settings that would stop the run later.

        Raises:
            DataError: a file of the items is missing.
            DeviceError: the device is not there.
        """

    def available(self, items: Items) -> Predictions:
        """Return the predictions that exist before any work."""
        return {}

    @abstractmethod
    def predict(self, items: Items, *, progress: Progress | None = None) -> Predictions:
        """Predict the items that are scored, resuming what an earlier run left in `items.folder`.

        Every rank of a launch calls it; what ranks other than 0 return is not used.
        """

    def metadata(self) -> JsonObject:
        """Return all that the predictions depend on, JSON-able, for the report."""
        return {self.what: self.source}

    def preprocess(self) -> Mapping[str, Preprocess]:
        """Return how the source sees the files of each branch, for the images of a report."""
        return {}


PREDICTORS: Registry[type[Predictor]] = Registry("predictor", group="medm.predictors")

PREDICTORS.add(
    "generation",
    "medm.evaluation.model_predictor:GenerationPredictor",
    "a saved model that replies in text",
)
PREDICTORS.add(
    "dual-encoder",
    "medm.evaluation.dual_predictor:DualEncoderPredictor",
    "a saved dual encoder: vectors, and scores of texts",
)


PREDICTORS.add(
    "studies",
    "medm.evaluation.study_predictor:StudyPredictor",
    "a saved model of studies: texts, scores of labels, vectors and matches",
)


def require_match(task: str, needs: frozenset[PredictionField], predictor: Predictor) -> None:
    """Refuse a source whose predictions lack what a task scores.

    Raises:
        RecipeError: names the fields that are needed and given, and their form in a file.
    """
    lacking = [name for name in FIELDS if name in needs - predictor.gives]
    if lacking:
        formats = "; ".join(_FILE_FORMATS[name] for name in lacking if name in _FILE_FORMATS)
        raise RecipeError(
            f"{task}: needs {_listed(needs)}; {predictor.what} {predictor.source} gives "
            f"{_listed(predictor.gives)}"
            + (f". Give --predictions with {formats}" if formats else "")
        )


def _listed(fields: frozenset[PredictionField]) -> str:
    return " and ".join(name for name in FIELDS if name in fields) or "nothing"
