"""UniBiomed's 3-D segmentation: volumes kept as slices, and a phrase for each target."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from medm.errors import DataError
from medm.metrics import unibiomed
from medm.metrics.base import MetricResult
from medm.metrics.masks import dice_of, iou_of
from medm.tasks import prompts, scoring
from medm.tasks.base import Record, make_sample, pick_template
from medm.tasks.benchmark_files import field_of, image_size, read_json_map
from medm.tasks.masks import MaskReference, MaskTask, number, present
from medm.tasks.unibiomed import with_set_mean
from medm.tasks.unibiomed_files import inner_path, read_plane, sets_of, slice_of
from medm.types import Config, JsonObject, Media, Sample

_LAYOUT = (
    "<set>/meta_<split>.json ({volumes: {name: {slices, expressions: {id: {exp, mask_file}}}}}) "
    "with the slices in <set>/<split>/ and the masks in <set>/<split>_mask/; or one such set"
)


@dataclass(frozen=True, slots=True)
class Target:
    """One target of one volume."""

    id: str
    dataset: str
    scan: str
    """Set and name of the volume."""
    slices: tuple[str, ...]
    """Paths relative to the data folder, in the order of the volume."""
    masks: tuple[str | None, ...]
    """Of each slice its mask; None where the set lists none for the target."""
    phrase: str
    volume: str | None
    """A file of the whole volume, where the set names one as `volume`."""
    spacing: tuple[float, ...] | None
    """Millimeters between slices, rows and columns, where the set says so."""


def targets(folder: Path, split: str, only: Sequence[str] = ()) -> Iterator[Target]:
    """Return every target of every volume of a split.

    Raises:
        DataError: a file or field is missing, or masks and slices do not fit.
    """
    for name, (file, prefix) in sets_of(folder, f"meta_{split}.json", _LAYOUT, only).items():
        volumes = field_of(read_json_map(file), "volumes", dict, file=file, index=0)
        for index, (scan, volume) in enumerate(volumes.items()):
            names = field_of(volume, "slices", list, file=file, index=index)
            if not names or not all(isinstance(one, str) for one in names):
                raise DataError("expected a list of files", file=file, index=index, field="slices")
            expressions = field_of(volume, "expressions", dict, file=file, index=index)
            whole = volume.get("volume")
            for key, expression in expressions.items():
                yield Target(
                    id=f"{name}:{split}:{scan}:{key}",
                    dataset=name,
                    scan=f"{name}:{scan}",
                    slices=tuple(inner_path(folder, prefix, split, one) for one in names),
                    masks=_by_slice(folder, prefix, split, names, expression, file, index),
                    phrase=field_of(expression, "exp", str, file=file, index=index).strip(),
                    volume=None if whole is None else f"{prefix}{whole}",
                    spacing=_spacing(volume, file, index),
                )


def _by_slice(
    folder: Path,
    prefix: str,
    split: str,
    names: Sequence[str],
    expression: Config,
    file: Path,
    index: int,
) -> tuple[str | None, ...]:
    """Return the mask of each slice: its name begins with that of the slice."""
    listed = field_of(expression, "mask_file", list, file=file, index=index)
    found: list[str | None] = [None] * len(names)
    for mask in listed:
        best = slice_of(str(mask), names)
        if best is None:
            raise DataError(
                f"mask {mask!r} begins with the name of no slice of its volume",
                file=file,
                index=index,
                field="mask_file",
            )
        found[best] = inner_path(folder, prefix, f"{split}_mask", str(mask))
    return tuple(found)


def _spacing(volume: Config, file: Path, index: int) -> tuple[float, ...] | None:
    value = volume.get("spacing")
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(isinstance(step, (int, float)) and 0 < step < math.inf for step in value)
    ):
        raise DataError(
            "expected the millimeters between slices, rows and columns",
            file=file,
            index=index,
            field="spacing",
        )
    return tuple(float(step) for step in value)


class Segment3D(MaskTask):
    """A phrase to the mask of a volume, on every slice.

    The published scores are of the slices that hold the target: what is drawn elsewhere is free.

    Args:
        only: see `SetTaskOptions`.
        media: see `SliceTaskOptions`.
    """

    layout = _LAYOUT
    group_by = ("dataset",)
    cluster_by = "scan"
    class_field = "phrase"
    overlaps = (*MaskTask.overlaps, "listed_dice", "listed_iou")

    def __init__(
        self,
        *,
        only: Sequence[str] = (),
        media: Literal["volume", "images"] = "volume",
        rounds: int = 1000,
        seed: int = 0,
        cluster_by: str | None = None,
    ) -> None:
        super().__init__(rounds=rounds, seed=seed, cluster_by=cluster_by)
        self.only, self.media = tuple(only), media

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder = Path(folder)
        for one in targets(folder, self._known_split(split), self.only):
            if self.media == "images":
                media = [Media("image", path) for path in one.slices]
            else:
                media = [Media("volume", one.volume or _folder_of(folder, one))]
            yield make_sample(
                pick_template(prompts.SEGMENT, rng).format(name=one.phrase),
                id=one.id,
                tag=self.tag,
                answer="It is [SEG].",
                media=media,
                slices=list(one.slices),
                mask_files=list(one.masks),
                phrase=one.phrase,
                dataset=one.dataset,
                scan=one.scan,
                spacing=None if one.spacing is None else list(one.spacing),
            )

    def reference(self, folder: Path, record: Record) -> MaskReference:
        folder, paths = Path(folder), scoring.require_field(record, "mask_files")
        known = {path: read_plane(folder, path) for path in paths if path is not None}
        sizes = {plane.shape for plane in known.values()}
        if not sizes:
            slices = scoring.require_field(record, "slices")
            width, height = image_size(folder, str(slices[0]))
            sizes = {(height, width)}
        if len(sizes) > 1:
            raise DataError(
                f"the masks of {record.get('id')!r} differ in size: {sorted(sizes)}; expected "
                "slices of one size"
            )
        empty = np.zeros(next(iter(sizes)), dtype=bool)
        stack = np.stack([empty if path is None else known[path] for path in paths])
        spacing = record.get("spacing")
        return MaskReference(stack, None if spacing is None else tuple(spacing))

    def measure_masks(
        self, predictions: Sequence[np.ndarray], reference: MaskReference, record: Record
    ) -> JsonObject:
        numbers = super().measure_masks(predictions, reference, record)
        listed = [path is not None for path in scoring.require_field(record, "mask_files")]
        truth = reference.inside[listed]
        mask = np.zeros(truth.shape, dtype=bool)
        for prediction in predictions:
            mask |= np.asarray(prediction)[listed] > 0.5
        if not truth.any():
            return numbers
        surfaces = unibiomed.surfaces_of(mask, truth)
        return {
            **numbers,
            "listed_dice": dice_of(mask, truth),
            "listed_iou": iou_of(mask, truth),
            # NaN is not JSON, and is no number of a record
            "listed_hd95": None if math.isnan(surfaces["hd95"]) else surfaces["hd95"],
            "listed_nsd": surfaces["nsd"],
        }

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        part = present(records)
        rows, drawn = [records[index] for index in part], self.resampling_of(records).part(part)
        return with_set_mean(self.mask_results(records), rows, drawn)

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        part = present(records)
        rows, drawn = [records[index] for index in part], self.resampling_of(records).part(part)
        scores = {
            "volume-dice": [number(row, "listed_dice") for row in rows],
            "volume-iou": [number(row, "listed_iou") for row in rows],
        }
        phrases = [f"{row['dataset']}: {row['phrase']}" for row in rows]
        means = unibiomed.class_means(scores, phrases, drawn, scored="slices:with the target")
        distances = [
            unibiomed.defined_mean(
                f"unibiomed-{name}",
                [math.nan if row.get(field) is None else float(row[field]) for row in rows],
                f"unibiomed|unit:voxel of 512 x 512|slices:with the target|{rule}|mean",
                drawn,
            )
            for name, field, rule in (
                ("hd95", "listed_hd95", "mismatched voxels"),
                ("nsd@2", "listed_nsd", "one-empty:0"),
            )
        ]
        return [*means, *distances]


def _folder_of(folder: Path, target: Target) -> str:
    """Return the folder that holds the slices of a volume, and nothing else.

    Raises:
        DataError: there is no such folder.
    """
    parents = {PurePosixPath(path).parent for path in target.slices}
    parent = parents.pop()
    there = {path.name for path in (folder / parent).glob("*") if path.is_file()}
    own = {PurePosixPath(path).name for path in target.slices}
    if parents or there != own:
        raise DataError(
            f"the {len(own)} slices of {target.scan!r} have no folder of their own ({parent} "
            f"holds {len(there)} files), so that they cannot be read as a volume; move each "
            "volume to a folder, name a file of it as 'volume' in the annotation, or show the "
            "slices as images (media: images)",
            file=folder / parent,
        )
    numbers = [
        [int(number) for number in re.findall(r"[0-9]+", PurePosixPath(path).stem)][-1:]
        for path in target.slices
    ]
    if numbers != sorted(numbers) or [] in numbers:
        raise DataError(
            f"the slices of {target.scan!r} are not listed in the order of the last number of "
            "their names, in which a folder is read as a volume; show the slices as images "
            "(media: images)",
            file=folder / parent,
        )
    return parent.as_posix()
