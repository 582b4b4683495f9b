"""What a person may set for generation and batch inference. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from medm.config import Options


class GenerationOptions(Options):
    """How the tokens of a reply are chosen."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Longest reply in tokens."""
    num_beams: int = Field(default=1, ge=1)
    """Beams of beam search; 1 for none."""
    temperature: float = Field(default=0.0, ge=0)
    """0 for greedy decoding; above 0, tokens are sampled, the more freely the higher."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample only from the most likely tokens that together have this probability."""
    seed: int = Field(default=0, ge=0)
    """Seed of sampling."""
    compile: bool = False
    """Compile the decode step: about a minute before the first reply, and again when prompts and replies outgrow the
    KV cache. Worth it for many records on a GPU; a CPU gains with few prompts at once."""

    @model_validator(mode="after")
    def _consistent(self) -> GenerationOptions:
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError("top_p: nothing is sampled at temperature 0; set a temperature, or leave top_p out")
        return self


class InferenceOptions(Options):
    """How a model generates replies to many records."""

    generation: GenerationOptions = GenerationOptions()
    """How the tokens of a reply are chosen."""
    batch_size: int = Field(default=8, ge=1)
    """Prompts decoded at once; a batch that does not fit the memory of a GPU is halved by itself."""
    processes: int = Field(default=1, ge=1)
    """Processes on this machine, each with the model; on GPUs one each. Under `medm launch`, that says how many."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that read and prepare images for each of them. Default: by the number of cores."""
    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`."""
    dtype: Literal["saved", "float32", "bfloat16", "float16"] = "saved"
    """Precision of the weights; `saved` keeps that of the folder."""
    overwrite: bool = False
    """Delete the replies of an earlier run and start over, instead of resuming."""


class InferOptions(InferenceOptions):
    """Batch inference over one annotation file."""

    model: str
    """Model folder that medm saved."""
    data: str
    """JSON array or JSONL of records; a last reply is not shown to the model and kept as `answer`."""
    root: str | None = None
    """Folder that image and volume paths are relative to. Default: the folder of `data`."""
    output: str
    """JSONL file to append to, one line per record once it has its reply. A run that was stopped resumes in it."""
    json_output: str | None = None
    """Where the records with their replies are written at the end, as one JSON array in MedM-VL's form."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first N records."""
