"""VQA-RAD (Lau et al. 2018): questions about radiology images."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from medm.errors import DataError
from medm.metrics.base import MetricResult
from medm.tasks import prompts, scoring
from medm.tasks.answer_classes import AnswerMaps
from medm.tasks.base import Record, Task, make_sample, pick_template
from medm.tasks.benchmark_files import field_of, read_json_list, require
from medm.types import Config, Media, Sample

_PUBLIC = "VQA_RAD Dataset Public.json"


class VQARAD(Task):
    """VQA-RAD: the public file, or the split files of MEVF, conditional reasoning and MOTOR.

    Test questions of the public file are those of `phrase_type` test_*. Split files may give
    answers as classes (`medm.tasks.answer_classes`).

    Args:
        phrases: see `VQARADOptions`.
        options: of `Task`.
    """

    tag = "vqa"
    layout = (
        f"'{_PUBLIC}' with 'VQA_RAD Image Folder/', or trainset.json and testset.json (MOTOR: "
        "trainset_kg_new.json and testset_new.json) with images/"
    )
    group_by = ("answer_type", "question_type", "organ", "phrase_type")
    cluster_by = "image"

    def __init__(
        self, *, phrases: Literal["all", "freeform", "para"] = "all", **options: Any
    ) -> None:
        super().__init__(**options)
        self.phrases = phrases

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        names = (f"{split}set.json", f"{split}set_kg_new.json", f"{split}set_new.json", _PUBLIC)
        file = require(folder, *names, layout=self.layout)
        maps = AnswerMaps(folder)
        images = require(folder, "images", "VQA_RAD Image Folder", layout=self.layout).name
        if file.name == _PUBLIC:
            self._check_public(file)
        for index, row in enumerate(read_json_list(file)):
            phrase = str(row.get("phrase_type", "")).strip().lower()
            if file.name == _PUBLIC and phrase.startswith("test") != (split == "test"):
                continue
            phrase = phrase.removeprefix("test_")
            if self.phrases not in ("all", phrase):
                continue
            question = field_of(row, "question", str, file=file, index=index)
            image = field_of(row, "image_name", str, file=file, index=index)
            kind = str(row.get("answer_type", "")).strip().lower()
            classes = {}
            if isinstance(row.get("answer"), dict):
                classes = maps.decoded(row["answer"], kind, file=file, index=index)
            yield make_sample(
                pick_template(prompts.VQA, rng).format(question=question),
                id=str(row.get("qid", index)),
                tag=self.tag,
                answer=classes["answer"] if classes else _answer(row, file, index),
                media=[Media("image", f"{images}/{image}")],
                question=question,
                answer_type=kind,
                question_type=row.get("question_type"),
                organ=row.get("image_organ"),
                phrase_type=phrase or None,
                **{name: value for name, value in classes.items() if name != "answer"},
            )

    def _check_public(self, file: Path) -> None:
        if not any("phrase_type" in row for row in read_json_list(file)):
            raise DataError(
                "no record has 'phrase_type', which tells test from training", file=file
            )

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        return scoring.vqa(records, self.resampling_of(records))

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        resampling = self.resampling_of(records)
        return [
            *scoring.class_accuracy(records, resampling),
            *scoring.uni_med_vqa(records, resampling),
        ]


def _answer(row: Config, file: Path, index: int) -> str:
    """Text or a number; blank answers are an error, not an empty reference."""
    answer = str(field_of(row, "answer", (str, int, float), file=file, index=index)).strip()
    if not answer:
        raise DataError("the answer is empty", file=file, index=index, field="answer")
    return answer
