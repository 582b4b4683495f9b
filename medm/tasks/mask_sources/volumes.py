"""Volumes and their masks: M3D-Seg and M3D-RefSeg (Bai et al. 2024), Medical Segmentation Decathlon
(Antonelli et al. 2022).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medm.data.left_out import LeftOut
from medm.errors import DataError
from medm.imaging.probe import probe
from medm.imaging.volumes import read_volume
from medm.tasks.benchmark_files import field_of, read_csv, read_json_map, require
from medm.tasks.m3d import npy_path
from medm.tasks.m3d_regions import M3DRefSeg, M3DSeg, read_mask, structures
from medm.tasks.mask_sources.base import (
    Draw,
    MaskSet,
    conversation,
    find_file,
    note_unnamed,
    noting,
    require_plain,
    wordings,
)
from medm.types import MASK_TOKEN, JsonObject


@dataclass(frozen=True, kw_only=True)
class Structures(MaskSet):
    """M3D-Seg: a record for each class of each volume.

    A class that is absent from a volume is answered in words, without a mask, as published.
    """

    def rows(
        self, folder: Path, split: str, *, draw: Draw, left_out: LeftOut
    ) -> Iterator[JsonObject]:
        pool = wordings("m3d-seg")
        for index, found in enumerate(structures(folder, split)):
            file = folder / f"{found.dataset}.json"
            with noting(left_out, file, index):
                image, mask = find_file(folder, found.image), find_file(folder, found.mask)
                phrase = require_plain(found.name, "labels")
                is_present = bool(read_mask(folder, mask).any())
                answers = pool.answers if is_present else pool.absent
                turn = (
                    draw.pick(pool.questions).format(phrase=phrase),
                    draw.pick(answers).format(phrase=phrase),
                )
                record = conversation(mask, "volume", [image], [turn], "segmentation")
                masks = {"masks": [{"file": mask, "phrase": phrase}]} if is_present else {}
                yield {**record, "dataset": found.dataset, **masks}


@dataclass(frozen=True, kw_only=True)
class Referred(MaskSet):
    """M3D-RefSeg: the published questions and answers, and a value of the label map."""

    def rows(
        self, folder: Path, split: str, *, draw: Draw, left_out: LeftOut
    ) -> Iterator[JsonObject]:
        names = ["M3D_RefSeg_train.csv", "M3D_RefSeg.csv"]
        names = ["M3D_RefSeg_test.csv"] if split == "test" else names
        places = ("", "M3D_RefSeg_npy/", "M3D_RefSeg/")
        file = require(folder, *(f"{p}{n}" for p in places for n in names), layout=self.layout)
        columns = ("Image", "Mask", "Mask_ID", "Question", "Answer")
        for index, row in enumerate(read_csv(file, columns)):
            with noting(left_out, file, index):
                image = find_file(folder, npy_path(folder, row["Image"]))
                mask = find_file(folder, npy_path(folder, row["Mask"]))
                number = row["Mask_ID"].strip()
                if not number.isdigit():
                    raise DataError("expected a whole number", field="Mask_ID")
                answer = row["Answer"].strip()
                if answer.count(MASK_TOKEN) != 1:
                    raise DataError(
                        f"expected one {MASK_TOKEN}, found {answer.count(MASK_TOKEN)}",
                        field="Answer",
                    )
                turn = (require_plain(row["Question"], "Question"), answer)
                yield {
                    **conversation(f"{split}:{index}", "volume", [image], [turn], "segmentation"),
                    "masks": [{"file": mask, "value": int(number)}],
                }


@dataclass(frozen=True, kw_only=True)
class Decathlon(MaskSet):
    """A record for each volume, with a `[SEG]` for each class; classes without a voxel are null."""

    splits = ("train",)

    def rows(
        self, folder: Path, split: str, *, draw: Draw, left_out: LeftOut
    ) -> Iterator[JsonObject]:
        files = sorted(folder.glob("Task*/dataset.json"))
        if (folder / "dataset.json").is_file() or not files:
            files = [require(folder, "dataset.json", layout=self.layout)]
        for file in files:
            yield from self._rows_of(folder, file, draw, left_out)

    def _rows_of(
        self, folder: Path, file: Path, draw: Draw, left_out: LeftOut
    ) -> Iterator[JsonObject]:
        content = read_json_map(file)
        labels = _labels(field_of(content, "labels", dict, file=file, index=0), file)
        rows = field_of(content, "training", list, file=file, index=0)
        relative = file.parent.relative_to(folder).as_posix()
        top = "" if relative == "." else f"{relative}/"
        named: set[str] = set()
        for index, row in enumerate(rows):
            with noting(left_out, file, index):
                names = [
                    field_of(row, key, str, file=file, index=index).removeprefix("./")
                    for key in ("image", "label")
                ]
                named.update(f"{top}{name}" for name in names)
                image, label = (find_file(folder, name, (top.rstrip("/"),)) for name in names)
                probe(folder / image, kind="volume")
                values = set(np.unique(read_volume(folder / label).voxels).astype(int).tolist())
                if unknown := sorted(values - labels.keys() - {0}):
                    raise DataError(
                        f"{label}: the values {unknown} have no name in 'labels'", field="label"
                    )
                yield self.record(f"{top}{index}", image, label, labels, values, draw)
        for place in ("imagesTr", "labelsTr"):
            what = "image files" if place == "imagesTr" else "mask files"
            note_unnamed(left_out, folder, f"{top}{place}", named, file=file, what=what)

    @staticmethod
    def record(
        name: str,
        image: str,
        label: str,
        labels: Mapping[int, str],
        values: set[int],
        draw: Draw,
    ) -> JsonObject:
        """Return the record of a volume.

        Args:
            name: its `id`.
            image: path of the volume.
            label: path of its label map.
            labels: names of the classes by value.
            values: values that occur in the label map.
            draw: chooses the wording.
        """
        pool = wordings("decathlon")
        spoken = list(labels.values())
        listed = " and ".join([*filter(None, [", ".join(spoken[:-1])]), spoken[-1]])
        replies = ", ".join(f"<p> {words} </p> {MASK_TOKEN}" for words in spoken)
        turn = (
            draw.pick(pool.questions).format(names=listed),
            draw.pick(pool.answers).format(masks=replies),
        )
        masks: list[JsonObject] = [
            {"file": label, "value": value, "phrase": words}
            if value in values
            else {"file": None, "phrase": words}
            for value, words in labels.items()
        ]
        return {
            **conversation(name, "volume", [image], [turn], "segmentation"),
            "masks": masks,
        }


def _labels(written: Mapping[str, object], file: Path) -> dict[int, str]:
    """Return the names of the classes by value, without the background."""
    names = {}
    for key, name in written.items():
        if not key.isdigit() or not isinstance(name, str):
            raise DataError(
                "expected names by whole numbers", file=file, field=f"labels.{key[:40]}"
            )
        if int(key):
            names[int(key)] = require_plain(name.replace("_", " "), f"labels.{key}")
    if not names:
        raise DataError("expected a name for a value other than 0", file=file, field="labels")
    return dict(sorted(names.items()))


M3D_SEG = Structures(source="m3d-seg", layout=M3DSeg.layout)
M3D_REFSEG = Referred(source="m3d-refseg", layout=M3DRefSeg.layout)
DECATHLON = Decathlon(
    source="decathlon",
    layout="dataset.json (labels, training: [{image, label}]) beside imagesTr/ and labelsTr/, or "
    "a folder of such tasks (Task03_Liver ...)",
)
