"""CT-RATE (Hamamci et al. 2024): chest CT reports, and the questions of CT-CHAT."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from medm.errors import DataError
from medm.metrics.base import MetricResult, mean_result
from medm.tasks import prompts, scoring
from medm.tasks.base import Record, Task, make_sample, pick_template
from medm.tasks.benchmark_files import field_of, read_csv, read_json_list, require
from medm.tasks.reports import CaptionTask
from medm.types import Config, Media, Sample

_MARK = re.compile(r"<(long_answer|short_answer|multiple_choice|report_generation)>")
_PLACEHOLDER = re.compile(r"\s*<(?:image|provided)>\s*", re.IGNORECASE)
_OPTION = re.compile(r"\(([a-z])\)\s*(.*?)(?=\s*\([a-z]\)|$)", re.IGNORECASE | re.DOTALL)
_SPLIT_NAMES = {"train": "train", "valid": "validation"}


def volume_path(folder: Path, name: str) -> str:
    """Return the path of a volume, beside the files or in CT-RATE's nested folders.

    A nested path is valid_1/valid_1_a/valid_1_a_1.nii.gz.

    Raises:
        DataError: it lies in none of these places.
    """
    stem = name.removesuffix(".nii.gz").removesuffix(".npy")
    parts = stem.split("_")
    if len(parts) != 4 or not all(re.fullmatch(r"[A-Za-z0-9]+", part) for part in parts):
        candidates = [name]
    else:
        split, nested = parts[0], f"{'_'.join(parts[:2])}/{'_'.join(parts[:3])}"
        places = [
            "",
            *(f"dataset/{split}{fixed}/{nested}/" for fixed in ("_fixed", "")),
            f"{split}/{nested}/",
            "volumes/",
        ]
        candidates = [
            f"{place}{stem}{ending}" for place in places for ending in (".nii.gz", ".npy")
        ]
    for candidate in candidates:
        if (folder / candidate).is_file():
            return candidate
    raise DataError(
        f"volume {name!r} is missing; looked for {', '.join(candidates[:4])} ...",
        file=folder / name,
    )


def patient_of(volume: str) -> str:
    """Return `valid_1` of `valid_1_a_1.nii.gz`.

    The scans and reconstructions of one patient share the beginning of their name.
    """
    return "_".join(Path(volume).name.split(".")[0].split("_")[:2])


class CTRateVQA(Task):
    """One kind of question of CT-CHAT's conversations, each turn a sample of its own."""

    tag = "vqa"
    splits = ("train", "valid")
    eval_split = "valid"
    layout = "dataset/vqa/{train,valid}_vqa.json (CT-CHAT's conversations) and the volumes"
    cluster_by = "patient"
    mark: ClassVar[str]
    """The kind, as CT-CHAT marks it at the end of a question."""

    def samples(
        self, folder: Path, split: str = "valid", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        name = f"{split}_vqa.json"
        file = require(folder, f"dataset/vqa/{name}", f"vqa/{name}", name, layout=self.layout)
        for index, row in enumerate(read_json_list(file)):
            image = field_of(row, "image", str, file=file, index=index)
            turns = field_of(row, "conversations", list, file=file, index=index)
            for position, (question_turn, answer_turn) in enumerate(
                zip(turns[::2], turns[1::2], strict=False)
            ):
                question = field_of(question_turn, "value", str, file=file, index=index)
                mark = _MARK.search(question)
                if (mark.group(1) if mark else "long_answer") != self.mark:
                    continue
                answer = field_of(answer_turn, "value", str, file=file, index=index).strip()
                text = _PLACEHOLDER.sub("", _MARK.sub("", question)).strip()
                yield make_sample(
                    self.word(text, rng),
                    id=f"{row.get('id', index)}:{position}",
                    tag=self.tag,
                    answer=answer,
                    media=[Media("volume", volume_path(folder, image))],
                    question=text,
                    patient=patient_of(image),
                    **self.fields(text, answer, file, index),
                )

    def word(self, question: str, rng: random.Random | None) -> str:
        """Return the question of a sample."""
        return pick_template(prompts.VOLUME_VQA, rng).format(question=question)

    def fields(self, question: str, answer: str, file: Path, index: int) -> Config:
        """Return the fields that scoring needs besides the answer."""
        return {}


class CTRateShort(CTRateVQA, CaptionTask):
    """Short answers."""

    mark = "short_answer"


class CTRateLong(CTRateVQA, CaptionTask):
    """Long answers."""

    mark = "long_answer"
    chest = True


class CTRateChoice(CTRateVQA):
    """Multiple choice: "... (a) ... (b) ..." in the question."""

    mark = "multiple_choice"

    def fields(self, question: str, answer: str, file: Path, index: int) -> Config:
        options = {letter.upper(): text.strip(" ,;.") for letter, text in _OPTION.findall(question)}
        found = re.match(r"\W*\(?([A-Za-z])[).:]", answer)
        if not found or found.group(1).upper() not in options:
            raise DataError(
                "the answer names none of the choices in the question, e.g. '(a) ...'",
                file=file,
                index=index,
            )
        return {"options": options, "answer_choice": found.group(1).upper()}

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        return scoring.choices(records, self.resampling_of(records))

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        """MedM-VL's: the bracketed letter anywhere in the text."""
        hits = [
            float(f"({scoring.require_field(r, 'answer_choice').lower()})" in r["prediction"])
            for r in records
        ]
        return [
            mean_result(
                "medm-vl-choice-accuracy",
                hits,
                "medm-vl|substring:(letter)",
                self.resampling_of(records),
            )
        ]


class CTRateReport(CaptionTask):
    """Reports: findings, then impression, of the distributed CSV."""

    splits = ("train", "valid")
    eval_split = "valid"
    chest = True
    cluster_by = "patient"
    layout = (
        "dataset/radiology_text_reports/{train,validation}_reports.csv (VolumeName, Findings_EN, "
        "Impressions_EN) and the volumes"
    )

    def samples(
        self, folder: Path, split: str = "valid", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        name = f"{_SPLIT_NAMES[split]}_reports.csv"
        places = ("dataset/radiology_text_reports", "radiology_text_reports", ".")
        file = require(folder, *(f"{place}/{name}" for place in places), layout=self.layout)
        for row in read_csv(file, ("VolumeName", "Findings_EN", "Impressions_EN")):
            parts = {"Findings": row["Findings_EN"], "Impression": row["Impressions_EN"]}
            report = " ".join(
                f"{title}: {' '.join(text.split())}"
                for title, text in parts.items()
                if text.strip()
            )
            if not report:
                continue
            yield make_sample(
                pick_template(prompts.VOLUME_REPORT, rng),
                id=row["VolumeName"],
                tag=self.tag,
                answer=report,
                media=[Media("volume", volume_path(folder, row["VolumeName"]))],
                patient=patient_of(row["VolumeName"]),
            )
