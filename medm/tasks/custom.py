"""A user's own records with a list of metrics."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medm.data.files import RecordFile
from medm.data.records import parse_record
from medm.errors import DataError, RecipeError
from medm.metrics import METRICS
from medm.metrics.base import MetricResult
from medm.tasks.base import Record, Task
from medm.tasks.files import require
from medm.types import Sample

_FROM_TEXT = ("text", "label", "box")


class Custom(Task):
    """Questions are worded by the records themselves; the last reply, or `answer`, is the reference.

    Args:
        path: JSON or JSONL, relative to the data folder.
        metrics: blocks with a `name` and the metric's options.
        group_by: record fields whose values get a row each.
        rounds: bootstrap samples behind each interval.
        seed: seed of the bootstrap.
        cluster_by: record field whose equal values are drawn together.
    """

    tag = "custom"
    splits = ("test", "train")
    layout = "the JSON or JSONL file that `path` names, and the images or volumes of its records"

    def __init__(
        self, *, path: str, metrics: Sequence[Mapping[str, Any]], group_by: Sequence[str] = (), rounds: int = 1000,
        seed: int = 0, cluster_by: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(rounds=rounds, seed=seed, cluster_by=cluster_by)
        self.path = path
        self.fields = tuple(group_by)
        self.metrics = [dict(block) for block in metrics]
        for block in self.metrics:
            takes = METRICS.entry(str(block.get("name"))).options.takes  # type: ignore[attr-defined]
            if takes not in _FROM_TEXT:
                raise RecipeError(
                    f"metric {block['name']!r} compares {takes}s, which a text answer does not hold; a custom task "
                    f"takes metrics of {', '.join(_FROM_TEXT)}"
                )

    @property
    def group_by(self) -> tuple[str, ...]:  # type: ignore[override]
        """As told."""
        return self.fields

    def samples(self, folder: Path, split: str = "test", *, wording: random.Random | None = None) -> Iterator[Sample]:
        self._known_split(split)
        file = RecordFile(require(Path(folder), self.path, layout=self.layout))
        for index in range(len(file)):
            sample = parse_record(file[index], inference=True, file=file.path, index=index)
            if sample.answer is None:
                raise DataError("there is no answer to score against", file=file.path, index=index, field="answer")
            yield replace(sample, id=sample.id if sample.id is not None else str(index))

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        predictions = [record["prediction"] for record in records]
        answers = [str(record["answer"]) for record in records]
        results: list[MetricResult] = []
        for block in self.metrics:
            options = {key: value for key, value in block.items() if key != "name"}
            results += METRICS.get(block["name"])(
                predictions, answers, resampling=self.resampling_of(records), **options
            )
        return results
