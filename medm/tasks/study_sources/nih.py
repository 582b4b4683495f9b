"""NIH ChestX-ray14 (Wang et al. 2017): the official lists and 14 labels of findings."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from medm.errors import DataError
from medm.tasks.benchmark_files import read_csv, read_text, require
from medm.tasks.study_sources.base import StudyRow, StudySource

NIH_LABELS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis",
    "Hernia", "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax",
)  # fmt: skip
"""In alphabetical order."""
_FOLDERS = ("images", *(f"images_{part:03d}/images" for part in range(1, 13)), "")
_SHARE, _SEED = 0.1, 0


@dataclass(frozen=True, kw_only=True)
class NIHChestXray14(StudySource):
    """Data_Entry_2017.csv with the official lists; an image is a study.

    The official lists have no validation part. A tenth of `train_val_list.txt` is taken for it.
    """

    source: ClassVar[str] = "nih-chest-xray14"
    layout: ClassVar[str] = (
        "Data_Entry_2017.csv (or Data_Entry_2017_v2020.csv), train_val_list.txt and test_list.txt "
        "beside images/ or images_001/images/ ..."
    )
    validation: Literal["patient", "image"] = "patient"
    """How the tenth is drawn: whole patients, or single images, as published, where a patient may
    be in both parts. The published draw itself is not released; this one is of medm."""

    @classmethod
    def choices(cls) -> dict[str, tuple[object, ...]]:
        return {**super().choices(), "validation": ("patient", "image")}

    def rows(self, folder: Path, split: str) -> Iterator[StudyRow]:
        file = require(
            folder, "Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv", layout=self.layout
        )
        name = "test_list.txt" if split == "test" else "train_val_list.txt"
        listed = set(read_text(require(folder, name, layout=self.layout)).split())
        columns = ("Image Index", "Finding Labels", "Patient ID")
        rows = [
            (index, row)
            for index, row in enumerate(read_csv(file, columns))
            if row["Image Index"] in listed
        ]
        if lacking := sorted(listed - {row["Image Index"] for _, row in rows}):
            raise DataError(
                f"{len(lacking)} of {len(listed)} images of {name} have no row, the first is "
                f"{lacking[0]!r}",
                file=file,
            )
        if split != "test":
            units = "Patient ID" if self.validation == "patient" else "Image Index"
            chosen = _tenth([row[units] for _, row in rows])
            rows = [(i, row) for i, row in rows if (row[units] in chosen) == (split == "val")]
        places = [place for place in _FOLDERS if (folder / place).is_dir()]
        for index, row in rows:
            found = set(filter(None, map(str.strip, row["Finding Labels"].split("|"))))
            if unknown := sorted(found - {*NIH_LABELS, "No Finding"}):
                raise DataError(
                    f"{unknown[0]!r} is none of the 14 labels, nor 'No Finding'",
                    file=file,
                    index=index,
                    field="Finding Labels",
                )
            image = row["Image Index"]
            yield StudyRow(
                file,
                index,
                id=image,
                images=(_placed(folder, places, image),),
                patient=row["Patient ID"],
                labels={label: int(label in found) for label in NIH_LABELS},
            )


def _tenth(units: list[str]) -> set[str]:
    """Return units (patients or images) that hold at least a tenth of the images."""
    sizes: dict[str, int] = {}
    for unit in units:
        sizes[unit] = sizes.get(unit, 0) + 1
    order = sorted(sizes)
    random.Random(_SEED).shuffle(order)
    wanted = int(len(units) * _SHARE)
    chosen: set[str] = set()
    taken = 0
    for unit in order:
        if taken >= wanted:
            break
        chosen.add(unit)
        taken += sizes[unit]
    return chosen


def _placed(folder: Path, places: list[str], image: str) -> str:
    """Return the path of an image; the first folder's where it is in none."""
    paths = [f"{place}/{image}" if place else image for place in places]
    if len(paths) == 1:
        return paths[0]
    return next((path for path in paths if (folder / path).is_file()), paths[0])
