"""`medm eval`: items of a benchmark, predicted, scored, compared and reported."""

from __future__ import annotations

import itertools
import json
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from medm.errors import DataError, MedmError, RecipeError
from medm.evaluation.cases import choose_cases, render_thumbnails
from medm.evaluation.options import EvalOptions, EvalTaskOptions
from medm.evaluation.prediction_files import PredictionsFile, join
from medm.evaluation.predictors import Items, Predictions, Predictor, require_match
from medm.evaluation.report import write_reports, write_summary
from medm.evaluation.task_report import TaskReport
from medm.files import atomic_write_text
from medm.launcher import launched_rank
from medm.metrics.compare import Comparison, compare
from medm.tasks import TASKS
from medm.tasks.base import Scores, Task
from medm.types import JsonObject, Sample

if TYPE_CHECKING:
    from medm.inference.batch import Progress

logger = logging.getLogger(__name__)

_VERSIONS = ("medm", "torch", "transformers")


@dataclass(slots=True)
class _Run:
    """One benchmark of an evaluation."""

    block: EvalTaskOptions
    task: Task
    predictor: Predictor
    against: Predictor | None
    """Predictions of another run to compare with."""
    items: Items


def evaluate(options: EvalOptions, *, progress: Progress | None = None) -> list[TaskReport] | None:
    """Predict and score the items of every task, and write its files below `output_dir`.

    The files of a task are `questions.jsonl`, `predictions.jsonl` (from which a stopped run
    resumes), `results.json`, `report.md` and `report.html`; a summary of all tasks is in
    `output_dir` itself.

    Args:
        options: of the run.
        progress: called with the progress of the inference of a task.

    Returns:
        One report a task; None on ranks of a launch other than rank 0.

    Raises:
        DataError: a benchmark's folder is incomplete, or predictions belong to other items.
        RecipeError: a task's options do not fit, its predictions lack what it scores, or a folder
            holds replies of another run.
        MedmError: as `infer`.
    """
    trial = any(block.predictions is None for block in options.tasks)
    # Every source, folder and file is checked before anything is predicted.
    sources = [_sources(options, block) for block in options.tasks]
    runs = [_open(options, *source) for source in sources]
    for run in runs:
        check_items(run.task, run.predictor, run.against, run.items, trial=trial)
    for run in runs:
        make_folder(run.items.folder)
    reports = []
    for run in runs:
        predictions = run.predictor.predict(run.items, progress=progress)
        if launched_rank() == 0:
            reports.append(_score(options, run, predictions))
    if launched_rank() > 0:
        return None
    write_summary(Path(options.output_dir), reports)
    return reports


def predictor_of(options: EvalOptions, block: EvalTaskOptions) -> Predictor:
    """Return the source of a task's predictions: the file that it names, or the model of the run.

    Raises:
        CheckpointError: there is no model that medm saved.
        DataError: the file cannot be read.
    """
    if block.predictions is not None:
        return PredictionsFile(block.predictions, options)
    if options.model is None:
        raise RecipeError("model: needed where a task has no predictions")
    from medm.evaluation.model_predictor import open_model

    return open_model(options.model, options)


def _sources(
    options: EvalOptions, block: EvalTaskOptions
) -> tuple[EvalTaskOptions, Task, Predictor, Predictor | None]:
    """Return a task and the sources of its predictions.

    Raises:
        RecipeError: a source lacks a field that the task scores.
    """
    task = build_task(block)
    predictor = predictor_of(options, block)
    against = None
    if block.against is not None:
        against = PredictionsFile(str(predictions_of(block)), options)
    for source in (predictor, against):
        if source is not None:
            require_match(block.task.label, task.needs, source)
    return block, task, predictor, against


def _open(
    options: EvalOptions,
    block: EvalTaskOptions,
    task: Task,
    predictor: Predictor,
    against: Predictor | None,
) -> _Run:
    all_items = predictor.beyond_limit or against is not None
    items = Items(
        task=block.task.label,
        samples=samples_of(task, block, limit=None if all_items else block.limit),
        limit=block.limit,
        root=Path(block.data),
        folder=Path(options.output_dir) / block.task.label,
        needs=task.needs,
        class_texts=task.class_texts(),
        labels=task.labels(),
        matched=task.matched,
    )
    return _Run(block, task, predictor, against, items)


