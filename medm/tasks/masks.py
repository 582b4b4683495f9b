"""Tasks whose answers are masks, of images and of volumes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from medm.errors import DataError
from medm.imaging import resolve_inside
from medm.imaging.geometry import Geometry
from medm.imaging.label_maps import read_label_map
from medm.imaging.placement import Placement
from medm.imaging.rle import decode
from medm.metrics import grounded, masks
from medm.metrics.base import MetricResult, Resampling, mean_result, undefined
from medm.tasks import scoring
from medm.tasks.base import FAILED, PredictedMask, Prediction, Record, Task, scoped
from medm.tasks.benchmark_files import read_array
from medm.types import JsonObject, PredictionField

ANSWERED = "answered"
"""Field of a record: whether the item has a reply or a mask at all."""
UNIT = "unit"
"""Field of a record: unit of its distances, "mm" or "voxel"."""
TARGET, DRAWN = "target_voxels", "mask_voxels"
"""Fields of a record: voxels of the reference and of the predicted mask."""

_IMAGES = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg", ".gif", ".webp")
"""Ends of names of files that hold one plane."""


@dataclass(frozen=True, slots=True, eq=False)
class MaskReference:
    """True mask of an item, on the grid of its image or volume."""

    mask: np.ndarray
    """(H, W) or (D, H, W), bool; or whole numbers, one for each instance."""
    spacing: tuple[float, ...] | None = None
    """Millimeters between voxels along each axis; None where they are not known."""
    geometry: Geometry | None = None
    """Of the file, which predicted files are compared with; None where it has none."""
    parts: tuple[np.ndarray, ...] = ()
    """Masks of the findings one by one, where there are several of an image."""

    @property
    def inside(self) -> np.ndarray:
        """The mask as bool."""
        return self.mask > 0

    @property
    def steps(self) -> tuple[float, ...]:
        """The spacing, or 1 along each axis."""
        return (1.0,) * self.mask.ndim if self.spacing is None else self.spacing

    @property
    def unit(self) -> Literal["mm", "voxel"]:
        """Unit of `steps`."""
        return "voxel" if self.spacing is None else "mm"


class MaskTask(Task):
    """Task whose answers are masks.

    Masks are measured one by one (`measure_item`), so that a run keeps numbers and not volumes.

    Overlap and distances are of targets that are there. A target that is absent (its reference is
    empty) is scored by whether anything is drawn: `false-positive-rate`. An item without any reply
    has the worst value of both.
    """

    needs: frozenset[PredictionField] = frozenset({"masks"})
    tag = "segment"
    surfaces: ClassVar[bool] = True
    """HD95 and NSD are measured."""
    class_field: ClassVar[str | None] = None
    """Record field of the class, over which a second mean is taken."""
    overlaps: ClassVar[tuple[str, ...]] = ("dice", "mask_iou", "nsd")
    """Numbers of an item that are 0 without a reply, also where nothing was to be drawn."""

    @abstractmethod
    def reference(self, folder: Path, record: Record) -> MaskReference:
        """Return the true mask of a sample, from its `extra` fields."""

    def measure_masks(
        self, predictions: Sequence[np.ndarray], reference: MaskReference, record: Record
    ) -> JsonObject:
        """Return the numbers of one item, which are stored in its record.

        Args:
            predictions: masks of the reply on the grid of the reference, bool or probabilities;
                their union is compared.
            reference: of the item.
            record: of the item.
        """
        truth = reference.inside
        mask = np.zeros(truth.shape, dtype=bool)
        for prediction in predictions:
            mask |= np.asarray(prediction) > 0.5
        numbers: JsonObject = {
            "dice": masks.dice_of(mask, truth),
            "mask_iou": masks.iou_of(mask, truth),
            TARGET: int(truth.sum()),
            DRAWN: int(mask.sum()),
            UNIT: reference.unit,
        }
        if self.surfaces:
            numbers |= {
                "hd95": masks.hd95_of(mask, truth, reference.steps),
                "nsd": masks.nsd_of(mask, truth, reference.steps, 2.0),
            }
        return numbers

    def measure_item(
        self, record: JsonObject, prediction: Prediction | None, folder: Path
    ) -> JsonObject:
        """Return the record with the numbers of its masks.

        A reply in words without a mask says that the target is absent: an empty mask. No reply and
        an error are no answer.

        Raises:
            DataError, MediaError: a mask cannot be read, or does not fit the reference.
        """
        if prediction is not None and "dice" in prediction.numbers:
            return {**record, ANSWERED: True}  # measured elsewhere
        reference = self.reference(folder, record)
        failed = prediction is None or prediction.error is not None
        answered = (
            not failed
            and prediction is not None
            and bool(prediction.masks or prediction.text.strip())
        )
        found: list[np.ndarray] = []
        if prediction is not None and answered:
            found = read_masks(prediction, folder, reference)
        numbers = self.measure_masks(found, reference, record)
        if not answered:
            numbers |= dict.fromkeys(self.overlaps, 0.0)
        shown = str(record.get("prediction") or "")
        if answered and prediction is not None and not shown.strip():
            shown = ", ".join(mask.file or "mask" for mask in prediction.masks)
        return {**record, **numbers, "prediction": shown, ANSWERED: answered}

    def is_empty(self, record: Record) -> bool:
        return not record.get(ANSWERED, record.get("dice") is not None)

    def check(self, records: Sequence[Record]) -> None:
        """References of masks are read one by one, as the masks are; nothing is scored on trial."""
        self.require_metrics()
        self.resampling_of(records)

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        return self.mask_results(records)

    def mask_results(self, records: Sequence[Record]) -> list[MetricResult]:
        """Return overlap and distances of present targets, and what is drawn for absent ones."""
        resampling = self.resampling_of(records)
        part = present(records)
        there = [records[index] for index in part]
        drawn = resampling.part(part)
        results = []
        for field, name in (("dice", "dice"), ("mask_iou", "mask-iou")):
            results += self._means(
                name, field, there, drawn, "hard>0.5|absent targets:apart|no answer:0|mean"
            )
        if self.surfaces:
            results += self._distances(there, drawn)
        shown = [not is_present(row) if self.is_empty(row) else is_drawn(row) for row in records]
        return results + grounded.absent_rates(shown, [is_present(r) for r in records], resampling)

    def _means(
        self, name: str, field: str, rows: Sequence[Record], drawn: Resampling, signature: str
    ) -> list[MetricResult]:
        """Return the mean over items, and over classes where the task has some."""
        result = mean_result(name, [number(row, field) for row in rows], signature, drawn)
        if not rows:
            return [undefined(result, "no target of these items is present")]
        if self.class_field is None or len({str(row.get(self.class_field)) for row in rows}) < 2:
            return [result]
        classes = scoring.mean_over_groups(rows, result, self.class_field, drawn)
        return [result, replace(classes, name=f"{name}-class-mean")]

    def _distances(self, rows: Sequence[Record], drawn: Resampling) -> list[MetricResult]:
        """Return HD95 and NSD, by unit where spacing is known for some items only."""
        units = sorted({str(row.get(UNIT, "voxel")) for row in rows})
        results: list[MetricResult] = []
        for unit in units or ["voxel"]:
            part = [i for i, row in enumerate(rows) if str(row.get(UNIT, "voxel")) == unit]
            mine = [rows[index] for index in part]
            of_unit: list[MetricResult] = []
            for field, name, empty in (
                ("hd95", "hd95", "one-empty:diagonal"),
                ("nsd", "nsd@2", "one-empty:0"),
            ):
                signature = f"monai|unit:{unit}|absent targets:apart|{empty}|mean"
                of_unit += self._means(name, field, mine, drawn.part(part), signature)
            results += scoped(unit, of_unit) if len(units) > 1 else of_unit
        return results

    def _checked(self, record: Record, index: int) -> JsonObject:
        row = super()._checked(record, index)
        if row.get(FAILED) is not None:
            row |= {**dict.fromkeys(self.overlaps, 0.0), ANSWERED: False}
        return row


def is_present(record: Record) -> bool:
    """Return whether the target of an item is there; without a count of its voxels, it is."""
    return record.get(TARGET) is None or int(record[TARGET]) > 0


def is_drawn(record: Record) -> bool:
    """Return whether the predicted mask of an item holds a voxel."""
    if record.get(DRAWN) is None:
        return number(record, "dice") > 0
    return int(record[DRAWN]) > 0


def present(records: Sequence[Record]) -> list[int]:
    """Return the positions of the items whose target is there."""
    return [index for index, record in enumerate(records) if is_present(record)]


def number(record: Record, field: str) -> float:
    """Return a number of a record.

    An item without a mask has overlap 0, and needs its distance from `measure_masks`.
    """
    if record.get(field) is None:
        if field == "hd95":
            raise DataError(
                f"record {record.get('id')!r} has no 'hd95'; where the model gives no mask, "
                "measure an empty one"
            )
        return 0.0
    return float(record[field])


def read_masks(prediction: Prediction, folder: Path, reference: MaskReference) -> list[np.ndarray]:
    """Return the masks of a prediction on the grid of the reference, bool or probabilities.

    A mask of one plane belongs to a slice of a volume where the item shows the slices as images;
    all of them are one mask.

    Args:
        prediction: with masks as files or codes.
        folder: of the files, where the prediction names none.
        reference: gives grid and geometry.

    Raises:
        DataError, MediaError: a mask cannot be read, or lies on another grid.
    """
    root = prediction.folder or folder
    whole: list[np.ndarray] = []
    stack: np.ndarray | None = None
    shape = reference.mask.shape
    for mask in prediction.masks:
        array, name = _read_mask(mask, root, reference)
        if array.shape == shape:
            whole.append(array)
            continue
        if len(shape) != 3 or array.shape != shape[1:]:
            raise DataError(
                f"the mask is {array.shape}, the reference {shape}; expected one grid",
                file=name,
            )
        if not 0 <= mask.media < shape[0]:
            raise DataError(
                f"a mask of image {mask.media} of an item with {shape[0]} slices", file=name
            )
        stack = np.zeros(shape, dtype=bool) if stack is None else stack
        stack[mask.media] |= array > 0.5
    return whole if stack is None else [*whole, stack]


def _read_mask(mask: PredictedMask, root: Path, reference: MaskReference) -> tuple[np.ndarray, str]:
    """Return one mask, and its name for messages."""
    if mask.file is None:
        if mask.rle is None:
            raise DataError("a predicted mask without a file and without a run-length code")
        return decode(mask.rle), "run-length code"
    path = resolve_inside(root, mask.file)
    if path.suffix.lower() == ".npy":
        array = read_array(path)
        array = array[0] if array.ndim > reference.mask.ndim and len(array) == 1 else array
        if mask.value is not None:
            return array == mask.value, str(path)
        if array.size and not (array.min() >= 0 and array.max() <= 1):  # nan included
            raise DataError(
                f"expected 0 and 1, or probabilities; found {array.min()} to {array.max()}",
                file=path,
            )
        return array, str(path)
    shape, geometry = reference.mask.shape, reference.geometry
    if path.suffix.lower() in _IMAGES:
        shape, geometry = shape[-2:], None
    elif len(shape) == 2:
        raise DataError(
            f"expected an image ({', '.join(_IMAGES)}) or .npy for a mask of {shape}", file=path
        )
    return _target(read_label_map(path, Placement.of_source(shape, geometry)).labels, mask, path)


def _target(labels: np.ndarray, mask: PredictedMask, path: Path) -> tuple[np.ndarray, str]:
    """Return the voxels of one label. Without a value there must be a single one."""
    if mask.value is not None:
        return labels == mask.value, str(path)
    found = np.unique(labels[labels > 0])
    if len(found) > 1:
        listed = ", ".join(str(value) for value in found[:4].tolist())
        raise DataError(
            f"{len(found)} values beside 0 ({listed}{' ...' if len(found) > 4 else ''}); expected "
            'a mask of one value, or {"file": ..., "value": ...} for one label of a map',
            file=path,
        )
    return labels > 0, str(path)


def spacing_of(geometry: Geometry | None) -> tuple[float, ...] | None:
    """Return the spacing of a volume, None where its file gives no direction."""
    return None if geometry is None else tuple(float(step) for step in geometry.spacing)
