"""Options of an evaluation. Torch-free."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from medm.config import Options
from medm.inference.options import InferenceOptions
from medm.registry import NamedBlock
from medm.tasks import TASKS, TaskOptions


class EvalTaskOptions(Options):
    """One benchmark of an evaluation."""

    task: Annotated[TaskOptions, NamedBlock(TASKS)]
    """The task, by name, and its options."""
    data: str
    """Folder with the benchmark's files as they are distributed."""
    split: str | None = None
    """Split to score. Default: the split that the benchmark is scored on."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first N items. The scores are then not those of the benchmark."""
    predictions: str | None = None
    """Answers of another program, in place of a model's: JSON or JSONL by `id`, MedM-VL's inference
    files, or a list of texts in the order of the items."""
    against: str | None = None
    """Output folder of another evaluation of the same task, or a file of predictions, to compare
    with."""


class EvalOptions(InferenceOptions):
    """Scores of a model, or of files of predictions, on benchmarks."""

    tasks: list[EvalTaskOptions] = Field(min_length=1)
    """Benchmarks to score."""
    model: str | None = None
    """Model folder that medm saved; needed where a task has no `predictions`."""
    output_dir: str = "work_dirs/eval"
    """Folder for questions, predictions, results and reports, one folder a task in it."""
    cases: int = Field(default=8, ge=0)
    """Number of the worst and of random items that the report shows, with their images."""
    seed: int = Field(default=0, ge=0)
    """Seed of the choice of random items."""

    @model_validator(mode="after")
    def _require_model_or_predictions(self) -> EvalOptions:
        unanswered = [block.task.name for block in self.tasks if block.predictions is None]
        if self.model is None and unanswered:
            raise ValueError(
                f"model: needed to answer {', '.join(unanswered)}; give a model, or "
                "predictions for each task"
            )
        names = [block.task.label for block in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"tasks: {', '.join(twice)} occurs twice, and both would be written to one folder"
            )
        return self
