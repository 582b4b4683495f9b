"""Batch inference: an annotation file in, one line per record out.

A run may be stopped at any moment and started again with the same command: each record is answered
once. A record that cannot be used becomes a line with its error, and the next run tries it again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from logging.handlers import QueueHandler
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, cast

import torch
from torch.utils.data import DataLoader

from medm.children import safe_path
from medm.data.options import SourceOptions
from medm.data.owners import Shard
from medm.data.pipelines import pipeline_for
from medm.data.records import Records
from medm.data.studies import Studies
from medm.errors import DataError, InputLostError, MedmError, RecipeError
from medm.files import atomic_write_text
from medm.imaging.paths import MissingFileError
from medm.imaging.sources import rereadable
from medm.inference.batches import (
    Prepared,
    Problem,
    Prompts,
    make_prompts,
    order_by_length,
    reason,
    shard_indices,
)
from medm.inference.embedder import EmbeddingEngine, load_embedder, make_files
from medm.inference.folder_records import Existing, file_record, write_folder_records
from medm.inference.generator import Reply, load_engine, pick_device
from medm.inference.mask_writing import (
    MaskCounts,
    MaskWriter,
    ReplyMasks,
    require_format,
    series_choice,
)
from medm.inference.options import EmbedOptions, InferOptions, changed_fields
from medm.inference.output_shards import merged_lines, owned_indices
from medm.inference.predictions import (
    Appender,
    RecordName,
    ResultLine,
    Results,
    model_fingerprint,
)
from medm.inference.report_writing import ReportWriter, require_report_format
from medm.inference.segmenter import Segmenter, Shown
from medm.inference.studies import load_studies, make_studies, study_outputs
from medm.inference.volume_modes import SlicedVolumes, require_mode
from medm.launcher import launched_world_size
from medm.models import kind_of_config, load_config, load_processor
from medm.os_errors import explain, require_writable
from medm.registry import load_plugin, loaded_plugins
from medm.stopping import ignore_stops
from medm.types import (
    Config,
    ConversationProcessor,
    Example,
    JsonObject,
    PredictionField,
    Processor,
    Sample,
    Turn,
    parse_view,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from medm.models.lvlm.processing import LVLMProcessor

logger = logging.getLogger(__name__)

OptionsT = TypeVar("OptionsT", bound=InferOptions | EmbedOptions)

Progress = Callable[[int, int, int], None]
"""Called with (records done by this run, records this run has to do, errors so far)."""

_Message: TypeAlias = logging.LogRecord | MedmError | tuple[int, int, int]
"""From a child process: a log record, the error that ends it, or (rank, records done, errors)."""

_LONGEST_WAIT = timedelta(days=7)
"""Longest wait of the ranks for the slowest one at the end."""

_BATCHES_AHEAD = 4
"""Batches that are decoded together; their lines are written when the last of them is answered."""

_OUTAGE = 32
"""Consecutive records with unavailable files that stop the run."""

_NOTED = {"limit", "batch_size", "processes", "device", "json_output", "csv_output"}
"""Options that replies do not depend on, kept with the results for the reader."""


_FOR_MASKS = {"masks", "mask_format", "rle", "overlays"}
"""Options that only masks of replies depend on."""


class Answer(Protocol):
    """Result of a model for one record."""

    def line(self) -> JsonObject:
        """Return its fields of the output line."""
        ...


class Answers(Protocol):
    """A model that is ready: `Engine`, `EmbeddingEngine` or `StudyAnswerer`."""

    def generate(self, batch: Any) -> Sequence[Answer]:
        """Return the answer to each record of a batch."""
        ...


@dataclass(frozen=True, slots=True)
class InferSummary:
    """Outcome of a run."""

    records: int
    """Records of the run."""
    answered: int
    """Records with a reply, from this run and earlier ones."""
    errors: int
    """Records without a reply, with the reason in the output."""
    resumed: int
    """Records answered by earlier runs."""
    unfinished: int
    """Replies cut at the longest length."""
    tokens: int
    """Tokens of all replies."""
    seconds: float
    """Duration of this run, loading included."""
    masks: MaskCounts | None = None
    """Masks of the replies, of a model with a mask head."""
    longest: int | None = None
    """Tokens at which replies are cut, where the run and not the model sets them."""

    @property
    def new(self) -> int:
        """Records answered by this run."""
        return self.answered - self.resumed

    @property
    def per_second(self) -> float:
        """Records that this run answered per second."""
        return self.new / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class _Counter:
    """Progress of the processes of a run."""

    total: int
    report: Progress | None
    done: dict[int, int] = field(default_factory=dict)
    errors: dict[int, int] = field(default_factory=dict)

    def note(self, rank: int, done: int, errors: int) -> None:
        self.done[rank], self.errors[rank] = done, errors
        if self.report is not None:
            self.report(sum(self.done.values()), self.total, sum(self.errors.values()))


@dataclass(frozen=True, slots=True)
class _Job:
    """Inputs of a run, opened once in each process: everything but the weights."""

    options: InferOptions | EmbedOptions
    device: torch.device
    processor: Processor
    context: int | None
    """Longest prompt in tokens; None for no limit."""
    records: Records[Any, Any]
    masks: bool = False
    """Replies have masks."""
    of_studies: frozenset[PredictionField] = frozenset()
    """What is written of each record, where records are studies."""


def infer(
    options: InferOptions | EmbedOptions, *, progress: Progress | None = None
) -> InferSummary | None:
    """Generate a reply to every record of an annotation file, or its vector.

    Args:
        options: of the run.
        progress: called with the progress of the run.

    Returns:
        The summary; None on ranks of a launch other than rank 0.

    Raises:
        DeviceError: the device is not available.
        CheckpointError: the model cannot be opened.
        RecipeError: the output holds lines of another run.
        DataError: the annotation file as a whole cannot be read.
        InputLostError: the files of the records are gone or unavailable.
        MedmError: another run writes to the output, or a process ended before its work was done.
    """
    started = time.monotonic()
    check_files(options)
    output = Results(_lines_file(options), {})
    with _launched() as (rank, world), output.locked() if rank == 0 else nullcontext():
        # A run that is refused, by the lock or for its settings, changes no records of another.
        if rank == 0:
            options = with_records(options)
        _wait_for_all(world)
        if rank > 0:
            options = with_records(options, write=False)
        job = _open_job(options)
        records = job.records
        settings, folders = run_settings(options), []
        if job.masks and isinstance(options, InferOptions):
            settings |= mask_settings(options)
        if isinstance(options, InferOptions):
            folders = [options.masks_folder, options.reports_folder]
            if options.report_format != "none":
                settings |= {"report_format": options.report_format}
        if job.of_studies:
            settings |= {"studies": options.studies.model_dump()}
        owned = owned_indices(records, _own_shard(options))
        noted = options.model_dump(include=_NOTED)
        results = Results(_lines_file(options), settings, noted, folders)
        if rank == 0:
            results.begin(overwrite=options.overwrite)
        _wait_for_all(world)
        merged = None
        if isinstance(options, InferOptions) and options.merge:
            merged = merged_lines(Path(options.output), settings, records)
        lines = results.done() if merged is None else merged
        before = [index for index in owned if "error" not in lines.get(index, {"error": None})]
        counter = _Counter(len(_left(options, owned, lines)), progress if rank == 0 else None)
        if merged is None:
            _generate(job, rank, world, counter)
        _wait_for_all(world)
        if rank > 0:
            return None
        lines = results.finish(merged)
        if isinstance(options, InferOptions):
            if options.json_output is not None:
                write_conversations(options, records, lines)
            if options.csv_output is not None:
                write_csv(Path(options.csv_output), lines)
    kept = [lines[index] for index in owned if index in lines]
    return InferSummary(
        records=len(owned),
        answered=sum("error" not in line for line in kept),
        errors=sum("error" in line for line in kept),
        resumed=len(before),
        unfinished=sum(not line.get("finished", True) for line in kept),
        tokens=sum(line.get("tokens", 0) for line in kept),
        seconds=time.monotonic() - started,
        masks=MaskCounts.of(kept) if job.masks else None,
        longest=_longest(options, job),
    )


def _longest(options: InferOptions | EmbedOptions, job: _Job) -> int | None:
    if job.of_studies:
        return options.studies.max_length
    return options.generation.max_new_tokens if isinstance(options, InferOptions) else None


def _open_job(options: InferOptions | EmbedOptions) -> _Job:
    """Open all inputs of a run, and refuse what cannot work before any weight is read.

    Raises:
        DeviceError: the device is not available.
        CheckpointError: the folder holds no model that medm saved.
        RecipeError: the model gives no text, its chat template is broken, or its context leaves no
            tokens for a prompt.
        DataError: the annotation file as a whole cannot be read.
    """
    device = pick_device(options.device)
    config = load_config(options.model)
    kind = kind_of_config(config)
    gives = kind.gives(config)
    pipeline = pipeline_for(kind, inference=True)
    if isinstance(pipeline, Studies):
        return _open_studies(options, device, pipeline, gives)
    if asked := changed_fields(options.studies):
        raise RecipeError(
            f"{', '.join(asked)}: for models of studies (kind blip); model {options.model} gives "
            f"{' and '.join(sorted(gives)) or 'nothing'} of other records"
        )
    command, wanted = "infer writes", "text"
    if isinstance(options, EmbedOptions):
        command, wanted = "embed needs", "embeddings"
    if wanted not in gives:
        raise RecipeError(
            f"medm {command} {wanted}; model {options.model} gives "
            f"{' and '.join(sorted(gives)) or 'nothing'}"
        )
    processor, context = load_processor(options.model), None
    if isinstance(options, InferOptions):
        context = _context(config, options)
        if not isinstance(processor, ConversationProcessor):
            raise RecipeError(
                f"medm infer asks questions; the {type(processor).__name__} of {options.model} "
                "makes no prompts of conversations"
            )
        # A template may require more than a question; a broken one raises another error.
        with suppress(DataError):
            processor.encode(Sample((Turn("user", ("?",)),)), {}, generation=True)
    masks = isinstance(options, InferOptions) and "masks" in gives
    if asked := sorted(options.model_fields_set & _FOR_MASKS) if not masks else []:
        raise RecipeError(
            f"{', '.join(asked)}: for models that answer with masks; model {options.model} gives "
            f"{' and '.join(sorted(gives))}"
        )
    if isinstance(options, InferOptions) and masks:
        view = cast("LVLMProcessor", processor).mask_view
        head = config.masks["head"]
        require_mode(
            options.segmentation,
            parse_view(str(view)).kind,
            memory=isinstance(head, dict) and bool(head.get("memory")),
        )
        require_format(options.mask_format)
    if isinstance(options, InferOptions):
        require_report_format(options.report_format)
    records = Records([_source(options)], pipeline)
    return _Job(options, device, processor, context, records, masks)


def _open_studies(
    options: InferOptions | EmbedOptions,
    device: torch.device,
    pipeline: Studies,
    gives: frozenset[PredictionField],
) -> _Job:
    """Return the inputs of a run over studies.

    Raises:
        RecipeError: the model does not give what is asked for, or an option is for other models.
    """
    if isinstance(options, EmbedOptions) and "embeddings" not in gives:
        raise RecipeError(
            f"medm embed needs embeddings; model {options.model} gives "
            f"{' and '.join(sorted(gives)) or 'nothing'}"
        )
    wanted = study_outputs(options, gives)
    if isinstance(options, InferOptions):
        asked = sorted(options.model_fields_set & {*_FOR_MASKS, "json_output"})
        if asked := [name for name in asked if getattr(options, name)]:
            raise RecipeError(
                f"{', '.join(asked)}: not for models of studies such as {options.model}; give "
                "--data with studies, and read the output"
            )
    records = Records([_source(options)], pipeline)
    return _Job(options, device, load_processor(options.model), None, records, of_studies=wanted)


def _source(options: InferOptions | EmbedOptions) -> SourceOptions:
    return SourceOptions(path=str(options.data), root=options.root, limit=options.limit)


def check_files(options: InferOptions | EmbedOptions) -> None:
    """Refuse files that cannot be used.

    Raises:
        RecipeError: two of them are the same file.
        DataError: the folder of images and volumes does not exist.
        OSError: the output or the JSON cannot be written.
    """
    _require_different_files(options)
    if options.root is not None and not Path(options.root).is_dir():
        raise DataError(
            f"root {options.root}: no such folder; expected the folder of images and volumes"
        )
    require_writable(Path(options.output))
    if isinstance(options, InferOptions):
        for file in (options.json_output, options.csv_output):
            if file is not None:
                require_writable(Path(file))


def _require_different_files(options: InferOptions | EmbedOptions) -> None:
    """Raise `RecipeError` if one file would be read and written, or written twice."""
    results = Results(Path(options.output), {})
    named = {} if options.data is None else {"--data": Path(options.data)}
    named |= {"--output": results.output, "the settings of --output": results.sidecar}
    if isinstance(options, InferOptions):
        if options.json_output is not None:
            named["--json"] = Path(options.json_output)
        if options.csv_output is not None:
            named["--csv"] = Path(options.csv_output)
    seen: dict[Path, str] = {}
    for name, file in named.items():
        other = seen.setdefault(file.resolve(), name)
        if other != name:
            raise RecipeError(
                f"{file}: {other} and {name} are the same file; choose another file for {name}"
            )


def with_records(options: OptionsT, *, write: bool = True) -> OptionsT:
    """Return the options with an annotation file of their folder or files.

    Args:
        options: of the run.
        write: write the file; the caller has the lock of the output.

    Raises:
        RecipeError: the output holds lines about another folder, other files or another prompt.
        DataError: the folder holds no image or volume, or a file is missing.
        OSError: the file cannot be written.
    """
    if not isinstance(options, InferOptions) or options.data is not None:
        return options
    output, prompt = Path(options.output), str(options.prompt)
    data = output.with_name(f"{output.name}.records.jsonl")
    config = load_config(options.model)
    kind = kind_of_config(config)
    study = kind.pipeline == "studies"
    if options.files:
        text, root = file_record(options.files, prompt, study=study)
        if write:
            content = hashlib.sha256(text.encode()).hexdigest()
            _starts_over(options, {"data_sha256": content, "root": str(root.resolve())})
            data.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(data, text)
        return options.model_copy(update={"data": str(data), "root": str(root)})
    if study:
        raise RecipeError(
            f"--folder asks a question about each file, and model {options.model} reads studies; "
            "give --data with a record of each study"
        )
    folder = Path(str(options.folder))
    if write:
        fresh = _starts_over(options, {"prompt": options.prompt, "root": str(folder.resolve())})
        existing: Existing = "replace" if fresh else "extend"
        if options.merge or options.own_shard is not None:  # tasks on several machines: one list
            existing = "keep"
        kinds = set(load_processor(options.model).preprocess)
        if "masks" in kind.gives(config):
            kinds.add("volume")  # a model of images segments its slices
        written = [options.masks_folder, options.reports_folder]
        write_folder_records(data, folder, prompt, kinds, existing=existing, left_out=written)
    return options.model_copy(update={"data": str(data), "root": str(folder)})


def _starts_over(options: InferOptions, own: Config) -> bool:
    """Return whether no records of an earlier run are to be kept. Raises `RecipeError`."""
    results = Results(_lines_file(options), own)
    return (
        results.starts_over(overwrite=options.overwrite, partial=True)
        or not results.sidecar.exists()
    )


def run_settings(options: InferOptions | EmbedOptions) -> Config:
    """Return the settings that the replies depend on; they are kept with the output."""
    data = Path(str(options.data))
    settings: Config = {}
    if isinstance(options, InferOptions) and options.folder is not None:
        settings["prompt"] = options.prompt  # records of new files are added at the end
    else:
        try:
            with data.open("rb") as stream:
                settings["data_sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror or error})", file=data) from None
    settings |= {
        "root": str(Path(options.root or data.parent).resolve()),
        "model_fingerprint": model_fingerprint(Path(options.model).expanduser()),
        "dtype": options.dtype,
    }
    if isinstance(options, EmbedOptions):
        return settings | options.model_dump(include={"captions", "vectors", "class_texts"})
    return settings | {"generation": options.generation.model_dump()}


def mask_settings(options: InferOptions) -> Config:
    """Return the settings that the masks of replies depend on, beside those of `run_settings`."""
    own = options.model_dump(include={"mask_format", "rle", "overlays"})
    return {"masks": options.segmentation.model_dump() | own}


def _generate(job: _Job, rank: int, world: int, counter: _Counter) -> None:
    """Generate the replies that are missing: as a rank of a launch, in processes, or here."""
    if world > 1:
        _generate_shard(job, rank, world, lambda done, errors: counter.note(rank, done, errors))
    elif job.options.processes > 1 and counter.total > 0:
        _generate_in_processes(job.options, counter)
    elif counter.total > 0:
        _generate_shard(job, 0, 1, lambda done, errors: counter.note(0, done, errors))


def _generate_shard(job: _Job, rank: int, world: int, note: Callable[[int, int], None]) -> None:
    """Generate replies to this rank's shard of the records that have none yet.

    Records that were never tried come first. Those that failed, in this run or earlier ones, are
    tried at the end, when their files may be available again.
    """
    _stop_with_parent()
    results = Results(_lines_file(job.options), {})
    with results.append(rank=rank, world=world) as appender:
        if isinstance(job.options, EmbedOptions) or job.of_studies:  # every file costs the same
            order = list(range(len(job.records)))
        else:
            assert isinstance(job.processor, ConversationProcessor)
            preprocess = job.processor.preprocess
            order = order_by_length(
                job.records,
                {
                    name: count * preprocess[name].max_items
                    for name, count in job.processor.num_tokens.items()
                },
            )
        owned = set(owned_indices(job.records, _own_shard(job.options)))
        order = [index for index in order if index in owned]
        lines = results.done()
        left = _left(job.options, shard_indices(order, rank=rank, world=world).tolist(), lines)
        fresh = [index for index in left if index not in lines]
        failed = [index for index in left if index in lines]
        logger.debug(
            "process %d of %d: %d records to answer", rank, world, len(fresh) + len(failed)
        )
        work = _Shard(job, world, appender, note)
        if fresh or (failed and work.any_answerable(failed)):
            work.load_model(_device_of_rank(job.device, rank))
            again = work.generate(fresh)
            work.generate([*failed, *again])


def _own_shard(options: InferOptions | EmbedOptions) -> Shard | None:
    return options.own_shard if isinstance(options, InferOptions) else None


def _lines_file(options: InferOptions | EmbedOptions) -> Path:
    """Return the file that the lines of a run are written to."""
    return Path(options.lines_file if isinstance(options, InferOptions) else options.output)


def _left(
    options: InferOptions | EmbedOptions,
    indexes: Sequence[int],
    lines: Mapping[int, ResultLine],
) -> list[int]:
    """Return the records without a reply that a run tries."""
    only_failed = isinstance(options, InferOptions) and options.only_failed
    return [
        index
        for index in indexes
        if ("error" in lines[index] if index in lines else not only_failed)
    ]


class _Shard:
    """The shard of one rank.

    Args:
        job: inputs of the run.
        world: number of processes of the run.
        appender: writes the lines.
        note: called with the number of records that this process tried, and of those without a
            reply.
    """

    def __init__(
        self, job: _Job, world: int, appender: Appender, note: Callable[[int, int], None]
    ) -> None:
        self.job, self.options, self.world = job, job.options, world
        options = job.options
        self.processor = job.processor
        self.appender, self.note = appender, note
        self.engine: Answers | None = None
        self.masks: ReplyMasks | None = None
        self.reports: ReportWriter | None = None
        if isinstance(options, InferOptions) and options.report_format != "none":
            several = series_choice(job.processor.preprocess.get("volume"))
            self.reports = ReportWriter.of(options, several=several)
        self.sliced: SlicedVolumes | None = None
        """Shows volumes as slices, to models that read images alone."""
        if job.masks and isinstance(options, InferOptions):
            self.sliced = SlicedVolumes(cast("LVLMProcessor", job.processor), options.segmentation)
        self._replied: dict[int, bool] = {}
        """Records that were tried, and whether the last try gave a reply."""
        self._unavailable = 0
        """Consecutive records whose files were unavailable."""

    def load_model(self, device: torch.device) -> None:
        """Read the weights."""
        options = self.options
        if self.job.of_studies:
            self.engine = load_studies(options, self.job.of_studies, self._reports(), device=device)
            return
        if isinstance(options, EmbedOptions):
            self.engine = EmbeddingEngine(
                load_embedder(
                    options.model, device=device, dtype=options.dtype, batch_size=options.batch_size
                ),
                options,
            )
            return
        self.engine, self.processor = load_engine(
            options.model,
            options.generation,
            device=device,
            dtype=options.dtype,
            slots=options.batch_size,
        )
        if self.job.masks:
            view = self.processor.mask_view
            several = series_choice(self.processor.preprocess[str(view)])
            writer = MaskWriter.of(options, several=several)
            segmenter = Segmenter(self.engine, options.segmentation, soft=writer.soft)
            self.masks = ReplyMasks(segmenter, writer)

    def _reports(self) -> dict[str, str]:
        """Return the reports of the records by id, where images are matched with them."""
        if "matches" not in self.job.of_studies:
            return {}
        found: dict[str, str] = {}
        for index in range(len(self.job.records)):
            with suppress(DataError):  # the line of the record says what is wrong with it
                study = self.job.records[index]
                if study.id is not None and study.report is not None:
                    found[study.id] = study.report
        return found

    def any_answerable(self, indexes: Sequence[int]) -> bool:
        """Return True if one of the records that failed before is good now; needs no weights.

        If none is, their lines get the current reasons.
        """
        tried = []
        for prepared in self._prepare(indexes, size=1):
            if prepared.batch is not None:
                return True
            tried.append(prepared)
        for prepared in tried:
            self._take(prepared, [])
        return False

    def generate(self, indexes: Sequence[int]) -> list[int]:
        """Generate replies to records, and return those that should be tried again at the end."""
        assert self.engine is not None
        # The engine fills the slots of finished prompts, so it is given several batches at once.
        size = self.options.batch_size * _BATCHES_AHEAD
        again: list[int] = []
        for prepared in self._prepare(indexes, size=size):
            replies = self.engine.generate(prepared.batch) if prepared.batch is not None else []
            if self.masks is not None and prepared.batch is not None:
                prepared, replies = self._with_masks(prepared, replies)
            if self.reports is not None:
                prepared, replies = self._with_reports(prepared, replies)
            self._take(prepared, replies)
            again += [problem.named["index"] for problem in prepared.problems if problem.retry]
            _stop_with_parent()
        return again

    def _with_masks(
        self, prepared: Prepared, replies: Sequence[Answer]
    ) -> tuple[Prepared, list[Answer]]:
        """Return the replies with their masks, whose files are written.

        A record whose masks cannot be made has no reply but a reason.
        """
        assert self.masks is not None
        shown = [self._shown(named) for named in prepared.named]
        names = [self._name(named) for named in prepared.named]
        made = self.masks.of(prepared.batch, cast(Sequence[Reply], replies), names, shown)
        return _without_failed(prepared, made)

    def _with_reports(
        self, prepared: Prepared, replies: Sequence[Answer]
    ) -> tuple[Prepared, list[Answer]]:
        """Return the replies with their reports, whose files are written.

        A record whose report cannot be made has no reply but a reason.
        """
        assert self.reports is not None
        made: list[Answer | DataError] = []
        for named, reply in zip(prepared.named, replies, strict=True):
            try:
                made.append(self.reports.write(self._name(named), reply, self._shown(named)))
            except DataError as error:
                made.append(error)
        return _without_failed(prepared, made)

    def _name(self, named: RecordName) -> str:
        """Return the name of a record's files."""
        return f"{named['index']:06d}_{named.get('id', '')}"

    def _shown(self, named: RecordName) -> list[Shown]:
        """Return the images and volumes of a record."""
        records, index = self.job.records, named["index"]
        return [
            Shown(media.branch, rereadable(records.media_source(index, media)))
            for media in records[index].media
        ]

    def _prepare(self, indexes: Sequence[int], *, size: int) -> Iterator[Prepared]:
        batches = [list(indexes[start : start + size]) for start in range(0, len(indexes), size)]
        if not batches:
            return
        make: Callable[..., Any] = make_prompts
        if self.job.of_studies:
            make = make_studies
        elif isinstance(self.options, EmbedOptions):
            make = make_files
        for prepared in _load(
            Prompts(
                self.job.records,
                self.processor,
                batches,
                context=self.job.context,
                make=make,
                sliced=self.sliced,
            ),
            self.options,
            self.world,
        ):
            if prepared.lost is not None:
                raise InputLostError(
                    f"{prepared.lost}; what was answered is kept in {self.appender.file}"
                )
            yield prepared

    def _take(self, prepared: Prepared, replies: Sequence[Answer]) -> None:
        """Write the lines of one batch.

        Raises:
            InputLostError: the files of the last `_OUTAGE` records are unavailable.
        """
        self.appender.add(output_lines(prepared, replies))
        self._replied |= {named["index"]: True for named in prepared.named}
        self._replied |= {problem.named["index"]: False for problem in prepared.problems}
        self.note(len(self._replied), list(self._replied.values()).count(False))
        for problem in prepared.problems:
            if problem.unavailable:
                self._unavailable += 1
                if self._unavailable >= _OUTAGE:
                    raise InputLostError(
                        f"{self._unavailable} consecutive records could not be read, for a cause "
                        f"outside the records ({problem.reason}); what was answered is kept in "
                        f"{self.appender.file}. Run the same command again when the files are "
                        "available: it tries every record that has no reply"
                    )
        if prepared.read_files:
            self._unavailable = 0


