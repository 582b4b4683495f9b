"""MIMIC-CXR-JPG (Johnson et al. 2019): the official split and the labels of its reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from medm.errors import DataError
from medm.tasks.benchmark_files import read_csv, require
from medm.tasks.study_sources.base import (
    CHEXPERT_LABELS,
    StudyRow,
    StudySource,
    Uncertain,
    state_of,
)

_SPLITS = {"train": "train", "validate": "val", "test": "test"}
"""Names of the splits in the file, and medm's."""
LABELERS = ("chexpert", "negbio")
_LABEL_FILE = "mimic-cxr-2.0.0-{}.csv"


@dataclass(frozen=True, kw_only=True)
class MimicCXR(StudySource):
    """The two CSV files of MIMIC-CXR-JPG, unpacked, beside `files/`. There are no reports in them.

    A study without labels is left out.
    """

    source: ClassVar[str] = "mimic-cxr"
    layout: ClassVar[str] = (
        "mimic-cxr-2.0.0-split.csv and mimic-cxr-2.0.0-chexpert.csv (or -negbio.csv), unpacked, "
        "beside files/"
    )
    labeler: Literal["chexpert", "negbio"] = "chexpert"
    uncertain: Uncertain = "u-zero"
    """Labels with -1: `u-zero` absent, `u-one` present, `ignore` unknown. Labels that a report does
    not mention are absent."""

    @classmethod
    def choices(cls) -> dict[str, tuple[object, ...]]:
        own = {"labeler": LABELERS, "uncertain": ("u-zero", "u-one", "ignore")}
        return {**super().choices(), **own}

    def rows(self, folder: Path, split: str) -> Iterator[StudyRow]:
        table = require(folder, _LABEL_FILE.format(self.labeler), layout=self.layout)
        labels = read_labels(table, self.uncertain)
        file = require(folder, "mimic-cxr-2.0.0-split.csv", layout=self.layout)
        studies: dict[str, StudyRow] = {}
        columns = ("dicom_id", "study_id", "subject_id", "split")
        for index, row in enumerate(read_csv(file, columns)):
            if row["split"] not in _SPLITS:
                raise DataError(
                    f"expected {', '.join(_SPLITS)}, found {row['split']!r}",
                    file=file,
                    index=index,
                    field="split",
                )
            study, patient = row["study_id"], row["subject_id"]
            if _SPLITS[row["split"]] != split or study not in labels:
                continue
            image = f"files/p{patient[:2]}/p{patient}/s{study}/{row['dicom_id']}.jpg"
            if study in studies:
                studies[study].images += (image,)
                continue
            studies[study] = StudyRow(
                file, index, id=study, images=(image,), patient=patient, labels=labels[study]
            )
        yield from studies.values()


def label_table(folder: Path) -> Path | None:
    """Return the file of labels in a folder, CheXpert's before NegBio's; None without any."""
    files = [folder / _LABEL_FILE.format(name) for name in LABELERS]
    return next((file for file in files if file.is_file()), None)


def read_labels(file: Path, uncertain: Uncertain) -> dict[str, Mapping[str, int | None]]:
    """Return the labels of a file of MIMIC-CXR-JPG by study.

    Raises:
        DataError: columns are missing, or a value is none of 1, 0, -1 and nothing.
    """
    found: dict[str, Mapping[str, int | None]] = {}
    for index, row in enumerate(read_csv(file, ("study_id", *CHEXPERT_LABELS))):
        try:
            found[row["study_id"]] = {
                name: state_of(row[name], uncertain, where=name) for name in CHEXPERT_LABELS
            }
        except DataError as error:
            raise error.at(file=file, index=index) from None
    return found
