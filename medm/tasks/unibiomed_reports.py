"""UniBiomed's tasks on reports: MedTrinity captions, RadGenome reports and questions with masks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medm.metrics import grounded, unibiomed
from medm.metrics.base import MetricResult
from medm.metrics.bertscore import require_encoder
from medm.metrics.match import normalized_match, token_f1
from medm.tasks import prompts, scoring
from medm.tasks.base import Record, Task, make_sample, pick_template
from medm.tasks.benchmark_files import field_of, read_json_map, require
from medm.tasks.masks import MaskReference
from medm.tasks.reports import CaptionTask
from medm.tasks.unibiomed import Findings
from medm.tasks.unibiomed_files import annotation_rows, inner_path
from medm.types import Media, Sample

_NO_FINDINGS = "no findings"
"""Words of an abnormality whose mask counts as empty, whatever its file holds."""
_RADGENOME = (
    "<split>_parse.json ({index: {abnormality, image_file, mask_file, report, anatomy}}) with the "
    "slices and masks as PNG"
)


class MedTrinityReport(CaptionTask):
    """An image to its caption, on every image of the split.

    The published script scores 1000 that it draws without a seed, and its README joins them to the
    captions of the training file; here the captions of the split are used.
    """

    layout = "<split>.json (annotations: [{file_name, caption}]) and the images that it names"
    cluster_by = "image"

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        file = require(folder, f"{split}.json", f"MedTrinity/{split}.json", layout=self.layout)
        prefix = "" if file.parent == folder else "MedTrinity/"
        for index, row in enumerate(annotation_rows(file)):
            name = field_of(row, "file_name", str, file=file, index=index)
            caption = field_of(row, "caption", str, file=file, index=index)
            yield make_sample(
                pick_template(prompts.CAPTION, rng),
                id=f"{split}:{index}",
                tag=self.tag,
                answer=" ".join(caption.split()),
                media=[Media("image", inner_path(folder, prefix, "", name))],
            )


class RadGenome(Findings):
    """A slice of a chest CT to words and a mask of all of its abnormalities."""

    layout = _RADGENOME

    def rows(self, folder: Path, split: str) -> Iterator[tuple[str, dict[str, str]]]:
        """Return the id and the fields of each slice; paths are relative to the data folder."""
        file = require(
            folder, f"{split}_parse.json", f"RadGenome/{split}_parse.json", layout=self.layout
        )
        prefix = "" if file.parent == folder else "RadGenome/"
        for index, (key, row) in enumerate(read_json_map(file).items()):
            found = {
                name: " ".join(field_of(row, name, str, file=file, index=index).split())
                for name in ("abnormality", "image_file", "mask_file", "report", "anatomy")
            }
            found["image"] = inner_path(folder, prefix, split, found["image_file"])
            found["mask"] = inner_path(folder, prefix, f"{split}_mask", found["mask_file"])
            yield f"{split}:{key}", found

    def reference(self, folder: Path, record: Record) -> MaskReference:
        found = super().reference(folder, record)
        if _NO_FINDINGS not in str(scoring.require_field(record, "abnormality")).lower():
            return found
        empty = np.zeros_like(found.inside)
        return MaskReference(empty, parts=(empty,))


class RadGenomeReport(RadGenome):
    """A slice to its report, with the mask of what the report finds.

    Args:
        bertscore: see `ReportTaskOptions`.
    """

    tag = "caption"

    def __init__(self, *, bertscore: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.bertscore = bertscore

    def without_models(self) -> Task:
        task = super().without_models()
        assert isinstance(task, RadGenomeReport)
        task.bertscore = None
        return task

    def require_metrics(self) -> None:
        if self.bertscore is not None:
            require_encoder(self.bertscore)

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        for name, row in self.rows(folder, split):
            yield make_sample(
                pick_template(prompts.GROUNDED_REPORT, rng),
                id=name,
                tag=self.tag,
                answer=row["report"],
                media=[Media("image", row["image"])],
                mask_files=[row["mask"]],
                abnormality=row["abnormality"],
            )

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        found = scoring.caption(
            _words(records), self.resampling_of(records), bertscore=self.bertscore, chest=True
        )
        return [*found, *self.paired(records)]

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        return [self.original_dice(records)]


class RadGenomeVQA(RadGenome):
    """A question about an anatomy to its abnormality and the mask."""

    tag = "vqa"
    group_by = ("anatomy",)

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        for name, row in self.rows(folder, split):
            yield make_sample(
                pick_template(prompts.GROUNDED_VQA, rng).format(anatomy=row["anatomy"]),
                id=name,
                tag=self.tag,
                answer=row["abnormality"],
                media=[Media("image", row["image"])],
                mask_files=[row["mask"]],
                abnormality=row["abnormality"],
                anatomy=row["anatomy"],
            )

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        resampling, pair = self.resampling_of(records), scoring.texts(_words(records))
        found = normalized_match(*pair, resampling=resampling)
        found += token_f1(*pair, resampling=resampling)
        return [*found, *self.paired(records)]

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        pair = scoring.texts([{**row, "prediction": row["prediction"].lower()} for row in records])
        found = unibiomed.phrase(*pair, resampling=self.resampling_of(records))
        return [*found, self.original_dice(records)]


def _words(records: Sequence[Record]) -> list[Record]:
    """Return records whose replies have no control tokens."""
    return [
        {**record, "prediction": grounded.without_marks(record["prediction"])} for record in records
    ]
