"""Options of generation and batch inference. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from medm.config import Options
from medm.data.owners import Shard, parse_shard
from medm.types import Kind

MaskFormat: TypeAlias = Literal["auto", "png", "nifti", "npy", "rle", "dicom-seg"]
ReportFormat: TypeAlias = Literal["none", "dicom-sr"]

_ONLY_IN_GENERATE = {
    "do_sample", "length_penalty", "min_new_tokens", "no_repeat_ngram_size", "num_beams",
    "num_return_sequences", "penalty_alpha", "repetition_penalty", "typical_p",
}  # fmt: skip
"""Arguments of transformers' `generate` that continuous batching does not offer."""


class GenerationOptions(Options):
    """Options of the generation of a reply."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Longest reply in tokens."""
    temperature: float = Field(default=0.0, ge=0)
    """0 for greedy decoding; above 0, tokens are sampled, the more freely the higher."""
    top_k: int = Field(default=0, ge=0)
    """Sample only from this many of the most probable tokens; 0 for all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample only from the most probable tokens that together have this probability."""
    seed: int = Field(default=0, ge=0)
    """Seed of sampling. A reply depends on it and on its own prompt, not on other prompts or the
    batch size."""
    compile: bool = False
    """Compile the decode step: about a minute before the first reply, and again when prompts and
    replies outgrow the KV cache. Worth it for many records on a GPU; a CPU gains with few prompts
    at once."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_arguments(cls, value: object) -> object:
        """Refuse arguments that only `generate` of transformers offers.

        Recipes of earlier versions may contain `num_beams: 1`.
        """
        if not isinstance(value, dict):
            return value
        if value.get("num_beams") == 1:
            value = {key: item for key, item in value.items() if key != "num_beams"}
        if other := sorted(set(value) & _ONLY_IN_GENERATE):
            raise ValueError(
                f"{', '.join(other)}: not offered in continuous batching; expected some of "
                f"{', '.join(cls.model_fields)}. In Python, `generate` of the transformers model "
                "takes it"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> GenerationOptions:
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            name = "top_p" if self.top_p < 1 else "top_k"
            raise ValueError(
                f"{name}: nothing is sampled at temperature 0; set a temperature, or leave {name} "
                "out"
            )
        return self


class SegmentationOptions(Options):
    """Masks of replies, for models with a mask head."""

    presence_threshold: float | None = Field(default=None, ge=0, le=1)
    """Lowest probability that the target is in the image at all; below it a mask is empty. Default:
    the presence that the head predicts is not used."""
    volume_mode: Literal["slices", "memory", "volume"] | None = None
    """Masks of a volume: `slices` segments each slice by itself, `memory` follows the target from a
    few slices through the others (SAM 2), `volume` is for heads that read volumes. Default:
    `volume` for such heads, `slices` for heads that read images. With a mode, several images of a
    record are slices as well, and masks belong to all of them; without, to the last one."""
    slices: int = Field(default=5, ge=1)
    """Slices of a volume that a language model without volumes is shown; in the mode `memory` also
    those that the target is followed from."""
    slice_choice: Literal["first", "uniform", "score"] = "uniform"
    """Choice of these slices: the `first` from the feet (UniBiomed), `uniform` over the volume, or
    by `score`: the language model is shown uniform ones, and the target is followed from those with
    the best predicted presence and quality."""
    slice_window: str | None = None
    """Lower and upper value that become black and white in slices, as "-160,240" (HU for CT).
    Default: the window of the model's images; else -1000,1000 where a file says that it holds HU;
    else the range of each volume."""

    @field_validator("slice_window", mode="before")
    @classmethod
    def _two_numbers(cls, value: object) -> object:
        if isinstance(value, (list, tuple)):
            value = ",".join(str(item) for item in value)
        if value is None or not isinstance(value, str):
            return value
        try:
            low, high = (float(number) for number in value.split(","))
        except ValueError:
            low = high = 0.0
        if not low < high < float("inf") or low == -float("inf"):
            raise ValueError(f"expected two rising numbers such as '-160,240', found {value!r}")
        return f"{low:g},{high:g}"

    @property
    def window(self) -> tuple[float, float] | None:
        """The two numbers of `slice_window`."""
        if self.slice_window is None:
            return None
        low, high = (float(number) for number in self.slice_window.split(","))
        return low, high


class StudyOptions(Options):
    """Answers to studies, for models of kind `blip`."""

    answers: Literal["all", "text", "scores", "matches"] = "all"
    """What is written: `text` is a report, or the answer to the record's question; `scores` are the
    logits of labels, with their probabilities; `all` is what of these two the model gives;
    `matches` are the logits of a match of the images with the reports of the records that
    `candidates` of a record names."""
    beams: int = Field(default=3, ge=1)
    """Texts that beam search keeps open; 1 is greedy."""
    max_length: int | None = Field(default=None, ge=3)
    """Longest text of a study in tokens, prompt and end included. Default: that of the training."""
    min_length: int = Field(default=5, ge=0)
    """Tokens of a text of a study, prompt and end included, below which it does not end."""
    knowledge: Literal["on", "off"] = "on"
    """Whether images of studies attend to the knowledge of the model. `off` leaves the fusion out
    of a model that was trained with it, which shows what it adds; it is not the model that training
    without knowledge gives."""


def changed_fields(options: Options) -> list[str]:
    """Return the names of the fields whose value is not the default."""
    fields = type(options).model_fields
    return sorted(name for name in fields if getattr(options, name) != fields[name].default)


class RunOptions(Options):
    """Options of a run over many records."""

    batch_size: int = Field(default=8, ge=1)
    """Prompts decoded at once. A batch that does not fit the memory of a GPU is halved
    automatically."""
    processes: int = Field(default=1, ge=1)
    """Processes on this machine, each with the model and, on GPUs, one GPU. Under `medm launch`,
    the launch sets their number."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that read and prepare images for each process. Default: by the number of cores."""
    device: str = "auto"
    """`auto` (a GPU, or the CPU without one), `cpu`, `cuda` or `cuda:N`."""
    dtype: Literal["saved", "float32", "bfloat16", "float16"] = "saved"
    """Precision of the weights; `saved` keeps that of the folder."""
    overwrite: bool = False
    """Delete the replies of an earlier run and start over, instead of resuming."""