def check_items(
    task: Task, predictor: Predictor, against: Predictor | None, items: Items, *, trial: bool
) -> None:
    """Refuse, before anything is predicted, items that cannot be scored afterwards.

    Args:
        task: the task.
        predictor: the source of its predictions.
        against: predictions to compare with.
        items: the task's items.
        trial: also score the predictions that exist, with empty ones for the rest.

    Raises:
        DataError: two items have one id, an image is missing, a reference cannot be scored, a field
            is missing, or predictions cannot be read or belong to other items.
        DeviceError: the device is not there, or a package or a file that a metric needs is missing.
    """
    counts = Counter(sample.id for sample in items.samples)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise DataError(
            f"{len(twice)} ids stand for several items of {items.task}, the first is {twice[0]!r} "
            f"({counts[twice[0]]} items); replies are joined by id, so give each item one of its "
            "own",
            file=str(items.root),
        )
    for source in (predictor, against):
        if source is not None:
            source.check(items)
    if trial:
        available = predictor.available(items)
        samples = items.samples if available else items.scored
        task.check(join(samples, available)[: items.limit])


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


def build_task(block: EvalTaskOptions) -> Task:
    """Return the task that a block names."""
    return TASKS.get(block.task.name)(**block.task.model_dump(exclude={"name"}))


def samples_of(task: Task, block: EvalTaskOptions, *, limit: int | None = None) -> list[Sample]:
    """Return the items of a block's split, or the first `limit` of them.

    Raises:
        DataError: the folder is incomplete.
    """
    split = block.split or task.eval_split
    samples = list(itertools.islice(task.samples(Path(block.data), split), limit))
    if not samples:
        raise DataError(f"split {split!r} of {block.task.name} holds no items", file=block.data)
    return samples


def _records(task: Task, items: Items, predictions: Predictions) -> tuple[list[JsonObject], int]:
    """Return the scored items with their predictions, and the number of those that have one."""
    records = join(items.samples, predictions)[: items.limit]
    replied = {name for name, prediction in predictions.items() if prediction.error is None}
    answered = sum(str(record["id"]) in replied for record in records)
    records = [
        task.measure_item(record, predictions.get(str(record["id"])), items.root)
        for record in records
    ]
    return records, answered


def _score(options: EvalOptions, run: _Run, predictions: Predictions) -> TaskReport:
    block, task, items = run.block, run.task, run.items
    records, answered = _records(task, items, predictions)
    entry = TASKS.entry(block.task.name)
    report = TaskReport(
        task=block.task.label,
        summary=entry.summary,
        folder=items.folder,
        metadata=_metadata(block, task) | run.predictor.metadata(),
        n=len(records),
        answered=answered,
        scores=task.score(records),
    )
    notes = report.scores.notes
    if answered == 0:
        notes.insert(0, f"nothing was answered: no reply came for any of the {len(records)} items")
    if block.limit is not None:
        notes.append(f"only the first {len(records)} items: these are not the benchmark's numbers")
    if run.against is not None:
        report.against = block.against
        other, _ = _records(task, items, run.against.available(items))
        report.comparisons = _compare(task, other, report.scores)
    worst, drawn = choose_cases(
        report.scores,
        records,
        items.scored,
        task.without_models(),
        count=options.cases,
        seed=options.seed,
    )
    render_thumbnails([*worst, *drawn], items.root, items.folder, shown=run.predictor.preprocess())
    report.worst, report.random = worst, drawn
    text = json.dumps(defined(report.as_json()), indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write_text(items.folder / "results.json", text + "\n")
    write_reports(report)
    return report


def defined(value: object) -> object:
    """Return plain values with null in place of NaN, which is not JSON."""
    if isinstance(value, dict):
        return {key: defined(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [defined(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _metadata(block: EvalTaskOptions, task: Task) -> JsonObject:
    """Return the metadata that does not depend on the source of the predictions."""
    return {
        "options": block.task.model_dump(mode="json"),
        "data": block.data,
        "split": block.split or task.eval_split,
        "limit": block.limit,
        "versions": {name: version(name) for name in _VERSIONS},
    }


def _compare(task: Task, other: Sequence[JsonObject], scores: Scores) -> list[Comparison]:
    """Compare every metric of this run with the same metric of the other one, item by item."""
    by_name = {result.name: result for result in task.score(other).results}
    return [
        compare(result, by_name[result.name], task.resampling)
        for result in scores.results
        if result.name in by_name
        and by_name[result.name].n == result.n > 0
        and not math.isnan(result.value)
        and result.reweighted is not None  # a threshold, for instance, is no score
    ]


def predictions_of(block: EvalTaskOptions) -> Path:
    """Return the file of predictions that `against` names, by itself or by its folder.

    Raises:
        DataError: no such file.
    """
    assert block.against is not None
    against = Path(block.against)
    places = (against / "predictions.jsonl", against / block.task.label / "predictions.jsonl")
    file = next((place for place in places if place.is_file()), against)
    if not file.is_file():
        raise DataError(
            f"no predictions to compare with; expected a file, or a folder with {places[0].name}",
            file=against,
        )
    return file
