"""`medm eval`: questions of a benchmark, answered, scored, compared and reported."""

from __future__ import annotations

import itertools
import json
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medm.errors import CheckpointError, DataError, MediaError, MedmError, RecipeError
from medm.evaluation.cases import choose_cases, draw_pictures
from medm.evaluation.options import EvalOptions, EvalTaskOptions
from medm.evaluation.prediction_files import join, read_predictions
from medm.evaluation.report import write_reports, write_summary
from medm.evaluation.task_report import TaskReport
from medm.files import atomic_write_text
from medm.imaging import resolve_inside
from medm.inference.batch import Progress, infer
from medm.inference.generator import pick_device
from medm.inference.options import InferenceOptions, InferOptions
from medm.inference.predictions import model_fingerprint
from medm.launcher import launched_rank
from medm.metrics import METRICS
from medm.metrics.bertscore import require_encoder
from medm.metrics.compare import Comparison, compare
from medm.tasks import TASKS, CustomOptions
from medm.tasks.base import Scores, Task, join_predictions, record_of
from medm.tasks.masks import WITHOUT_MASK, MaskTask
from medm.types import Sample

logger = logging.getLogger(__name__)

_WITH_A_MODEL = ("bertscore", "radeval", "meteor-java")
"""Metrics that start another program or load a model: not for single items, nor for a trial."""
_VERSIONS = ("medm", "torch", "transformers")


def evaluate(options: EvalOptions, *, progress: Progress | None = None) -> list[TaskReport] | None:
    """Answer and score every task, and write its files into a folder of its own below `output_dir`.

    These are `questions.jsonl`, `predictions.jsonl` (which a run that was stopped goes on with), `results.json`,
    `report.md` and `report.html`; a summary of all tasks stands in `output_dir` itself.

    Args:
        options: see there.
        progress: told how far the answering of a task is.

    Returns:
        One report a task; None on ranks of a launch other than rank 0.

    Raises:
        DataError: a benchmark's folder is incomplete, or predictions belong to other items.
        RecipeError: a task's options do not fit, or a folder holds answers of another run.
        MedmError: as `infer`.
    """
    answering = any(block.predictions is None for block in options.tasks)
    prepared = []
    for block in options.tasks:  # every folder and every file is looked at before anything is answered
        task = build_task(block)
        samples = samples_of(task, block)
        check_task(task, block, samples, trial=answering)
        prepared.append((block, task, samples))
    if answering:
        check_model(options)
    for block in options.tasks:
        make_folder(Path(options.output_dir) / block.task.name)
    reports = []
    for block, task, samples in prepared:
        folder = Path(options.output_dir) / block.task.name
        predictions = Path(block.predictions) if block.predictions else folder / "predictions.jsonl"
        if block.predictions is None:
            _answer(options, block, samples[: block.limit], folder, progress)
        if launched_rank() > 0:
            continue  # the first rank scores
        reports.append(_score(options, block, task, samples, predictions, folder))
    if not reports:
        return None
    write_summary(Path(options.output_dir), reports)
    return reports


def check_task(task: Task, block: EvalTaskOptions, samples: Sequence[Sample], *, trial: bool) -> None:
    """Refuse, before anything is answered, what would stop the scoring afterwards.

    Args:
        task: the task.
        block: its options.
        samples: its items.
        trial: also score replies once, empty ones where none are there yet. That takes seconds, answering hours.

    Raises:
        DataError: two items have one id, an image is missing, a reference cannot be scored, a field is missing, or
            predictions cannot be read or belong to other items.
        DeviceError: a metric needs a package or a file that is not here.
        RecipeError: the answers are masks, and a model of medm writes text.
    """
    counts = Counter(sample.id for sample in samples)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise DataError(
            f"{len(twice)} ids stand for several items of {block.task.name}, the first is {twice[0]!r} "
            f"({counts[twice[0]]} items); replies are joined by id, so give each item one of its own",
            file=block.data,
        )
    scored = samples[: block.limit]
    if block.predictions is None:
        require_answerable(task, block, scored)
    for file in (block.predictions, None if block.against is None else predictions_of(block)):
        if file is not None:
            join(samples, read_predictions(Path(file), samples, limit=block.limit))
    if not trial or task.answers == "mask":  # references of masks are read one by one, as the masks are
        return
    records = join_predictions(scored, {})
    if block.predictions is not None:
        records = join(samples, read_predictions(Path(block.predictions), samples, limit=block.limit))[: block.limit]
    _require_models(block)
    task.resampling_of(records)
    build_task(block, quick=True).score(records)


