"""SLAKE (Liu et al. 2021), English part: questions, and objects with boxes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from medm.metrics.base import MetricResult
from medm.tasks import prompts, scoring
from medm.tasks.answer_classes import AnswerMaps
from medm.tasks.base import Record, Task, make_sample, pick_template
from medm.tasks.benchmark_files import field_of, read_json_list, read_text, require
from medm.tasks.regions import IdentifyTask, ReferTask, Region, RegionTask, read_regions
from medm.types import Config, Media, Sample

_TREE = (
    "SLAKE's tree: train.txt and test.txt with image ids, imgs/<id>/{source.jpg, question.json, "
    "detection.json}"
)


def _image_ids(folder: Path, split: str) -> list[str]:
    return read_text(require(folder, f"{split}.txt", layout=_TREE)).split()


class Slake(Task):
    """The distributed JSON of each split, or MOTOR's, whose answers are numbers of classes."""

    tag = "vqa"
    splits: ClassVar[tuple[str, ...]] = ("train", "validate", "test")
    layout = (
        "SLAKE as distributed: train.json, validate.json, test.json (MOTOR: new_train_kg.json and "
        "new_test_kg.json) and imgs/<id>/source.jpg"
    )
    group_by = ("answer_type", "content_type", "modality")
    cluster_by = "image"

    def rows(self, folder: Path, split: str) -> Iterator[tuple[Path, int, Config]]:
        """File, position in it, and each English question with an answer."""
        file = require(folder, f"{split}.json", f"new_{split}_kg.json", layout=self.layout)
        require(folder, "imgs", layout=self.layout)
        for index, row in enumerate(read_json_list(file)):
            yield file, index, row

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        maps = AnswerMaps(folder)
        for file, index, row in self.rows(folder, split):
            kind = str(row.get("answer_type", "")).strip().lower()
            classes = {}
            if isinstance(row.get("answer"), (int, dict)):
                classes = maps.decoded(row["answer"], kind, file=file, index=index)
            answer = str(classes.get("answer", row.get("answer", ""))).strip()
            if row.get("q_lang", "en") != "en" or not answer:
                continue
            image = field_of(row, "img_name", str, file=file, index=index)
            question = field_of(row, "question", str, file=file, index=index)
            yield make_sample(
                pick_template(prompts.VQA, rng).format(question=question),
                id=str(row.get("qid", f"{image}:{index}")),
                tag=self.tag,
                answer=answer,
                media=[Media("image", f"imgs/{image}")],
                question=question,
                answer_type=kind,
                content_type=row.get("content_type"),
                modality=row.get("modality"),
                **{name: value for name, value in classes.items() if name != "answer"},
            )

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        return scoring.vqa(records, self.resampling_of(records))

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        resampling = self.resampling_of(records)
        return [
            *scoring.class_accuracy(records, resampling),
            *scoring.uni_med_vqa(records, resampling),
        ]


class SlakeVQA(Slake):
    """The questions of SLAKE in Uni-Med's split files."""

    splits = ("train", "test")
    layout = _TREE

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        return scoring.uni_med_vqa(records, self.resampling_of(records))

    def rows(self, folder: Path, split: str) -> Iterator[tuple[Path, int, Config]]:
        for image in _image_ids(folder, split):
            file = require(folder, f"imgs/{image}/question.json", layout=self.layout)
            for index, row in enumerate(read_json_list(file)):
                yield file, index, row


class _SlakeRegions(RegionTask):
    layout = _TREE

    def regions(self, folder: Path, split: str) -> Iterator[Region]:
        for image in _image_ids(folder, split):
            file = require(folder, f"imgs/{image}/detection.json", layout=self.layout)
            yield from read_regions(file, image=f"imgs/{image}/source.jpg", id=image, group="slake")


class SlakeREC(_SlakeRegions, ReferTask):
    """A name to a box."""


class SlakeREG(_SlakeRegions, IdentifyTask):
    """A box to a name."""
