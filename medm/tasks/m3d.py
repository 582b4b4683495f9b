"""M3D-Cap and M3D-VQA (Bai et al. 2024): reports and questions about volumes.

Volumes are 1 x 32 x 256 x 256 arrays with values 0 to 1, as .npy.
"""

from __future__ import annotations

import logging
import random
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from medm.errors import DataError
from medm.imaging import resolve_inside
from medm.metrics import m3d_bench
from medm.metrics.base import MetricResult
from medm.metrics.match import normalized_match
from medm.tasks import prompts, scoring
from medm.tasks.base import Record, Task, make_sample, pick_template
from medm.tasks.benchmark_files import field_of, read_csv, read_json_map, read_text, require
from medm.tasks.reports import CaptionTask
from medm.types import Media, Sample

QUESTION_TYPES = {"1": "plane", "2": "phase", "3": "organ", "4": "abnormality", "5": "location"}
_CHOICES = ("A", "B", "C", "D")
_TREES = ("M3D_Cap_npy", "M3D_Cap", "M3D_Seg_npy", "M3D_Seg", "M3D_RefSeg_npy", "M3D_RefSeg")
"""Folders of the volumes where all of M3D is in one tree, by the names that the processed and the
raw form have."""
_TRAINING = ("train", "yn_train")
"""Splits of which a bad row is left out: reports by the ten thousand, a few of them without their
text."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


def npy_path(folder: Path, written: str) -> str:
    """Return a volume's path relative to the folder.

    The published files name it with or without their own top folder.
    """
    path = written.replace("\\", "/").lstrip("/")
    _, _, below = path.partition("/")
    candidates = [path, below, *(f"{place}/{rest}" for place in _TREES for rest in (path, below))]
    return next(
        (name for name in candidates if name.strip("/") and below and (folder / name).is_file()),
        path,
    )


def _usable(
    rows: Iterable[T], make: Callable[[int, T], Sample], *, file: Path, split: str
) -> Iterator[Sample]:
    """Return one sample per row.

    An unusable row is counted and left out of training data, and stops a test.

    Raises:
        DataError: a row of a test that cannot be used, or training data without any row that can.
    """
    total = left_out = 0
    first: DataError | None = None
    for index, row in enumerate(rows):
        total += 1
        try:
            sample = make(index, row)
        except DataError as error:
            if split not in _TRAINING:
                raise
            left_out, first = left_out + 1, first or error
            continue
        yield sample
    if first is not None and left_out == total:
        raise DataError(f"none of {total} rows can be used; the first: {first}", file=file)
    if first is not None:
        logger.warning(
            "%s: %d of %d rows left out; the first: %s", file.name, left_out, total, first
        )


class M3DCap(CaptionTask):
    """Volume to report; the text of each lies in a file of its own."""

    splits = ("train", "validation", "test", "test100", "test500", "test1k")
    layout = "M3D_Cap.json ({split: [{image, text}]}) and the .npy and text.txt files that it names"

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        name = "M3D_Cap.json"
        file = require(folder, name, f"M3D_Cap_npy/{name}", f"M3D_Cap/{name}", layout=self.layout)
        rows = read_json_map(file).get(split)
        if not isinstance(rows, list):
            raise DataError("expected a list under this key", file=file, field=split)

        def sample(index: int, row: object) -> Sample:
            image = npy_path(folder, field_of(row, "image", str, file=file, index=index))
            text = npy_path(folder, field_of(row, "text", str, file=file, index=index))
            report = read_text(resolve_inside(folder, text))
            return make_sample(
                pick_template(prompts.VOLUME_REPORT, rng),
                id=image,
                tag=self.tag,
                answer=report.strip(),
                media=[Media("volume", image)],
            )

        yield from _usable(rows, sample, file=file, split=split)

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        return scoring.m3d_texts(records, self.resampling_of(records), self.bertscore)


class _M3DVQA(Task):
    """Reads the CSV."""

    splits = ("train", "yn_train", "val", "test", "test5k")
    layout = (
        "M3D_VQA_{train,yn_train,val,test,test5k}.csv (Image Path, Question Type, Question, "
        "Choice A..D, Answer, Answer Choice; yes-no questions may lack choices)"
    )
    tag = "vqa"
    group_by = ("question_type",)
    cluster_by = "volume"

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        name = f"M3D_VQA_{split}.csv"
        file = require(folder, name, f"M3D-VQA/{name}", f"M3D_VQA/{name}", layout=self.layout)
        columns: tuple[str, ...] = ("Image Path", "Question", "Answer")
        if split != "yn_train":
            columns += ("Question Type", "Answer Choice", *(f"Choice {c}" for c in _CHOICES))

        def sample(index: int, row: dict[str, str]) -> Sample:
            for field in ("Image Path", "Question", "Answer"):
                if not row[field].strip():
                    raise DataError(
                        "expected text, found nothing", file=file, index=index, field=field
                    )
            return self.sample(row, npy_path(folder, row["Image Path"]), f"{split}:{index}", rng)

        yield from _usable(read_csv(file, columns), sample, file=file, split=split)

    @abstractmethod
    def sample(self, row: dict[str, str], image: str, id: str, rng: random.Random | None) -> Sample:
        """One row."""


class M3DOpenVQA(_M3DVQA, CaptionTask):
    """The question without its choices."""

    tag = "vqa"

    def sample(self, row: dict[str, str], image: str, id: str, rng: random.Random | None) -> Sample:
        return make_sample(
            pick_template(prompts.VOLUME_VQA, rng).format(question=row["Question"]),
            id=id,
            tag=self.tag,
            answer=row["Answer"],
            media=[Media("volume", image)],
            question=row["Question"],
            question_type=_question_type(row),
        )

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        match = normalized_match(*scoring.texts(records), resampling=self.resampling_of(records))
        return match + super().measure(records)

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        resampling = self.resampling_of(records)
        results = scoring.m3d_texts(records, resampling, self.bertscore)
        means = [r for r in results if r.per_item is not None]
        return results + [
            scoring.mean_over_groups(records, r, "question_type", resampling) for r in means
        ]


class M3DClosedVQA(_M3DVQA):
    """The question with four choices."""

    def sample(self, row: dict[str, str], image: str, id: str, rng: random.Random | None) -> Sample:
        options = {
            letter: row[f"Choice {letter}"]
            for letter in _CHOICES
            if row.get(f"Choice {letter}", "").strip()
        }
        letter = row.get("Answer Choice", "").strip().upper()
        if letter not in options:
            raise DataError(f"answer choice {letter!r} is none of {sorted(options)} (row {id})")
        return make_sample(
            pick_template(prompts.CHOICE, rng).format(
                question=row["Question"], options=prompts.lettered(options)
            ),
            id=id,
            tag=self.tag,
            answer=f"{letter}. {row['Answer']}",
            media=[Media("volume", image)],
            question=row["Question"],
            question_type=_question_type(row),
            options=options,
            answer_choice=letter,
        )

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        results = scoring.choices(records, self.resampling_of(records))
        return [
            *results,
            scoring.mean_over_groups(
                records, results[0], "question_type", self.resampling_of(records)
            ),
        ]

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        predictions = [record["prediction"] for record in records]
        letters = [scoring.require_field(record, "answer_choice") for record in records]
        results = m3d_bench.choice_accuracy(
            predictions, letters, resampling=self.resampling_of(records)
        )
        return results + [
            scoring.mean_over_groups(records, r, "question_type", self.resampling_of(records))
            for r in results
        ]


def _question_type(row: dict[str, str]) -> str:
    code = row.get("Question Type", "").strip().split(".")[0]
    return QUESTION_TYPES.get(code, code)