class InferenceOptions(RunOptions):
    """Options of the generation of replies to many records."""

    generation: GenerationOptions = GenerationOptions()
    """Options of the generation of a reply."""
    segmentation: SegmentationOptions = SegmentationOptions()
    """Masks of replies, for models with a mask head."""
    studies: StudyOptions = StudyOptions()
    """Answers to studies, for models of kind `blip`."""


class InferOptions(InferenceOptions):
    """Batch inference over one annotation file, or one question about every file of a folder."""

    model: str
    """Model folder that medm saved."""
    data: str | None = None
    """JSON array or JSONL of records; a last reply is not shown to the model and kept as
    `answer`."""
    root: str | None = None
    """Folder that image and volume paths are relative to. Default: the folder of `data`."""
    folder: str | None = None
    """In place of `data`: a folder whose images and volumes, at any depth, are each asked about
    with `prompt`. Files that are added later are answered by the next run."""
    image: list[str] = []
    """In place of `data`: an image that is asked about with `prompt`; several are asked about
    together. The command prints the reply, and needs no output."""
    volume: list[str] = []
    """A volume that is asked about, likewise."""
    prompt: str | None = None
    """Question about each file of `folder`, or about `image` and `volume`: "Segment the lesion.".
    Models of studies write a report where it is empty."""
    output: str
    """JSONL file to append to, one line per record once it has its reply. A run that was stopped
    resumes in it."""
    csv_output: str | None = None
    """File to which id, reply and error of each record are written at the end, as CSV."""
    json_output: str | None = None
    """File to which the records with their replies are written at the end, as one JSON array in
    MedM-VL's form."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first N records."""
    masks: str | None = None
    """Folder for the masks of replies, of a model with a mask head. Default: `NAME_masks` beside
    the output `NAME.jsonl`."""
    mask_format: MaskFormat = "auto"
    """Files of the masks, on the grid of their image or volume: `auto` is `png` for images and
    `nifti` for volumes, `npy` holds probabilities, `dicom-seg` is one DICOM SEG for each series or
    image of a reply, `rle` writes run-length codes into the output and no files."""
    rle: bool = False
    """Write run-length codes into the output as well."""
    overlays: bool = False
    """Write a sheet with the masks drawn over their image or volume as PNG, too."""
    shard: str | None = None
    """Part of the records, as `i/N` with i from 0: one task of a job array. Its lines are written
    beside the output, to `NAME.shard-i-of-N`. Then `--merge`."""
    merge: bool = False
    """Write the output from the files of all shards, in the order of the records. Options are those
    of the shards."""
    only_failed: bool = False
    """Try only the records that an earlier run left without a reply."""

    @property
    def own_shard(self) -> Shard | None:
        """The part of the records that is answered; None for all."""
        return None if self.shard is None else parse_shard(self.shard)

    @property
    def lines_file(self) -> str:
        """File that the lines of this run are written to."""
        return self.output if self.own_shard is None else f"{self.output}.{self.own_shard.label}"

    @model_validator(mode="after")
    def _consistent_parts(self) -> InferOptions:
        if self.own_shard is not None and (self.json_output or self.csv_output):
            raise ValueError("json and csv belong to merge: one shard has not all records")
        if self.merge and (self.own_shard is not None or self.only_failed):
            raise ValueError("merge answers nothing: expected neither shard nor only_failed")
        if self.only_failed and self.overwrite:
            raise ValueError("only_failed needs the lines that overwrite would delete")
        return self

    @property
    def masks_folder(self) -> Path:
        """Folder of the masks and overlays of replies."""
        output = Path(self.output)
        return Path(self.masks) if self.masks else output.with_name(f"{output.stem}_masks")

    @property
    def reports_folder(self) -> Path:
        """Folder of the reports."""
        output = Path(self.output)
        return Path(self.reports) if self.reports else output.with_name(f"{output.stem}_reports")

    report_format: ReportFormat = "none"
    """`dicom-sr` also writes each reply as a DICOM Structured Report that references the DICOM
    files of its record; `none` writes the output alone."""
    reports: str | None = None
    """Folder for the reports. Default: `NAME_reports` beside the output `NAME.jsonl`."""

    @property
    def files(self) -> list[tuple[Kind, str]]:
        """The images and volumes that are asked about together, with their kind."""
        return [("image", path) for path in self.image] + [("volume", path) for path in self.volume]

    @model_validator(mode="after")
    def _one_source(self) -> InferOptions:
        given = [
            name
            for name, value in (
                ("data", self.data),
                ("folder", self.folder),
                ("image or volume", self.files),
            )
            if value
        ]
        if len(given) != 1:
            raise ValueError(
                "expected one of data, folder, and image or volume; found "
                f"{' and '.join(given) or 'none'}"
            )
        if (self.data is None) != (self.prompt is not None):
            raise ValueError(
                "a prompt belongs to folder, or to image and volume: it is asked about their files"
            )
        if self.files and (self.root is not None or self.own_shard is not None or self.merge):
            raise ValueError("image and volume: expected neither root, shard nor merge")
        if self.reports is not None and self.report_format == "none":
            raise ValueError("reports: no report_format; set report_format to dicom-sr")
        return self


class EmbedOptions(RunOptions):
    """Vectors of images, volumes or studies, and of their captions, over one annotation file."""

    batch_size: int = Field(default=32, ge=1)
    """Files encoded at once."""
    model: str
    """Folder that medm saved of a dual encoder, or of a model of studies with the head `itc`."""
    data: str
    """Annotation file of pairs (JSON, JSONL, CSV or TSV) or of studies, as the model takes them;
    captions and reports may be missing."""
    root: str | None = None
    """Folder that image and volume paths are relative to. Default: the folder of `data`."""
    output: str
    """File for the vectors: .jsonl, or with `medm embed` also .npz or .parquet. A run that was
    stopped resumes with the same one."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first N records."""
    overwrite: bool = False
    """Delete the vectors of an earlier run and start over, instead of resuming."""
    captions: bool = False
    """Write the vectors of the captions, or of the reports of studies, too."""
    vectors: Literal["files", "none"] = "files"
    """Whether the vectors are written; scores alone need none."""
    class_texts: dict[str, dict[str, list[str]]] = {}
    """By task of a record and by class the texts of the class: the scores of the classes are
    written."""
    studies: StudyOptions = StudyOptions()
    """Whether images of studies attend to knowledge; for models of kind `blip`."""
