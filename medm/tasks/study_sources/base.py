"""Contract of a source of studies, and the way from its rows to records of the pipeline
`studies`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from medm.errors import DataError, MediaError, RecipeError, suggest
from medm.imaging import resolve_inside
from medm.imaging.paths import MissingFileError
from medm.tasks.pair_sources.base import LeftOut
from medm.types import JsonObject, Triplet

Uncertain: TypeAlias = Literal["u-zero", "u-one", "ignore"]
"""What becomes of an uncertain label (-1): absent, present, or unknown."""

CHEXPERT_LABELS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum",
    "Fracture", "Lung Lesion", "Lung Opacity", "No Finding", "Pleural Effusion", "Pleural Other",
    "Pneumonia", "Pneumothorax", "Support Devices",
)  # fmt: skip
"""The 14 labels of CheXpert in alphabetical order, as MOTOR's `label_index` has them."""


@dataclass(slots=True)
class StudyRow:
    """One study of a published annotation file."""

    file: Path
    """The annotation file."""
    index: int
    """Position of the row in it, from 0."""
    id: str
    images: tuple[str, ...]
    """Relative to the folder of the set, in the order of the file."""
    patient: str | None = None
    report: str | None = None
    labels: Mapping[str, int | None] | None = None
    """1 present, 0 absent, None unknown, by name."""
    triplets: tuple[Triplet, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of a record."""

    def record(self) -> JsonObject:
        """Return the record of the pipeline `studies`."""
        record: JsonObject = {"id": self.id, "images": list(self.images)}
        named = {
            "patient": self.patient,
            "report": self.report,
            "labels": None if self.labels is None else dict(self.labels),
            "triplets": [list(one) for one in self.triplets] or None,
        }
        record |= {name: value for name, value in named.items() if value is not None}
        return record | dict(self.extra)


@dataclass(frozen=True, kw_only=True)
class StudySource(ABC):
    """One set of studies as it is distributed.

    A subclass is a frozen dataclass; its fields are the options of the source.
    """

    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    source: ClassVar[str]
    """Name of the set in messages."""
    layout: ClassVar[str]
    """The files it expects, for the message about a missing one."""
    images: Literal["all", "first"] = "all"
    """Images of a study: all, or the first of the file."""

    @classmethod
    def with_options(cls, options: Mapping[str, Any]) -> StudySource:
        """Return the source with the values of some options.

        Raises:
            RecipeError: there is no such option, or not with such a value.
        """
        known = {one.name: one for one in fields(cls)}
        for name, value in options.items():
            if name not in known:
                raise RecipeError(
                    f"{cls.source} has no option {name!r}{suggest(name, list(known))}"
                )
            allowed = cls.choices().get(name)
            if allowed is not None and value not in allowed:
                raise RecipeError(
                    f"{name}: expected {' or '.join(map(str, allowed))}, found {value!r}"
                )
        return cls(**options)

    @classmethod
    def choices(cls) -> dict[str, tuple[object, ...]]:
        """Return the values that an option may have, where they are few."""
        return {"images": ("all", "first")}

    @abstractmethod
    def rows(self, folder: Path, split: str) -> Iterator[StudyRow]:
        """The studies of a split in the order of the files.

        Raises:
            DataError: an annotation file is missing, or has another layout.
        """

    def studies(self, folder: Path, split: str) -> Iterator[StudyRow]:
        """The studies of a split, with the images that are asked for.

        Raises:
            DataError: as `rows`, or for an unknown split.
        """
        if split not in self.splits:
            raise DataError(f"there is no split {split!r}; {self.source} has "
                            f"{', '.join(self.splits)}")  # fmt: skip
        for row in self.rows(folder, split):
            if self.images == "first":
                row.images = row.images[:1]
            yield row

    def records(self, folder: Path, split: str, *, left_out: LeftOut) -> Iterator[JsonObject]:
        """The studies as records; those without an image file are counted and left out.

        Raises:
            DataError: as `studies`, or if no study can be used.
        """
        used = False
        for row in self.studies(folder, split):
            try:
                for image in row.images:
                    resolve_inside(folder, image)
            except MissingFileError as error:
                left_out.add("no image file", _fault(row, error.reason))
                continue
            except MediaError as error:
                left_out.add("unusable path", _fault(row, error.reason))
                continue
            if not row.images:
                left_out.add("no image", _fault(row, "the study names no image"))
                continue
            used = True
            yield row.record()
        if not used:
            reasons = "; ".join(left_out.lines()) or "the annotation files hold no rows"
            raise DataError(f"no study of {self.source} in {folder} can be used: {reasons}")

    def shared_patients(self, folder: Path, split: str) -> dict[str, list[str]]:
        """Return the patients of a split who are in other splits, too, by the other split.

        Sets that do not say who the patient is have none.
        """
        own = {row.patient for row in self.studies(folder, split)} - {None}
        if not own:
            return {}
        shared: dict[str, list[str]] = {}
        for other in self.splits:
            if other == split:
                continue
            try:
                patients = {row.patient for row in self.studies(folder, other)}
            except DataError:  # a split that is not there shares nobody
                continue
            if both := sorted(str(one) for one in own & patients):
                shared[other] = both
        return shared


def state_of(value: object, uncertain: Uncertain, *, where: str) -> int | None:
    """Return 1, 0 or None for a label as CheXpert's labeler writes it: 1, 0, -1 or nothing.

    A label that is not mentioned is absent.

    Raises:
        DataError: something else.
    """
    text = "" if value is None else str(value).strip()
    if text == "":
        return 0
    try:
        number = float(text)
    except ValueError:
        number = 2.0
    if number == -1:
        return {"u-zero": 0, "u-one": 1, "ignore": None}[uncertain]
    if number in (0, 1):
        return int(number)
    raise DataError(f"expected 1, 0, -1 (uncertain) or nothing, found {text[:20]!r}", field=where)


def ordered_labels(rows: Sequence[StudyRow]) -> list[str]:
    """Return the names of all labels of some studies, in the order in which they come."""
    return list(dict.fromkeys(name for row in rows for name in row.labels or ()))


def _fault(row: StudyRow, reason: str) -> DataError:
    return DataError(reason, file=row.file, index=row.index)
