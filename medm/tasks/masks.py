"""Tasks whose answers are masks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medm.errors import DataError
from medm.imaging import resolve_inside
from medm.metrics import m3d_bench, masks
from medm.metrics.base import MetricResult, mean_result
from medm.tasks.base import FAILED, Prediction, Record, Task
from medm.tasks.benchmark_files import read_array
from medm.types import JsonObject

WITHOUT_MASK = "without_mask"
"""Field of a record without a mask, for which an empty mask was measured."""


class MaskTask(Task):
    """Task whose answers are masks.

    Masks are measured one by one (`measure_mask`), so that a run keeps numbers and not volumes.
    """

    needs = frozenset({"masks"})
    tag = "segment"

    @abstractmethod
    def reference(self, folder: Path, record: Record) -> np.ndarray:
        """Return the true mask (D, H, W) of a sample, from its `extra` fields."""

    def measure_mask(
        self,
        probabilities: np.ndarray,
        reference: np.ndarray,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> dict[str, float]:
        """Return the numbers of one item, which are stored in its record.

        Args:
            probabilities: (D, H, W) in 0..1, on the grid of the reference; the mask is where they
                exceed 0.5.
            reference: (D, H, W) of 0 and 1.
            spacing: millimeters per step; M3D's volumes have lost theirs, so that distances are in
                voxels.
        """
        mask = np.asarray(probabilities) > 0.5
        return {
            "dice": masks.dice_of(mask, reference),
            "mask_iou": masks.iou_of(mask, reference),
            "hd95": masks.hd95_of(mask, reference, spacing),
            "nsd": masks.nsd_of(mask, reference, spacing, 2.0),
            "soft_dice": m3d_bench.soft_dice_of(probabilities, reference),
        }

    def measure_file(self, folder: Path, record: Record, file: Path | None) -> dict[str, float]:
        """Run `measure_mask` on a mask file.

        A missing file gets the worst numbers, also for an empty reference.

        Raises:
            DataError: the file is no .npy of the reference's shape with values in 0..1.
        """
        truth = self.reference(folder, record)
        if file is None:
            return {
                "dice": 0.0,
                "mask_iou": 0.0,
                "hd95": masks.diagonal(truth.shape),
                "nsd": 0.0,
                "soft_dice": 0.0,
            }
        array = read_array(file)
        array = array[0] if array.ndim == 4 and array.shape[0] == 1 else array
        if array.shape != truth.shape:
            raise DataError(
                f"the mask is {array.shape}, the reference {truth.shape}; expected one grid",
                file=file,
            )
        if not (array.min() >= 0 and array.max() <= 1):  # nan included
            raise DataError(
                f"expected 0 and 1, or probabilities; found {array.min()} to {array.max()}",
                file=file,
            )
        return self.measure_mask(array, truth)

    def measure_item(
        self, record: JsonObject, prediction: Prediction | None, folder: Path
    ) -> JsonObject:
        if prediction is not None and "dice" in prediction.numbers:
            return record  # measured elsewhere
        name = prediction.mask if prediction is not None else None
        mask = None
        if prediction is not None and name is not None:
            mask = resolve_inside(prediction.folder or folder, name)
        numbers = self.measure_file(folder, record, mask)
        return {**record, **numbers, "prediction": name or "", WITHOUT_MASK: mask is None}

    def check(self, records: Sequence[Record]) -> None:
        """References of masks are read one by one, as the masks are; nothing is scored on trial."""

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        names = {"dice": "dice", "mask_iou": "mask-iou", "hd95": "hd95", "nsd": "nsd@2"}
        signature = "hard>0.5|unit:step|missing mask:dice 0|mean"
        return [
            mean_result(
                name,
                [_number(record, field) for record in records],
                signature,
                self.resampling_of(records),
            )
            for field, name in names.items()
        ]

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        scores = [_number(record, "soft_dice") for record in records]
        return [
            mean_result(
                "m3d-bench-dice",
                scores,
                "m3d-bench|soft|denominator:+1|mean",
                self.resampling_of(records),
            )
        ]

    def _checked(self, record: Record, index: int) -> JsonObject:
        row = super()._checked(record, index)
        if row.get(FAILED) is not None:
            row |= dict.fromkeys(("dice", "mask_iou", "nsd", "soft_dice"), 0.0)
        measured = (
            row.get("dice") is not None and not row.get(WITHOUT_MASK) and row.get(FAILED) is None
        )
        return {**row, "prediction": row["prediction"] or ("mask" if measured else "")}


def _number(record: Record, field: str) -> float:
    """Return a number of a record.

    An item without a mask has overlap 0, and needs its distance from `measure_mask`.
    """
    if record.get(field) is None:
        if field == "hd95":
            raise DataError(
                f"record {record.get('id')!r} has no 'hd95'; where the model gives no mask, "
                "measure an empty one"
            )
        return 0.0
    return float(record[field])
