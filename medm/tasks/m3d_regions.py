"""M3D-Seg and M3D-RefSeg (Bai et al. 2024): names, boxes and masks in volumes.

Read in the processed form of the published scripts: `image.npy` beside one mask file per class.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medm.errors import DataError
from medm.imaging import resolve_inside
from medm.metrics import m3d_bench
from medm.metrics.base import MetricResult, mean_result, undefined
from medm.metrics.boxes import CODECS, Box
from medm.tasks import prompts, scoring
from medm.tasks.base import Record, Task, make_sample, pick_template
from medm.tasks.benchmark_files import field_of, read_array, read_csv, read_json_map, require
from medm.tasks.m3d import npy_path
from medm.tasks.masks import MaskReference, MaskTask, number, present
from medm.types import JsonObject, Media, Sample

_LAYOUT = (
    "<set>/<set>.json (labels, train, test: [{image, label}]) for sets 0000 to 0024, with "
    "image.npy and masks/mask_<class>.npy"
)


@dataclass(frozen=True, slots=True)
class Structure:
    """One class that is present in one volume."""

    dataset: str
    image: str
    mask: str
    """Paths relative to the folder."""
    name: str


def structures(folder: Path, split: str) -> Iterator[Structure]:
    """Every class of every volume of a split, present or not, set by set.

    The sets are in the folder itself, or below it where all of M3D is in one tree.
    """
    files: list[Path] = []
    for place in (folder, folder / "M3D_Seg_npy", folder / "M3D_Seg"):
        found = place.glob("[0-9][0-9][0-9][0-9]/*.json")
        files = files or sorted(path for path in found if path.stem == path.parent.name)
    if not files:
        require(folder, "0000/0000.json", layout=_LAYOUT)
    for file in files:
        content = read_json_map(file)
        labels = field_of(content, "labels", dict, file=file, index=0)
        rows = content.get(split, content.get("training" if split == "train" else split))
        if not isinstance(rows, list):
            raise DataError("expected a list under this key", file=file, field=split)
        for index, row in enumerate(rows):
            image = npy_path(folder, field_of(row, "image", str, file=file, index=index))
            mask = npy_path(folder, field_of(row, "label", str, file=file, index=index))
            number = Path(mask).stem.removeprefix("mask_")
            # class numbers count from 0 in file names and from 1 in `labels`, whose 0 is the
            # background
            name = labels.get(str(int(number) + 1)) if number.isdigit() else None
            if name is None:
                raise DataError(
                    f"class {number!r} has no name in 'labels'",
                    file=file,
                    index=index,
                    field="label",
                )
            yield Structure(file.stem, image, mask, str(name))


def read_mask(folder: Path, relative: str, value: int | None = None) -> np.ndarray:
    """A mask (D, H, W) of booleans; with `value` the voxels that hold it."""
    array = read_array(resolve_inside(folder, relative))
    array = array[0] if array.ndim == 4 and array.shape[0] == 1 else array
    if array.ndim != 3:
        raise DataError(
            f"expected (1, D, H, W) or (D, H, W), found {array.shape}", file=folder / relative
        )
    return array > 0 if value is None else array == value


def read_volume_shape(folder: Path, record: Record) -> tuple[int, ...]:
    """Return the grid (D, H, W) of a record's volume."""
    volume = read_array(resolve_inside(folder, str(scoring.require_field(record, "volume"))))
    return volume.shape[-3:]


def box_of(mask: np.ndarray) -> Box:
    """Return the smallest box around the mask: first voxel and one past the last per axis."""
    places = np.nonzero(mask)
    return (*(float(axis.min()) for axis in places), *(float(axis.max() + 1) for axis in places))


def box_text(box: Box, size: Sequence[int]) -> str:
    """A box in M3D's convention: its upper corner is the index of the last voxel inside."""
    return CODECS["m3d"].encode((*box[:3], *(upper - 1 for upper in box[3:])), size)


class _Positioning(Task):
    """Classes that are present; absent ones have no box to name."""

    layout = _LAYOUT
    group_by = ("dataset",)
    cluster_by = "volume"

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        for structure in structures(folder, split):
            mask = read_mask(folder, structure.mask)
            if mask.any():
                yield self.sample(structure, box_of(mask), mask.shape, rng)

    @abstractmethod
    def sample(
        self, structure: Structure, box: Box, size: tuple[int, ...], rng: random.Random | None
    ) -> Sample:
        """One question about one structure."""


class M3DREC(_Positioning):
    """A name to a box."""

    tag = "refer"

    def sample(
        self, structure: Structure, box: Box, size: tuple[int, ...], rng: random.Random | None
    ) -> Sample:
        return make_sample(
            pick_template(prompts.VOLUME_REFER, rng).format(name=structure.name),
            id=structure.mask,
            tag=self.tag,
            answer=box_text(box, size),
            media=[Media("volume", structure.image)],
            box=list(box),
            size=list(size),
            dataset=structure.dataset,
        )

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        return scoring.refer(records, self.resampling_of(records), "m3d", corners="voxels")

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        return m3d_bench.box_iou(*scoring.texts(records), resampling=self.resampling_of(records))


