"""What a person may set for generation, batch inference and evaluation. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from medm.config import Options, named
from medm.tasks import TASKS


class GenerationOptions(Options):
    """How replies are chosen."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Longest reply in tokens."""
    num_beams: int = Field(default=1, ge=1)
    """Beams of beam search; 1 for none."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token each time (greedy); above it, tokens are drawn, the more freely the higher."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw only from the likeliest tokens that together have this probability."""
    seed: int = Field(default=0, ge=0)
    """Of drawing."""
    compile: bool = False
    """Compile the steps of decoding: about a minute before the first reply, and again when prompts and replies outgrow
    the room for their keys and values. Worth it for many records on a GPU; a CPU gains with few prompts at once."""

    @model_validator(mode="after")
    def _consistent(self) -> GenerationOptions:
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError("top_p: nothing is drawn at temperature 0; set a temperature, or leave top_p out")
        return self


class AnsweringOptions(Options):
    """How a model answers many records."""

    generation: GenerationOptions = GenerationOptions()
    """How replies are chosen."""
    batch_size: int = Field(default=8, ge=1)
    """Prompts answered at once; a batch that does not fit the memory of a GPU is halved by itself."""
    processes: int = Field(default=1, ge=1)
    """Processes on this machine, each with the model; on GPUs one each. Under `medm launch`, that says how many."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that read and prepare images for each of them; chosen by the number of cores without it."""
    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`."""
    dtype: Literal["saved", "float32", "bfloat16", "float16"] = "saved"
    """Precision of the weights; as they were saved without it."""
    overwrite: bool = False
    """Delete the answers of an earlier run and start over, instead of resuming."""


class InferOptions(AnsweringOptions):
    """Batch inference over one annotation file."""

    model: str
    """Model folder that medm saved."""
    data: str
    """JSON array or JSONL of records; a last reply is not shown to the model and kept as `answer`."""
    root: str | None = None
    """Folder that image and volume paths are relative to. Default: the folder of `data`."""
    output: str
    """JSONL file to append to: one line per record, as soon as it is answered. A run that was stopped resumes in it."""
    json_output: str | None = None
    """Where the records with their replies are written at the end, as one JSON array in MedM-VL's form."""
    limit: int | None = Field(default=None, ge=1)
    """Answer only the first N records."""


class EvalTaskOptions(Options):
    """One benchmark of an evaluation."""

    task: named(TASKS)  # type: ignore[valid-type]
    """The task, by name, and its options."""
    data: str
    """Folder with the benchmark's files as they are distributed."""
    split: str | None = None
    """Split to score; the one that the benchmark is scored on without it."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first N items. The scores are then not those of the benchmark."""
    predictions: str | None = None
    """Answers of another program, in place of a model's: JSON or JSONL by `id`, MedM-VL's inference files, or a list of
    texts in the order of the items."""
    against: str | None = None
    """Output folder of another evaluation of the same task, or a file of predictions, to compare with."""


class EvalOptions(AnsweringOptions):
    """Scores of a model, or of files of predictions, on benchmarks."""

    tasks: list[EvalTaskOptions] = Field(min_length=1)
    """What is scored."""
    model: str | None = None
    """Model folder that medm saved; needed where a task has no `predictions`."""
    output_dir: str
    """Folder for questions, predictions, results and reports, one folder a task in it."""
    cases: int = Field(default=8, ge=0)
    """How many of the worst and of random items the report shows, with their images."""
    seed: int = Field(default=0, ge=0)
    """Of the choice of random items."""

    @model_validator(mode="after")
    def _someone_answers(self) -> EvalOptions:
        silent = [block.task.name for block in self.tasks if block.predictions is None]
        if self.model is None and silent:
            raise ValueError(f"model: needed to answer {', '.join(silent)}; give a model, or predictions for each task")
        names = [block.task.name for block in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tasks: {', '.join(twice)} stands twice, and both would be written to one folder")
        return self
