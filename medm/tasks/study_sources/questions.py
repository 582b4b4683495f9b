"""Questions about images as studies, from the files that their benchmarks read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from medm.errors import DataError
from medm.tasks.base import Task
from medm.tasks.pair_sources.base import LeftOut
from medm.tasks.slake import Slake
from medm.tasks.study_sources.base import StudyRow, StudySource
from medm.tasks.vqa_rad import VQARAD
from medm.types import JsonObject

_FIELDS = (
    "question", "answer_type", "question_type", "answer_scores", "unlisted", "content_type",
    "phrase_type", "modality", "organ",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Questions(StudySource):
    """The questions of a benchmark, each with its image and answer."""

    task: ClassVar[type[Task]]
    """The benchmark that reads the files."""

    def rows(self, folder: Path, split: str) -> Iterator[StudyRow]:
        for index, sample in enumerate(self.task().samples(folder, split)):
            fields = {name: sample.extra.get(name) for name in _FIELDS}
            yield StudyRow(
                file=folder,
                index=index,
                id=str(sample.id),
                images=tuple(media.path or "" for media in sample.media),
                extra={name: value for name, value in fields.items() if value is not None}
                | {"answer": sample.answer},
            )

    def records(self, folder: Path, split: str, *, left_out: LeftOut) -> Iterator[JsonObject]:
        """As `StudySource.records`; questions whose answer is in no published list are left out."""
        for record in super().records(folder, split, left_out=left_out):
            if record.get("unlisted"):
                fault = DataError(f"question {record['id']!r} has no class", file=folder)
                left_out.add("the answer is in no published list", fault)
                continue
            yield record


@dataclass(frozen=True, kw_only=True)
class VQARADQuestions(Questions):
    """VQA-RAD."""

    splits = VQARAD.splits
    source = "VQA-RAD"
    layout = VQARAD.layout
    task = VQARAD


@dataclass(frozen=True, kw_only=True)
class SlakeQuestions(Questions):
    """SLAKE, English."""

    splits = Slake.splits
    source = "SLAKE"
    layout = Slake.layout
    task = Slake