class M3DREG(_Positioning):
    """A box to a name."""

    tag = "identify"

    def sample(
        self, structure: Structure, box: Box, size: tuple[int, ...], rng: random.Random | None
    ) -> Sample:
        text = box_text(box, size)
        return make_sample(
            pick_template(prompts.VOLUME_IDENTIFY, rng).format(box=text),
            id=structure.mask,
            tag=self.tag,
            answer=structure.name,
            media=[Media("volume", structure.image)],
            dataset=structure.dataset,
        )

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        return scoring.identify(records, self.resampling_of(records))

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        return scoring.m3d_texts(records, self.resampling_of(records))


class _M3DMasks(MaskTask):
    """Masks on M3D's grids, which have lost their spacing: distances are in voxels."""

    cluster_by = "volume"
    overlaps = (*MaskTask.overlaps, "soft_dice")

    def measure_masks(
        self, predictions: Sequence[np.ndarray], reference: MaskReference, record: Record
    ) -> JsonObject:
        numbers = super().measure_masks(predictions, reference, record)
        soft = np.zeros(reference.mask.shape)
        for prediction in predictions:
            soft = np.maximum(soft, prediction)
        return {**numbers, "soft_dice": m3d_bench.soft_dice_of(soft, reference.inside)}

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        part = present(records)
        result = mean_result(
            "m3d-bench-dice",
            [number(records[index], "soft_dice") for index in part],
            "m3d-bench|soft|denominator:+1|mean",
            self.resampling_of(records).part(part),
        )
        return [result if part else undefined(result, "no target of these items is present")]


class M3DSeg(_M3DMasks):
    """A name to a mask.

    Args:
        absent: see `M3DSegOptions`.
    """

    layout = _LAYOUT
    group_by = ("dataset",)
    class_field = "name"

    def __init__(
        self,
        *,
        absent: bool = False,
        rounds: int = 1000,
        seed: int = 0,
        cluster_by: str | None = None,
    ) -> None:
        super().__init__(rounds=rounds, seed=seed, cluster_by=cluster_by)
        self.absent = absent

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        for structure in structures(folder, split):
            if self.absent or read_mask(folder, structure.mask).any():
                yield make_sample(
                    pick_template(prompts.SEGMENT, rng).format(name=structure.name),
                    id=structure.mask,
                    tag=self.tag,
                    answer="It is [SEG].",
                    media=[Media("volume", structure.image)],
                    mask=structure.mask,
                    name=structure.name,
                    dataset=structure.dataset,
                )

    def reference(self, folder: Path, record: Record) -> MaskReference:
        mask = read_mask(Path(folder), str(scoring.require_field(record, "mask")))
        if not mask.any():
            # An absent class is written as a single voxel; the volume has the grid.
            mask = np.zeros(read_volume_shape(Path(folder), record), dtype=bool)
        return MaskReference(mask)


class M3DRefSeg(_M3DMasks):
    """A description, or a question that takes reasoning, to a mask."""

    layout = (
        "M3D_RefSeg.csv and M3D_RefSeg_test.csv (Image, Mask, Mask_ID, Question_Type, Question, "
        "Answer) and the .npy files"
    )
    group_by = ("question_type",)

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        names = (
            ["M3D_RefSeg_test.csv"]
            if split == "test"
            else ["M3D_RefSeg_train.csv", "M3D_RefSeg.csv"]
        )
        places = [
            f"{place}{name}" for place in ("", "M3D_RefSeg_npy/", "M3D_RefSeg/") for name in names
        ]
        file = require(folder, *places, layout=self.layout)
        columns = ("Image", "Mask", "Mask_ID", "Question_Type", "Question", "Answer")
        for index, row in enumerate(read_csv(file, columns)):
            if not row["Mask_ID"].strip().isdigit():
                raise DataError("expected a whole number", file=file, index=index, field="Mask_ID")
            kind = row["Question_Type"].strip()
            yield make_sample(
                row["Question"],
                id=f"{split}:{index}",
                tag=self.tag,
                answer=row["Answer"],
                media=[Media("volume", npy_path(folder, row["Image"]))],
                mask=npy_path(folder, row["Mask"]),
                mask_id=int(row["Mask_ID"]),
                question_type={"0": "descriptive", "1": "reasoning"}.get(kind, kind),
            )

    def reference(self, folder: Path, record: Record) -> MaskReference:
        return MaskReference(
            read_mask(
                Path(folder),
                str(scoring.require_field(record, "mask")),
                int(scoring.require_field(record, "mask_id")),
            )
        )