def _without_failed(
    prepared: Prepared, made: Sequence[Answer | DataError]
) -> tuple[Prepared, list[Answer]]:
    """Return a batch whose failed records are problems, and the answers of the others."""
    problems = [
        Problem(named, reason(error), retry=isinstance(error, MissingFileError))
        for named, error in zip(prepared.named, made, strict=True)
        if isinstance(error, DataError)
    ]
    kept = [
        (named, answer)
        for named, answer in zip(prepared.named, made, strict=True)
        if not isinstance(answer, DataError)
    ]
    done = replace(
        prepared,
        named=[named for named, _ in kept],
        problems=[*prepared.problems, *problems],
    )
    return done, [answer for _, answer in kept]


def output_lines(prepared: Prepared, replies: Sequence[Answer]) -> list[ResultLine]:
    """Return the output lines of one batch."""
    lines: list[ResultLine] = [
        {**problem.named, "error": problem.reason} for problem in prepared.problems
    ]
    for problem in prepared.problems:
        logger.debug("record %d: no reply: %s", problem.named["index"], problem.reason)
    for named, reply in zip(prepared.named, replies, strict=True):
        lines.append(cast(ResultLine, {**named, **reply.line()}))
    return lines


def _load(prompts: Prompts, options: InferOptions | EmbedOptions, world: int) -> Iterator[Prepared]:
    """Yield batches in order, prepared in other processes while the model answers."""
    workers = options.workers
    if workers is None:
        # Starting workers costs more than it saves on a handful of batches.
        cores = len(os.sched_getaffinity(0)) // world
        workers = min(8, cores - 1, len(prompts) // 8)
    yield from DataLoader(
        prompts,
        batch_size=None,
        num_workers=max(0, workers),
        worker_init_fn=ignore_stops,
        prefetch_factor=4 if workers > 0 else None,
    )


def _context(config: PreTrainedConfig, options: InferOptions) -> int | None:
    """Return the longest prompt in tokens, or None for no limit.

    Raises:
        RecipeError: no prompt fits.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is None:
        return None
    left = int(longest) - options.generation.max_new_tokens
    if left < 1:
        raise RecipeError(
            f"max_new_tokens {options.generation.max_new_tokens}: the model's context of "
            f"{longest} tokens leaves no tokens for a prompt; lower max_new_tokens"
        )
    return left


def _device_of_rank(device: torch.device, rank: int) -> torch.device:
    """Return the device of one of several processes: GPUs are assigned in turn."""
    if device.type == "cuda" and device.index is None:
        local = int(os.environ.get("LOCAL_RANK", rank))
        return torch.device("cuda", local % torch.cuda.device_count())
    return device


@contextmanager
def _launched() -> Iterator[tuple[int, int]]:
    """Yield rank and number of the processes of a launch; (0, 1) without one."""
    world = launched_world_size()
    if world == 1 or torch.distributed.is_initialized():
        yield 0, 1
        return
    torch.distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)
    try:
        yield torch.distributed.get_rank(), world
    finally:
        torch.distributed.destroy_process_group()


def wait_for_ranks() -> None:
    """Wait until every rank of a launch is here; without a launch there is nothing to wait for."""
    with _launched() as (_, world):
        _wait_for_all(world)


def _wait_for_all(world: int) -> None:
    if world > 1:
        torch.distributed.barrier()


def _generate_in_processes(options: InferOptions | EmbedOptions, counter: _Counter) -> None:
    """Generate the shards in several processes on this machine."""
    context = multiprocessing.get_context("spawn")
    with safe_path():  # the queue starts a process too, which tracks semaphores
        messages: Queue[_Message] = context.Queue()
    plugins = [str(path) for path in loaded_plugins()]
    level = logging.getLogger("medm").getEffectiveLevel()
    children = [
        context.Process(
            target=_child, args=(options, rank, options.processes, plugins, level, messages)
        )
        for rank in range(options.processes)
    ]
    with safe_path():
        for child in children:
            child.start()
    try:
        _watch(children, messages, counter)
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.join()


def _watch(children: Sequence[BaseProcess], messages: Queue[_Message], counter: _Counter) -> None:
    """Handle the messages of the children until all are done. Raises `MedmError` if one fails."""
    while True:
        try:
            message = messages.get(timeout=0.5)
        except queue.Empty:
            codes = [child.exitcode for child in children]
            for rank, code in enumerate(codes):
                if code:
                    raise MedmError(
                        f"process {rank} of {len(children)} ended with status {code}"
                        + (" (killed; perhaps for memory)" if code < 0 else "")
                        + "; what was answered is kept, and the same command resumes"
                    ) from None
            if all(code == 0 for code in codes):
                return
            continue
        if isinstance(message, logging.LogRecord):
            logging.getLogger(message.name).handle(message)
        elif isinstance(message, MedmError):
            raise message
        else:
            counter.note(*message)


def _child(
    options: InferOptions | EmbedOptions,
    rank: int,
    world: int,
    plugins: list[str],
    level: int,
    messages: Queue[_Message],
) -> None:
    """Run one process of several.

    It ignores SIGINT and ends with its parent, which SIGINT from a terminal reaches too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    # Log lines are printed by the parent, in its form; the first process speaks for all.
    handler = QueueHandler(messages)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(
        level=logging.ERROR if rank else logging.WARNING, handlers=[handler], force=True
    )
    logging.getLogger("medm").setLevel(logging.ERROR if rank else level)
    try:
        for plugin in plugins:
            load_plugin(plugin)
        _generate_shard(
            _open_job(options),
            rank,
            world,
            lambda done, errors: messages.put((rank, done, errors)),
        )
    except MedmError as error:  # not the error itself: some of them cannot be rebuilt from a pickle
        messages.put((RecipeError if isinstance(error, RecipeError) else MedmError)(str(error)))
    except (OSError, RuntimeError, EOFError) as error:
        text = explain(error)
        if text is None:
            raise
        messages.put(MedmError(text))


def _stop_with_parent() -> None:
    """Exit if the parent of this process was killed, which unlocks its file for a new run."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit(1)


def write_csv(file: Path, lines: Mapping[int, ResultLine]) -> None:
    """Write id, reply and error of each record, in the order of the records."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("id", "reply", "error"))
    for index, line in sorted(lines.items()):
        table.writerow((line.get("id", index), line.get("reply", ""), line.get("error", "")))
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, text.getvalue())


