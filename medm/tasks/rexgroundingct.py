"""ReXGroundingCT (Baharoon et al. 2025, arXiv 2507.22030): a finding in words to its mask in a CT.

The layout is that of the data set's card (https://huggingface.co/datasets/rajpurkarlab/
ReXGroundingCT): one mask file a scan with the axes (finding, x, y, z), whose values number the
instances of a finding. It was tested on files of that layout, not on the gated files themselves.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from medm.errors import DataError
from medm.imaging import resolve_inside
from medm.imaging.nifti import read_nifti_geometry, read_nifti_stack
from medm.metrics import grounded
from medm.metrics.base import MetricResult
from medm.tasks import prompts, scoring
from medm.tasks.base import Record, make_sample, pick_template
from medm.tasks.benchmark_files import field_of, read_json_map, require
from medm.tasks.ct_rate import patient_of, volume_path
from medm.tasks.masks import MaskReference, MaskTask, number, present, spacing_of
from medm.types import JsonObject, Media, Sample


class ReXGroundingCT(MaskTask):
    """One question a finding of a scan.

    `dice` is the benchmark's global Dice, `hit-rate@0.1` its hit rate. Instances of a prediction
    are its connected parts; the benchmark does not say how it makes them, nor how it pairs them and
    sums over scans.

    Args:
        masks: see `ReXGroundingOptions`.
    """

    layout = (
        "dataset.json ({split: [{name, findings, categories}]}), segmentations/<name> with the "
        "axes (finding, x, y, z), and CT-RATE's volumes"
    )
    splits = ("train", "val", "test")
    eval_split = "val"
    group_by = ("category",)
    cluster_by = "patient"

    def __init__(
        self,
        *,
        masks: Literal["stored", "turned"] = "stored",
        rounds: int = 1000,
        seed: int = 0,
        cluster_by: str | None = None,
    ) -> None:
        super().__init__(rounds=rounds, seed=seed, cluster_by=cluster_by)
        self.masks = masks
        self._stack: tuple[Path, np.ndarray] | None = None

    def samples(
        self, folder: Path, split: str = "val", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        file = require(folder, "dataset.json", layout=self.layout)
        rows = read_json_map(file).get(split)
        if not isinstance(rows, list):
            raise DataError("expected a list of scans under this key", file=file, field=split)
        for index, row in enumerate(rows):
            name = field_of(row, "name", str, file=file, index=index)
            findings = field_of(row, "findings", dict, file=file, index=index)
            categories = row.get("categories")
            mask = require(folder, f"segmentations/{name}", layout=self.layout)
            for key, finding in findings.items():
                if not key.isdigit() or not isinstance(finding, str):
                    raise DataError(
                        "expected a text by the number of its mask",
                        file=file,
                        index=index,
                        field="findings",
                    )
                yield make_sample(
                    pick_template(prompts.SEGMENT_FINDING, rng).format(finding=finding),
                    id=f"{name}:{key}",
                    tag=self.tag,
                    answer="It is [SEG].",
                    media=[Media("volume", volume_path(folder, name))],
                    mask_file=mask.relative_to(folder).as_posix(),
                    finding=int(key),
                    patient=patient_of(name),
                    category=str(categories.get(key)) if isinstance(categories, dict) else None,
                )

    def reference(self, folder: Path, record: Record) -> MaskReference:
        path = resolve_inside(Path(folder), str(scoring.require_field(record, "mask_file")))
        if self._stack is None or self._stack[0] != path:  # findings of a scan follow each other
            self._stack = path, read_nifti_stack(path, str(path))
        stack, finding = self._stack[1], int(scoring.require_field(record, "finding"))
        if finding >= len(stack):
            raise DataError(
                f"{len(stack)} masks, but finding {finding} is asked for; the first axis numbers "
                "the findings from 0",
                file=path,
            )
        mask = stack[finding] if self.masks == "stored" else stack[finding][:, ::-1, ::-1]
        volume = resolve_inside(Path(folder), str(scoring.require_field(record, "volume")))
        if volume.suffix == ".npy":
            return MaskReference(mask)
        shape, geometry = read_nifti_geometry(volume, str(volume))
        if shape != mask.shape:
            raise DataError(
                f"a mask of {mask.shape} (z, y, x) for a volume of {shape}; expected one grid",
                file=path,
            )
        return MaskReference(mask, spacing_of(geometry), geometry)

    def measure_masks(
        self, predictions: Sequence[np.ndarray], reference: MaskReference, record: Record
    ) -> JsonObject:
        mask = np.zeros(reference.mask.shape, dtype=bool)
        for prediction in predictions:
            mask |= np.asarray(prediction) > 0.5
        counts = grounded.instance_counts(mask, reference.mask)
        return {
            **super().measure_masks(predictions, reference, record),
            "instances": list(counts),
        }

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        part = present(records)
        drawn = self.resampling_of(records).part(part)
        hits = grounded.hit_results([number(records[index], "dice") for index in part], drawn)
        counts = [
            tuple(row["instances"]) if row.get("instances") is not None else (0, 0, 1)
            for row in records
        ]
        instances = grounded.instance_results(counts, self.resampling_of(records))
        found = self.mask_results(records)
        return [found[0], *hits, *instances, *found[1:]]
