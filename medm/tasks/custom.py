"""Task on a user's own records, with a list of metrics."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medm.data.record_files import RecordFile
from medm.data.turns import parse_record
from medm.errors import DataError, RecipeError
from medm.metrics import METRICS, BoxMetricOptions, MetricOptions
from medm.metrics.base import MetricResult, Resampling, mean_result
from medm.metrics.boxes import CODECS
from medm.metrics.choice import parse_wording
from medm.metrics.words import normalize_answer
from medm.tasks import scoring
from medm.tasks.base import Record, Scores, Task
from medm.tasks.benchmark_files import require
from medm.types import Sample

_FROM_TEXT = ("text", "label", "box", "score")
_LABELS = "label_names"
"""Field in which every record carries the labels of all of them: a part of the records may lack
some."""


class Custom(Task):
    """Questions from your own records; the reference is the last reply, or `answer`.

    Args:
        options: see `medm.tasks.CustomOptions`.
    """

    tag = "custom"
    splits = ("test", "train", "val")  # the file decides
    layout = (
        "the JSON or JSONL file that `path` names, there or in the working directory, and the "
        "images or volumes of its records"
    )

    def __init__(
        self,
        *,
        path: str,
        metrics: Sequence[Mapping[str, Any]],
        group_by: Sequence[str] = (),
        rounds: int = 1000,
        seed: int = 0,
        cluster_by: str | None = None,
    ) -> None:
        super().__init__(rounds=rounds, seed=seed, cluster_by=cluster_by)
        self.path = path
        self.group_by = tuple(group_by)
        self.metrics = [_metric_options(block) for block in metrics]
        for options in self.metrics:
            if options.takes not in _FROM_TEXT:
                raise RecipeError(
                    f"metric {options.name!r} compares {options.takes}s, which a text answer does "
                    f"not hold; a custom task takes metrics of {', '.join(_FROM_TEXT)}"
                )
        self.needs = frozenset(
            "scores" if options.takes == "score" else "text" for options in self.metrics
        )

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        self._known_split(split)
        file = RecordFile(self._file(Path(folder)))
        for index in range(len(file)):
            sample = parse_record(file[index], inference=True, file=file.path, index=index)
            if sample.answer is None:
                raise DataError(
                    "there is no answer to score against",
                    file=file.path,
                    index=index,
                    field="answer",
                )
            yield replace(sample, id=sample.id if sample.id is not None else str(index))

    def _file(self, folder: Path) -> Path:
        """Return the file of records: in the data folder, or where the path leads from here."""
        if not (folder / self.path).exists() and (own := Path(self.path)).is_file():
            return own
        return require(folder, self.path, layout=self.layout)

    def score(self, records: Iterable[Record]) -> Scores:
        rows = list(records)
        for name in self.group_by:
            if rows and all(row.get(name) is None for row in rows):
                found = sorted(
                    {key for row in rows for key, value in row.items() if value is not None}
                )
                raise DataError(
                    f"group_by: no record has {name!r}; the records have {', '.join(found)}",
                    file=self.path,
                )
        names = list(dict.fromkeys(str(row.get("answer")) for row in rows))
        return super().score([{**row, _LABELS: names} for row in rows])

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        resampling = self.resampling_of(records)
        results: list[MetricResult] = []
        for options in self.metrics:
            if options.takes == "score":
                results += self._areas(records, resampling)
                continue
            pair: tuple[Sequence[Any], Sequence[Any]] = scoring.texts(records)
            if options.name == "sensitivity-specificity":
                pair = _binary_labels(records)
            elif options.takes == "label":
                pair = _labels(records)
            settings = options.model_dump(exclude={"name"})
            results += METRICS.get(options.name)(*pair, resampling=resampling, **settings)
        boxes = [options for options in self.metrics if isinstance(options, BoxMetricOptions)]
        for codec in dict.fromkeys(
            options.codec for options in boxes if options.name.startswith("box-")
        ):
            results += _box_counts(records, codec, resampling)
        return results

    def without_models(self) -> Task:
        task = super().without_models()
        assert isinstance(task, Custom)
        task.metrics = [options for options in self.metrics if not options.external]
        return task

    def require_metrics(self) -> None:
        for options in self.metrics:
            options.require_available()

    def _areas(self, records: Sequence[Record], resampling: Resampling) -> list[MetricResult]:
        """AUROC of `scores` from a predictions file.

        An item has one number, or one for each class by name.
        """
        given = [record["scores"] for record in records if record.get("scores") is not None]
        if records and not given:
            raise DataError(
                "auroc needs 'scores' beside the replies (a number, or one for each class), "
                "which a file of --predictions brings; no item has them",
                file=self.path,
            )
        first = given[0] if given else 0.0
        if isinstance(first, Mapping):
            return scoring.class_areas(records, [str(name) for name in first], resampling)
        return scoring.binary_area(records, resampling)


def _metric_options(block: Mapping[str, Any]) -> MetricOptions:
    entry = METRICS.entry(str(block.get("name")))
    options = entry.options.model_validate(dict(block))
    if not isinstance(options, MetricOptions):
        raise TypeError(f"metric {entry.name!r}: its options class is no MetricOptions")
    return options


def _labels(records: Sequence[Record]) -> tuple[list[str | None], list[str]]:
    """Return the label that each prediction affirms, and the answers, both normalized.

    The candidates are the labels of all answers.
    """
    names = records[0][_LABELS] if records else []
    labels = {normalize_answer(name): name for name in names}
    guesses = [parse_wording(record["prediction"], labels) for record in records]
    return guesses, [normalize_answer(str(record["answer"])) for record in records]


def _binary_labels(records: Sequence[Record]) -> tuple[list[int], list[int]]:
    """0 and 1; a prediction that says neither is the wrong one."""
    truths = [int(truth or 0) for truth in scoring.binary(records, "answer")]
    predicted = scoring.binary(records, "prediction")
    return [
        1 - truth if guess is None else guess
        for guess, truth in zip(predicted, truths, strict=True)
    ], truths


def _box_counts(
    records: Sequence[Record], codec: str, resampling: Resampling
) -> list[MetricResult]:
    """Fractions of predictions with a malformed, and with a repaired box."""
    parsed = [CODECS[codec].parse(record["prediction"]) for record in records]
    signature = f"share of texts|codec:{codec}"
    return [
        mean_result(
            "box-malformed", [float(p.malformed > 0) for p in parsed], signature, resampling
        ),
        mean_result("box-repaired", [float(p.repaired > 0) for p in parsed], signature, resampling),
    ]