def write_conversations(
    options: InferOptions, records: Records[Sample, Example], lines: Mapping[int, ResultLine]
) -> None:
    """Write the records in MedM-VL's form, with the new reply as last turn.

    The reply of the annotation file is kept as `answer`.
    """
    assert options.json_output is not None
    items = []
    for index in range(len(records)):
        try:
            record = records.files[0][index]
        except DataError:
            record = {}  # invalid JSON: only the error is written
        items.append(
            _indented(with_reply(record if isinstance(record, dict) else {}, lines[index]))
        )
    file = Path(options.json_output)
    file.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(items)
    atomic_write_text(file, f"[\n{text}\n]\n")


def _indented(item: JsonObject) -> str:
    try:
        return json.dumps(item, ensure_ascii=False, allow_nan=False, indent=2)
    except RecursionError:  # the writer without indentation goes as deep as the reader did
        return json.dumps(item, ensure_ascii=False, allow_nan=False)


def with_reply(record: JsonObject, line: ResultLine) -> JsonObject:
    """Return a record with its reply appended in the record's own form, or with its `error`."""
    if "error" in line:
        return {**record, "error": line["error"]}
    name = "messages" if "messages" in record else "conversations"
    turns = list(record[name])
    by_role = "role" in turns[-1]
    role, text = ("role", "content") if by_role else ("from", "value")
    if turns[-1][role] in ("gpt", "assistant"):
        turns.pop()
    if "answer" in line:
        record = {**record, "answer": line["answer"]}
    return {
        **record,
        name: [*turns, {role: "assistant" if by_role else "gpt", text: line["reply"]}],
    }