def _require_models(block: EvalTaskOptions) -> None:
    """Refuse metrics whose model or program is not on this machine, without starting it.

    Raises:
        CheckpointError: there is no encoder for BERTScore.
        DeviceError: a package or Java is missing.
    """
    settings = block.task.model_dump()
    encoders = [settings.get("bertscore")]
    if isinstance(block.task, CustomOptions):
        metrics = [item for item in block.task.model_dump()["metrics"] if item["name"] in _WITH_A_MODEL]
        encoders += [item["path"] for item in metrics if item["name"] == "bertscore"]
        for item in metrics:
            if item["name"] != "bertscore":
                METRICS.get(item["name"])([], [])  # of no items: only what it needs is looked for
    for path in encoders:
        if path is not None:
            require_encoder(path)


def check_model(options: EvalOptions) -> None:
    """Refuse a model folder or a device that is not there, before any weight is read.

    Raises:
        CheckpointError: there is no model that medm saved.
        DeviceError: the device is not there.
    """
    assert options.model is not None  # EvalOptions sees to it
    folder = Path(options.model).expanduser()
    for name in ("config.json", "processor_config.json"):
        if not (folder / name).is_file():
            found = f"no {name} in it" if folder.is_dir() else "no such model folder"
            raise CheckpointError(f"{options.model}: {found}; expected a model folder that medm saved")
    pick_device(options.device)


