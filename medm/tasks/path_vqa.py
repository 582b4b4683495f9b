"""PathVQA (He et al. 2020): questions about pathology images."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from medm.errors import DataError
from medm.metrics.base import MetricResult
from medm.tasks import prompts, scoring
from medm.tasks.base import Record, Task, make_sample, pick_template
from medm.tasks.benchmark_files import field_of, read_json, require
from medm.tasks.plain_pickle import read_plain_pickle
from medm.types import Media, Sample


class PathVQA(Task):
    """Questions of PathVQA.

    `qas/<split>_vqa.pkl` is read without unpickling; the same list as `.json` has priority.
    """

    tag = "vqa"
    splits = ("train", "val", "test")
    layout = (
        "qas/{train,val,test}_vqa.pkl (or .json with the same list) and images/<split>/<img_id>.jpg"
    )
    group_by = ("answer_type",)
    cluster_by = "image"

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        file = require(folder, f"qas/{split}_vqa.json", f"qas/{split}_vqa.pkl", layout=self.layout)
        require(folder, f"images/{split}", layout=self.layout)
        rows = read_json(file) if file.suffix == ".json" else read_plain_pickle(file)
        if not isinstance(rows, list):
            raise DataError(f"expected a list of questions, found {type(rows).__name__}", file=file)
        for index, row in enumerate(rows):
            labels = field_of(row, "label", dict, file=file, index=index)
            if not labels:  # 'label' maps answers to scores; the first is the answer
                raise DataError("there is no answer", file=file, index=index, field="label")
            question = field_of(row, "sent", str, file=file, index=index)
            image = field_of(row, "img_id", str, file=file, index=index)
            yield make_sample(
                pick_template(prompts.VQA, rng).format(question=question),
                id=str(row.get("question_id", f"{split}:{index}")),
                tag=self.tag,
                answer=str(next(iter(labels))),
                media=[Media("image", f"images/{split}/{image}.jpg")],
                question=question,
                answer_type="closed" if row.get("answer_type") == "yes/no" else "open",
            )

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        return scoring.vqa(records, self.resampling_of(records))

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        return scoring.uni_med_vqa(records, self.resampling_of(records))
