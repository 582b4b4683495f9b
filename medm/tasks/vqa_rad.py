"""VQA-RAD (Lau et al. 2018): questions about radiology images."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from medm.errors import DataError
from medm.metrics.base import MetricResult
from medm.tasks import prompts, scoring
from medm.tasks.base import Record, Task, make_sample, pick_template
from medm.tasks.benchmark_files import field_of, read_json_list, require
from medm.types import Config, Media, Sample

_PUBLIC = "VQA_RAD Dataset Public.json"


class VQARAD(Task):
    """VQA-RAD: the public file, or the split files of MEVF and MOTOR.

    Test questions of the public file are those of `phrase_type` test_*.
    """

    tag = "vqa"
    layout = (
        f"'{_PUBLIC}' with 'VQA_RAD Image Folder/', or trainset.json and testset.json with images/"
    )
    group_by = ("answer_type", "question_type", "organ")
    cluster_by = "image"

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        file = require(folder, f"{split}set.json", _PUBLIC, layout=self.layout)
        images = require(folder, "images", "VQA_RAD Image Folder", layout=self.layout).name
        if file.name == _PUBLIC:
            self._check_public(file)
        for index, row in enumerate(read_json_list(file)):
            is_test = str(row.get("phrase_type", "")).strip().lower().startswith("test")
            if file.name == _PUBLIC and is_test != (split == "test"):
                continue
            question = field_of(row, "question", str, file=file, index=index)
            image = field_of(row, "image_name", str, file=file, index=index)
            yield make_sample(
                pick_template(prompts.VQA, rng).format(question=question),
                id=str(row.get("qid", index)),
                tag=self.tag,
                answer=_answer(row, file, index),
                media=[Media("image", f"{images}/{image}")],
                question=question,
                answer_type=str(row.get("answer_type", "")).strip().lower(),
                question_type=row.get("question_type"),
                organ=row.get("image_organ"),
            )

    def _check_public(self, file: Path) -> None:
        if not any("phrase_type" in row for row in read_json_list(file)):
            raise DataError(
                "no record has 'phrase_type', which tells test from training", file=file
            )

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        return scoring.vqa(records, self.resampling_of(records))

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        return scoring.uni_med_vqa(records, self.resampling_of(records))


def _answer(row: Config, file: Path, index: int) -> str:
    """Text or a number; blank answers are an error, not an empty reference."""
    answer = str(field_of(row, "answer", (str, int, float), file=file, index=index)).strip()
    if not answer:
        raise DataError("the answer is empty", file=file, index=index, field="answer")
    return answer