def make_folder(folder: Path) -> None:
    """Create an output folder, and prove that files can be written to it.

    Raises:
        MedmError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0")
    except OSError as error:
        raise MedmError(
            f"{folder}: cannot be written ({error.strerror or error}); choose another output folder"
        ) from None


def build_task(block: EvalTaskOptions, *, quick: bool = False) -> Task:
    """The task that a block names.

    Args:
        block: its options.
        quick: without intervals and metrics that run a model, for scoring single items.
    """
    settings = block.task.model_dump(exclude={"name"})
    if quick:
        settings["rounds"] = 0
        if "bertscore" in settings:
            settings["bertscore"] = None
        if "metrics" in settings:
            settings["metrics"] = [item for item in settings["metrics"] if item["name"] not in _WITH_A_MODEL]
    return TASKS.get(block.task.name)(**settings)


def samples_of(task: Task, block: EvalTaskOptions) -> list[Sample]:
    """The items of the split: all of them where a file of answers may belong to any, else `limit` of them.

    Raises:
        DataError: the folder is incomplete.
    """
    split = block.split or task.eval_split
    needed = block.limit if block.predictions is None and block.against is None else None
    samples = list(itertools.islice(task.samples(Path(block.data), split), needed))
    if not samples:
        raise DataError(f"split {split!r} of {block.task.name} holds no items", file=block.data)
    return samples


def require_answerable(task: Task, block: EvalTaskOptions, samples: Sequence[Sample]) -> None:
    """Refuse what a model could not answer, before it is loaded.

    Raises:
        RecipeError: the answers are masks, and a model of medm writes text.
        DataError: an image or volume is missing. Without it a question could only count as wrong.
    """
    if task.answers == "mask":
        raise RecipeError(
            f"{block.task.name}: the answers are masks, and `medm eval` asks a model for text; give --predictions, a "
            'JSONL with a line {"id": ..., "mask": "file.npy"} an item'
        )
    missing: dict[str, str] = {}
    files = dict.fromkeys(media.path or "" for sample in samples for media in sample.media)
    for path in files:
        try:
            resolve_inside(Path(block.data), path)
        except MediaError as error:
            missing[path] = str(error)
    if missing:
        first, reason = next(iter(missing.items()))
        raise DataError(
            f"{len(missing)} of {len(files)} images and volumes that the questions of {block.task.name} name cannot be "
            f"opened, the first is {first!r} ({reason}); complete the folder",
            file=block.data,
        )


def _records(
    task: Task, block: EvalTaskOptions, samples: Sequence[Sample], predictions: Path
) -> tuple[list[dict[str, Any]], int]:  # fmt: skip
    """The items that are scored, each with its answer from a file of predictions, which may answer more of them.

    Returns:
        The records, and for how many of them a reply came.
    """
    answers = read_predictions(predictions, samples, limit=block.limit)
    records = join(samples, answers)[: block.limit]
    replied = {name for name, answer in answers.items() if answer.error is None}
    answered = sum(str(record["id"]) in replied for record in records)
    if isinstance(task, MaskTask):
        for record in records:
            answer = answers.get(str(record["id"]))
            if answer is not None and "dice" in answer.numbers:
                continue  # measured elsewhere
            name = answer.mask if answer is not None else None
            mask = resolve_inside(predictions.parent, name) if name is not None else None
            record.update(task.measure_file(Path(block.data), record, mask))
            record |= {"prediction": name or "", WITHOUT_MASK: mask is None}
    return records, answered


def _answer(
    options: EvalOptions, block: EvalTaskOptions, samples: Sequence[Sample], folder: Path, progress: Progress | None
) -> None:
    """Ask the model; answers of an earlier run stay."""
    questions = folder / "questions.jsonl"
    lines = (json.dumps(record_of(sample), ensure_ascii=False) for sample in samples)
    atomic_write_text(questions, "\n".join(lines) + "\n")
    if options.model is None:
        raise RecipeError("model: needed where a task has no predictions")
    infer(
        InferOptions(
            model=options.model, data=str(questions), root=block.data, output=str(folder / "predictions.jsonl"),
            **{name: getattr(options, name) for name in InferenceOptions.model_fields},
        ),
        progress=progress,
    )  # fmt: skip


def _score(
    options: EvalOptions, block: EvalTaskOptions, task: Task, samples: Sequence[Sample], predictions: Path, folder: Path
) -> TaskReport:  # fmt: skip
    records, answered = _records(task, block, samples, predictions)
    entry = TASKS.entry(block.task.name)
    report = TaskReport(
        entry.name, entry.summary, folder, _facts(options, block, task), len(records), answered, task.score(records)
    )
    if answered == 0:
        report.scores.notes.insert(0, f"nothing was answered: no reply came for any of the {len(records)} items")
    if block.limit is not None:
        report.scores.notes.append(f"only the first {len(records)} items: these are not the benchmark's numbers")
    if block.against is not None:
        report.against = block.against
        report.comparisons = _compare(task, block, samples, report.scores)
    worst, drawn = choose_cases(
        report.scores,
        records,
        samples[: block.limit],
        build_task(block, quick=True),
        count=options.cases,
        seed=options.seed,
    )
    draw_pictures([*worst, *drawn], Path(block.data), folder, model=options.model)
    report.worst, report.random = worst, drawn
    text = json.dumps(defined(report.as_json()), indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write_text(folder / "results.json", text + "\n")
    write_reports(report)
    return report


def defined(value: Any) -> Any:
    """Plain values with null in place of NaN, which is not JSON."""
    if isinstance(value, dict):
        return {key: defined(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [defined(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _facts(options: EvalOptions, block: EvalTaskOptions, task: Task) -> dict[str, Any]:
    """What the numbers depend on."""
    facts: dict[str, Any] = {
        "options": block.task.model_dump(mode="json"),
        "data": block.data,
        "split": block.split or task.eval_split,
        "limit": block.limit,
        "versions": {name: version(name) for name in _VERSIONS},
    }
    if block.predictions is not None:
        return facts | {"predictions": block.predictions}
    assert options.model is not None
    return facts | {
        "model": options.model,
        "model_fingerprint": model_fingerprint(Path(options.model)),
        "generation": options.generation.model_dump(),
        "dtype": options.dtype,
    }


def _compare(
    task: Task, block: EvalTaskOptions, samples: Sequence[Sample], scores: Scores
) -> list[Comparison]:  # fmt: skip
    """Every sound metric of this run against the same metric of the other one, item by item."""
    records, _ = _records(task, block, samples, predictions_of(block))
    by_name = {result.name: result for result in task.score(records).results}
    return [
        compare(result, by_name[result.name], task.resampling)
        for result in scores.results
        if result.name in by_name and by_name[result.name].n == result.n > 0 and not math.isnan(result.value)
    ]


def predictions_of(block: EvalTaskOptions) -> Path:
    """The file of predictions that `against` names, by itself or by its folder.

    Raises:
        DataError: there is none.
    """
    assert block.against is not None
    against = Path(block.against)
    places = (against / "predictions.jsonl", against / block.task.name / "predictions.jsonl")
    file = next((place for place in places if place.is_file()), against)
    if not file.is_file():
        raise DataError(
            f"no predictions to compare with; expected a file, or a folder with {places[0].name}", file=against
        )
    return file
