"""Reports and captions of 2-D images: IU X-Ray, MIMIC-CXR and MedPix."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from medm.errors import DataError
from medm.metrics import RadEvalScore
from medm.metrics.base import MetricResult
from medm.metrics.bertscore import require_encoder
from medm.metrics.radeval import radeval, require_radeval
from medm.tasks import prompts, scoring
from medm.tasks.base import Record, Task, make_sample, pick_template
from medm.tasks.benchmark_files import field_of, read_csv, read_json_map, require
from medm.types import Media, Sample


class CaptionTask(Task):
    """Scores a text against a text."""

    tag = "caption"
    chest: ClassVar[bool] = False
    """Chest radiographs: the labels of 14 findings are compared as well."""

    def __init__(
        self,
        *,
        bertscore: str | None = None,
        rounds: int = 1000,
        seed: int = 0,
        cluster_by: str | None = None,
    ) -> None:
        super().__init__(rounds=rounds, seed=seed, cluster_by=cluster_by)
        self.bertscore = bertscore

    def without_models(self) -> Task:
        task = super().without_models()
        assert isinstance(task, CaptionTask)
        task.bertscore = None
        return task

    def require_metrics(self) -> None:
        if self.bertscore is not None:
            require_encoder(self.bertscore)

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        return scoring.caption(
            records, self.resampling_of(records), bertscore=self.bertscore, chest=self.chest
        )


class AnnotatedReports(CaptionTask):
    """R2Gen's `annotation.json`: {split: [{id, report, image_path: [...]}]}.

    Args:
        radeval: see `medm.tasks.ChestReportOptions`.
        options: those of a task, and `bertscore`.
    """

    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    chest = True
    images: ClassVar[str] = "images"
    """Folder that `image_path` is relative to."""
    views: int = 1
    """Images used of each examination."""
    every_image: bool = False
    """All images are used, `views` or more."""

    def __init__(self, *, radeval: Sequence[RadEvalScore] = (), **options: Any) -> None:
        super().__init__(**options)
        self.radeval = list(radeval)

    def without_models(self) -> Task:
        task = super().without_models()
        assert isinstance(task, AnnotatedReports)
        task.radeval = []
        return task

    def require_metrics(self) -> None:
        super().require_metrics()
        if self.radeval:
            require_radeval()

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        results = super().measure(records)
        if self.radeval:
            pair = scoring.texts(records)
            drawn = self.resampling_of(records)
            results += radeval(*pair, scores=self.radeval, resampling=drawn)
        return results

    @property
    def layout(self) -> str:  # type: ignore[override]
        """Annotation file and image folder."""
        return f"annotation.json (R2Gen's splits with image_path and report) and {self.images}/"

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        file = require(folder, *self.annotation_files(split), layout=self.layout)
        require(folder, self.images, layout=self.layout)
        rows = read_json_map(file).get(split)
        if not isinstance(rows, list):
            raise DataError(
                "expected a list of examinations under this key", file=file, field=split
            )
        for index, row in enumerate(rows):
            paths = field_of(row, "image_path", list, file=file, index=index)
            report = field_of(row, "report", str, file=file, index=index)
            if len(paths) < self.views or not all(isinstance(path, str) for path in paths):
                raise DataError(
                    f"expected {self.views} path(s) or more",
                    file=file,
                    index=index,
                    field="image_path",
                )
            used = paths if self.every_image else paths[: self.views]
            media = [Media("image", f"{self.images}/{path}") for path in used]
            yield make_sample(
                pick_template(prompts.CHEST_REPORT, rng),
                id=str(row.get("id", paths[0])),
                tag=self.tag,
                answer=" ".join(report.split()),
                media=media,
            )

    def annotation_files(self, split: str) -> tuple[str, ...]:
        """Names of the annotation file, the preferred one first."""
        return ("annotation.json",)


class IUXray(AnnotatedReports):
    """Indiana University chest X-rays: frontal and lateral view together."""

    views = 2

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        return scoring.motor_report(records, self.resampling_of(records))


class MimicCXR(AnnotatedReports):
    """MIMIC-CXR by R2Gen's split.

    Args:
        images: see `medm.tasks.ChestStudyOptions`.
        options: those of reports.
    """

    def __init__(self, *, images: Literal["first", "all"] = "first", **options: Any) -> None:
        super().__init__(**options)
        self.every_image = images == "all"

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        return scoring.motor_report(records, self.resampling_of(records))


class MimicCaption(AnnotatedReports):
    """MIMIC-CXR as Uni-Med reads it: first image, `annotation_small.json` for training."""

    splits = ("train", "test")
    images = "files"

    def annotation_files(self, split: str) -> tuple[str, ...]:
        return (
            ("annotation_small.json", "annotation.json")
            if split == "train"
            else ("annotation.json",)
        )

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        return scoring.uni_med_caption(records, self.resampling_of(records))


class MedPix(CaptionTask):
    """MPx-Single of RadFM: captions of single images.

    Uni-Med drops rows whose image is not on disk; here they stay, and a missing image is reported.
    """

    layout = "MPx_Single_{train,test}.csv (columns name, type, context) and the images they name"

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        file = require(
            folder, f"MPx_Single_{split}.csv", f"MedPix_single_{split}.csv", layout=self.layout
        )
        for index, row in enumerate(read_csv(file, ("name", "type", "context"))):
            if row["type"] != "caption" or not all(row[key].strip() for key in ("name", "context")):
                continue
            yield make_sample(
                pick_template(prompts.CAPTION, rng),
                id=f"{row['name']}:{index}",
                tag=self.tag,
                answer=" ".join(row["context"].split()),
                media=[Media("image", row["name"].lstrip("/"))],
            )

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        return scoring.uni_med_caption(records, self.resampling_of(records))
