"""Annotation files of reports: R2Gen's `annotation.json`, MOTOR's JSON in both of its layouts, and
files of studies of one's own.

R2Gen: {split: [{id, image_path, report}]}. MOTOR: [{split: [{image_path, report, triplet,
label_index}]}], or one list of such rows. Labels and triplets may lie beside, in the files of
MIMIC-CXR-JPG and `*_kg_AO.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from medm.data.record_files import RecordFile
from medm.data.studies import Studies, Study
from medm.errors import DataError
from medm.tasks.benchmark_files import field_of, read_json, require
from medm.tasks.study_sources.base import (
    CHEXPERT_LABELS,
    StudyRow,
    StudySource,
    Uncertain,
)
from medm.tasks.study_sources.mimic import label_table, read_labels
from medm.types import JsonObject, Triplet

_PATIENT_OF_IU = re.compile(r"^(CXR\d+)_IM")
_MARKS = re.compile(r"\s*[|;,\t]\s*")


@dataclass(frozen=True, kw_only=True)
class AnnotationFile(StudySource):
    """Studies of one annotation file, whose layout is told by its content.

    A file without splits is one split, whatever it is called, unless its records have a field
    `split`.
    """

    source: ClassVar[str] = "annotation"
    layout: ClassVar[str] = (
        "annotation.json ({split: [{id, image_path, report}]}), MOTOR's JSON ([{split: [...]}] or "
        "a list), or a file of studies, and their images"
    )
    path: str = "annotation.json"
    """The file, relative to the folder."""
    image_folder: str | None = None
    """Folder that `image_path` is relative to. Default: `images` where there is one."""
    label_names: Sequence[str] = CHEXPERT_LABELS
    """Labels that `label_index` and other lists of numbers are of, in their order. Without any, no
    labels are read."""
    uncertain: Uncertain = "u-zero"
    """Labels with -1 in the file of MIMIC-CXR-JPG beside."""

    @classmethod
    def choices(cls) -> dict[str, tuple[object, ...]]:
        return {**super().choices(), "uncertain": ("u-zero", "u-one", "ignore")}

    def rows(self, folder: Path, split: str) -> Iterator[StudyRow]:
        file = require(folder, self.path, layout=self.layout)
        content = _by_split(file)
        if content is not None and any(split in part for part in content):
            yield from self._annotated(folder, file, split, content)
            return
        if content is not None:
            names = sorted({name for part in content for name in part})
            raise DataError(
                f"expected a list under {split!r}; the file has {', '.join(names)}", file=file
            )
        records = RecordFile(file)
        first = records[0] if len(records) else {}
        if isinstance(first, dict) and "image_path" in first:
            rows = [records[index] for index in range(len(records))]
            yield from self._annotated(folder, file, split, [{split: rows}])
            return
        pipeline = Studies(inference=True)
        for index in range(len(records)):
            record = records[index]
            if isinstance(record, dict) and record.get("split", split) != split:
                continue
            try:
                study = pipeline.read(record, file=file, index=index)
                yield _own(study, self.label_names, file, index)
            except DataError as error:
                raise error.at(file=file, index=index) from None

    def _annotated(
        self, folder: Path, file: Path, split: str, content: Sequence[Mapping[str, Any]]
    ) -> Iterator[StudyRow]:
        """Rows of R2Gen and MOTOR, with labels and triplets of the files beside."""
        place = self.image_folder
        if place is None:
            place = "images" if (folder / "images").is_dir() else ""
        table = label_table(folder) if self.label_names else None
        labels = {} if table is None else read_labels(table, self.uncertain)
        knowledge = _Knowledge.beside(folder, split, file)
        rows = [row for part in content for row in part.get(split, ())]
        for index, row in enumerate(rows):
            read = self._row(row, place, file, index)
            found = labels.get(str(row.get("study_id")))
            if found is not None and read.labels is None:
                read.labels = found
            if not read.triplets:
                read.triplets = knowledge.of(row)
            yield read

    def _row(self, row: JsonObject, place: str, file: Path, index: int) -> StudyRow:
        paths = _paths(row, file, index)
        report = field_of(row, "report", str, file=file, index=index)
        states: Mapping[str, int | None] | None = None
        if row.get("label_index") is not None and self.label_names:
            numbers = field_of(row, "label_index", list, file=file, index=index)
            states = _named(numbers, self.label_names, file, index)
        name = row.get("id", row.get("study_id"))
        patient = row.get("subject_id")
        if patient is None and (match := _PATIENT_OF_IU.match(str(name or paths[0]))):
            patient = match[1]
        return StudyRow(
            file,
            index,
            id=str(paths[0] if name is None else name),
            images=tuple(f"{place}/{path}" if place else path for path in paths),
            patient=None if patient is None else str(patient),
            report=" ".join(report.split()) or None,
            labels=states,
            triplets=tuple(filter(None, map(as_triplet, row.get("triplet") or ()))),
        )


class _Knowledge:
    """Triplets of `*_kg_AO.json` by images or report of a row."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[Triplet, ...]] = {}

    @classmethod
    def beside(cls, folder: Path, split: str, other: Path) -> _Knowledge:
        """Return what the files of a folder hold of a split, in both layouts.

        Raises:
            DataError: a file has another layout.
        """
        made = cls()
        for file in sorted(folder.glob("*_kg_AO.json")):
            if file == other:
                continue
            parts = _by_split(file)
            if parts is None:
                records = RecordFile(file)
                parts = [{split: [records[index] for index in range(len(records))]}]
            rows = [row for part in parts for row in part.get(split, ())]
            for index, row in enumerate(rows):
                found = field_of(row, "triplet", list, file=file, index=index)
                triplets = tuple(filter(None, map(as_triplet, found)))
                for key in made._keys(row):
                    made._known.setdefault(key, triplets)
        return made

    def of(self, row: Mapping[str, Any]) -> tuple[Triplet, ...]:
        """Return the triplets of a row: those of its images, or else of its report."""
        return next((self._known[key] for key in self._keys(row) if key in self._known), ())

    def _keys(self, row: Mapping[str, Any]) -> list[object]:
        paths = row.get("image_path")
        listed = paths if isinstance(paths, list) else [paths]
        return [
            ("image", *map(str, listed)),
            ("report", " ".join(str(row.get("report", "")).split())),
        ]


