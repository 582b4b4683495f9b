"""Choice of the items that a report shows, and their thumbnails.

A look at the worst items finds wrong references.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medm.errors import MedmError
from medm.imaging import ImagePreprocess, Preprocess, VolumePreprocess, resolve_inside
from medm.tasks.base import Scores, Task
from medm.types import JsonObject, Sample

logger = logging.getLogger(__name__)

_MEASURED_ALONE = 400
"""Most items scored one by one to find the worst, where no metric is a mean over items."""

_SHOWN: dict[str, Preprocess] = {
    "image": ImagePreprocess(fit="pad"),
    "volume": VolumePreprocess(scale="minmax"),
}
"""Preprocessing of a file where no model defines it."""


@dataclass(slots=True)
class Case:
    """One item of a report."""

    id: str
    question: str
    answer: str
    reply: str
    score: float | None
    metric: str | None
    sample: Sample
    images: list[str] = field(default_factory=list)
    """Files relative to the report."""
    problem: str | None = None
    """Reason for a missing image."""


def choose_cases(
    scores: Scores,
    records: Sequence[JsonObject],
    samples: Sequence[Sample],
    single: Task,
    *,
    count: int,
    seed: int,
) -> tuple[list[Case], list[Case]]:
    """Return the worst items and random ones.

    Args:
        scores: of all records.
        records: in the order of `samples`.
        samples: the items.
        single: the task without intervals, for scoring items alone.
        count: of each kind.
        seed: of the random ones, and of the choice among equally bad ones.
    """
    draw = random.Random(seed)
    metric, values = item_scores(scores, records, single, draw)
    place = draw.sample(
        range(len(records)), len(records)
    )  # scores of 0 and 1 have many equals: chance decides, not order
    worst = sorted(values, key=lambda index: (values[index], place[index]))[:count]
    others = [index for index in range(len(records)) if index not in worst]
    drawn = sorted(draw.sample(others, min(count, len(others))))

    def case(index: int) -> Case:
        sample, record = samples[index], records[index]
        question = sample.turns[-1].as_written
        return Case(
            str(sample.id),
            question.strip(),
            sample.answer or "",
            str(record.get("prediction") or ""),
            values.get(index),
            metric,
            sample,
        )

    return [case(index) for index in worst], [case(index) for index in drawn]


def item_scores(
    scores: Scores, records: Sequence[JsonObject], single: Task, draw: random.Random
) -> tuple[str | None, dict[int, float]]:
    """Return the name of a metric and its value by position of the item.

    Where no metric has values by item, a random part of the items is scored one by one.
    """
    for result in scores.results:
        if result.per_item is not None and len(result.per_item) == len(records):
            return result.name, {
                i: value for i, value in enumerate(result.per_item) if not math.isnan(value)
            }
    picked = sorted(draw.sample(range(len(records)), min(_MEASURED_ALONE, len(records))))
    name, values = None, {}
    for index in picked:
        results = single.score([records[index]]).results
        if results and not math.isnan(results[0].value):
            name, values[index] = results[0].name, results[0].value
    return name, values


def render_thumbnails(
    cases: Sequence[Case],
    root: Path,
    folder: Path,
    *,
    shown: Mapping[str, Preprocess] | None = None,
) -> None:
    """Write a PNG for each image and volume of the cases to `folder/cases`.

    A case whose file cannot be rendered gets the reason as its `problem`.

    Args:
        cases: the items.
        root: folder that media paths are relative to.
        folder: of the report.
        shown: preprocessing by view, as the model sees a file; a default one without it.
    """
    from medm.imaging.preview import save_contact_sheet

    views = {**_SHOWN, **(shown or {})}
    place = folder / "cases"
    for old in place.glob("*.png"):
        old.unlink()
    done: dict[tuple[str, str], str] = {}
    for case in cases:
        for media in case.sample.media:
            key = (media.branch, media.path or "")
            if key not in done:
                name = f"cases/{len(done):03d}.png"
                try:
                    place.mkdir(parents=True, exist_ok=True)
                    save_contact_sheet(
                        resolve_inside(root, key[1]),
                        views[media.branch],
                        folder / name,
                        slices=6,
                        tile=160,
                    )
                except MedmError as error:
                    case.problem = str(error)
                    continue
                done[key] = name
            case.images.append(done[key])
