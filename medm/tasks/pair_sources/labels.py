"""Sets of images with classes alone: captions from medm's own templates.

For whoever lacks the caption files of UniMed, or wants captions under a license of their own. The
sentences are data: one YAML file a domain in `captions/`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from medm.config import Options, validate
from medm.tasks.benchmark_files import read_csv, read_text, require
from medm.tasks.pair_sources.base import Pair, PairSource, read_list
from medm.tasks.pair_sources.unimed import csv_files

CAPTIONS = Path(__file__).parent / "captions"
_IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


class Wordings(Options):
    """Descriptions of a domain: one file of `captions/`."""

    sentences: dict[str, list[str]] = {}
    """Class to sentences of its own; the n-th sentences of several classes make the n-th
    caption."""
    templates: list[str] = []
    """Sentences around a class without sentences of its own, at "{finding}"."""
    normal: list[str] = []
    """Sentences where the class is "normal", if they are others."""
    plain: list[str] = []
    """Sentences where there is no finding, only a place."""
    names: dict[str, str] = {}
    """Name of a class or of a folder to words."""

    def words(self, name: str) -> str:
        """A name in words: from `names`, else with spaces for underscores."""
        return self.names.get(name, name.replace("_", " ").strip())

    def captions(self, classes: Sequence[str]) -> list[str]:
        """Captions of an image of several classes: each names all of them."""
        texts = [
            self.sentences.get(name)
            or [template.format(finding=self.words(name)) for template in self.templates]
            for name in classes
        ]
        return [" ".join(parts) for parts in zip(*texts, strict=False)] if texts else []


@cache
def wordings(domain: str) -> Wordings:
    """The sentences of a domain. Raises `RecipeError` for a file with other keys."""
    import yaml

    file = CAPTIONS / f"{domain}.yaml"
    return validate(Wordings, yaml.safe_load(file.read_text("utf-8")), source=str(file))


@dataclass(frozen=True, kw_only=True)
class CheXpertLabels(PairSource):
    """train.csv: a column of 1, 0, -1 or nothing for each finding.

    Findings that are uncertain (-1) are not mentioned.
    """

    def pairs(self, folder: Path, split: str) -> Iterator[Pair]:
        file = require(folder, "train.csv", layout=self.layout)
        known = wordings("chest")
        findings: list[str] | None = None
        for index, row in enumerate(read_csv(file, ("Path", "Frontal/Lateral", "No Finding"))):
            if findings is None:
                findings = [name for name in row if name in known.sentences]
            if row["Frontal/Lateral"] != "Frontal":
                continue
            present = [name for name in findings if row[name] in ("1.0", "1")]
            # Support devices are no disease: they stand beside "No Finding".
            pair = Pair(file, index, row["Path"], known.captions(present))
            pair.label = ", ".join(present)
            if not present:
                pair.problem = "no finding is positive"
            yield pair


@dataclass(frozen=True, kw_only=True)
class ChestXray8Labels(PairSource):
    """Data_Entry_2017.csv: findings joined by "|". Images of the official test list are no part."""

    def pairs(self, folder: Path, split: str) -> Iterator[Pair]:
        file = require(
            folder, "Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv", layout=self.layout
        )
        listed = read_text(require(folder, "train_val_list.txt", layout=self.layout))
        train = set(listed.split())
        known = wordings("chest")
        for index, row in enumerate(read_csv(file, ("Image Index", "Finding Labels"))):
            if row["Image Index"] not in train:
                continue
            findings = sorted(filter(None, row["Finding Labels"].split("|")))
            pair = Pair(file, index, row["Image Index"], known.captions(findings))
            pair.label = ", ".join(findings)
            unknown = [name for name in findings if name not in known.sentences]
            if unknown:
                pair.problem = f"unknown findings {unknown}"
            yield pair


@dataclass(frozen=True, kw_only=True)
class RadImageNetLabels(PairSource):
    """A folder a class: modality, anatomy and, for CT and MR, the finding."""

    modalities = ("CT", "MR", "US")

    def pairs(self, folder: Path, split: str) -> Iterator[Pair]:
        place = require(folder, "radiology_ai", *self.modalities, layout=self.layout)
        top = place if place.name == "radiology_ai" else folder
        known, index = wordings("radimagenet"), -1
        for modality in self.modalities:
            for directory, folders, names in os.walk(top / modality):
                folders.sort()
                relative = Path(directory).relative_to(top)
                captions = self.captions(relative.parts, known)
                for name in sorted(names):
                    if not name.lower().endswith(_IMAGES):
                        continue
                    index += 1
                    path = (Path(directory) / name).relative_to(folder).as_posix()
                    pair = Pair(place, index, path, captions, relative.as_posix())
                    if not captions:
                        pair.problem = f"{path} lies in no folder of a class"
                    yield pair

    def captions(self, parts: tuple[str, ...], known: Wordings) -> list[str]:
        """Captions of the folders modality / anatomy [/ finding]."""
        modality, *rest = parts
        if not rest:
            return []
        finding = "_".join(rest[1:])
        normal = finding.lower() in ("normal", "")
        templates = known.plain if not finding else known.normal if normal else known.templates
        return [
            template.format(
                modality=known.words(modality),
                anatomy=known.words(rest[0]),
                finding=known.words(finding),
            )
            for template in templates
        ]


@dataclass(frozen=True, kw_only=True)
class RetinaLabels(PairSource):
    """The CSV files of FLAIR, one a fundus set: path, attributes and a list of categories."""

    place: str

    def pairs(self, folder: Path, split: str) -> Iterator[Pair]:
        known = wordings("fundus")
        place = require(folder, self.place, layout=self.layout)
        for file in csv_files(place, (), layout=self.layout):
            for index, row in enumerate(read_csv(file, ("image", "categories"))):
                pair = Pair(file, index, row["image"])
                try:
                    categories = [name.strip() for name in read_list(row["categories"])]
                except ValueError as error:
                    pair.problem = str(error)
                else:
                    categories = [name for name in categories if name]
                    pair.captions = known.captions(categories)
                    pair.label = ", ".join(sorted(categories)) or None
                yield pair


CHEXPERT_LABELS = CheXpertLabels(
    source="chexpert",
    layout="train.csv beside train/ of CheXpert-v1.0-small",
    top="CheXpert-v1.0-small",
)
CHEST_XRAY8_LABELS = ChestXray8Labels(
    source="chest-xray8",
    layout="Data_Entry_2017.csv and train_val_list.txt beside images/",
    images=("images", *(f"images_{part:03d}/images" for part in range(1, 13)), ""),
)
RADIMAGENET_LABELS = RadImageNetLabels(
    source="radimagenet", layout="radiology_ai/ with CT, MR and US, a folder a class in each"
)
RETINA_LABELS = RetinaLabels(
    source="retina",
    layout="dataframes/ (a CSV a set, as FLAIR writes them) beside the folders of the sets",
    place="dataframes",
)