def as_triplet(value: object) -> Triplet | None:
    """Return a triplet of MOTOR's files: three texts, or one text.

    A text is divided at its marks (| ; , or tab) where they give three parts, else at its first and
    last space: the words that a model reads are the same. Less than three words are no triplet.
    """
    if isinstance(value, list):
        parts = [str(part).strip() for part in value]
    else:
        text = " ".join(str(value).split())
        parts = _MARKS.split(text)
        words = text.split(" ")
        if len(parts) != 3 and len(words) >= 3:
            parts = [words[0], " ".join(words[1:-1]), words[-1]]
    if len(parts) != 3 or not all(parts):
        return None
    return parts[0], parts[1], parts[2]


def _by_split(file: Path) -> list[Mapping[str, Any]] | None:
    """Return the parts of a JSON that hold lists by split; None for a list or lines of records."""
    if file.suffix.lower() != ".json":
        return None
    content = read_json(file)
    parts = content if isinstance(content, list) else [content]
    known = {"train", "val", "test"}
    split_parts = [part for part in parts if isinstance(part, dict) and known & part.keys()]
    held = [part for part in split_parts if all(isinstance(part[k], list) for k in known & {*part})]
    if parts and len(held) == len(parts):
        return list(held)
    if isinstance(content, dict):
        raise DataError(
            f"expected lists under train, val or test, found {', '.join(map(str, content))}",
            file=file,
        )
    return None


def _paths(row: JsonObject, file: Path, index: int) -> list[str]:
    value = row.get("image_path") if isinstance(row, dict) else None
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not paths or not all(isinstance(p, str) and p for p in paths):
        raise DataError("expected one or more paths", file=file, index=index, field="image_path")
    return paths


def _named(
    numbers: Sequence[object], names: Sequence[str], file: Path, index: int
) -> dict[str, int | None]:
    """Return labels of numbers by name."""
    if len(numbers) != len(names) or any(number not in (0, 1, None) for number in numbers):
        raise DataError(
            f"expected {len(names)} of 1, 0 and null, for {', '.join(names)}; found "
            f"{len(numbers)} entries; other labels are named by --option label_names=[...]",
            file=file,
            index=index,
            field="label_index",
        )
    return {
        name: None if number is None else int(bool(number))
        for name, number in zip(names, numbers, strict=True)
    }


def _own(study: Study, names: Sequence[str], file: Path, index: int) -> StudyRow:
    """Return a record of the pipeline `studies` as a row."""
    labels: Mapping[str, int | None] | None
    given = study.labels
    if not names:
        labels = None
    elif given is None or isinstance(given, Mapping):
        labels = given
    elif all(isinstance(label, str) for label in given):
        if unknown := [label for label in given if label not in names]:
            raise DataError(
                f"{unknown[0]!r} is none of the labels {', '.join(names)}; name them by --option "
                "label_names=[...]",
                field="labels",
            )
        labels = {name: int(name in given) for name in names}
    else:
        labels = _named(given, names, file, index)
    patient = study.extra.get("patient")
    own = {"patient", "split"}
    return StudyRow(
        file,
        index,
        id=study.id if study.id is not None else str(index),
        images=tuple(media.path or "" for media in study.images),
        patient=None if patient is None else str(patient),
        report=study.report,
        labels=labels,
        triplets=study.triplets,
        extra={key: value for key, value in study.extra.items() if key not in own},
    )
