"""MedMNIST v2 (Yang et al. 2023) as questions: dermatoscopy and sagittal CT, as in Uni-Med."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from medm.errors import DataError
from medm.metrics import uni_med
from medm.metrics.base import MetricResult
from medm.tasks import prompts, scoring
from medm.tasks.base import Record, Task, make_sample, pick_template
from medm.tasks.benchmark_files import NumberArchive, require
from medm.types import Media, Sample


class MedMNISTTask(Task):
    """Classification of the images of an .npz file of MedMNIST.

    The images are written once, as PNG files under `medm_png/` in the same folder.
    """

    tag = "cls"
    splits = ("train", "val", "test")
    group_by = ("answer",)
    file_name: ClassVar[str]
    question: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    """In the order of the label numbers."""

    @property
    def layout(self) -> str:  # type: ignore[override]
        """File at 224 pixels, or the small one."""
        return f"{self.file_name}_224.npz (or {self.file_name}.npz of 28 pixels)"

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        file = require(
            folder, f"{self.file_name}_224.npz", f"{self.file_name}.npz", layout=self.layout
        )
        arrays = NumberArchive(file)
        labels = arrays[f"{split}_labels"].reshape(-1)
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise DataError(
                f"labels run to {labels.max()}, but there are {len(self.classes)} classes",
                file=file,
            )
        names = self._images(folder, file, arrays, split, len(labels))
        for index, (label, name) in enumerate(zip(labels, names, strict=True)):
            question = pick_template(prompts.CLASSIFY, rng).format(
                question=self.question, classes=", ".join(self.classes)
            )
            yield make_sample(
                question,
                id=f"{self.file_name}:{split}:{index}",
                tag=self.tag,
                answer=self.classes[int(label)],
                media=[Media("image", name)],
            )

    def _images(
        self, folder: Path, file: Path, arrays: NumberArchive, split: str, count: int
    ) -> list[str]:
        """Paths of the images relative to the folder; written where they are not there yet."""
        from PIL import Image

        place = f"medm_png/{file.stem}/{split}"
        names = [f"{place}/{index:06d}.png" for index in range(count)]
        if all((folder / name).is_file() for name in names):
            return names
        images = arrays[f"{split}_images"]
        if len(images) != count or images.dtype.name != "uint8" or images.ndim not in (3, 4):
            raise DataError(
                f"expected {count} 8-bit images (n, height, width[, 3]), found {images.dtype} "
                f"{images.shape}",
                file=file,
            )
        try:
            (folder / place).mkdir(parents=True, exist_ok=True)
            for name, pixels in zip(names, images, strict=True):
                Image.fromarray(pixels).save(folder / name)
        except OSError as error:
            raise DataError(
                f"its images cannot be written to {place} beside it ({error.strerror or error})",
                file=file,
            ) from None
        return names

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        resampling = self.resampling_of(records)
        results = scoring.classes(records, self.classes, resampling)
        return results + scoring.class_areas(records, self.classes, resampling)

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        return uni_med.match(*scoring.texts(records), resampling=self.resampling_of(records))


class DermaMNIST(MedMNISTTask):
    """Seven kinds of skin lesion."""

    file_name = "dermamnist"
    question = "Which kind of pigmented skin lesion does this dermatoscopic image show?"
    classes = (
        "actinic keratoses and intraepithelial carcinoma",
        "basal cell carcinoma",
        "benign keratosis-like lesions",
        "dermatofibroma",
        "melanoma",
        "melanocytic nevi",
        "vascular lesions",
    )


class OrganSMNIST(MedMNISTTask):
    """Eleven organs in sagittal CT slices."""

    file_name = "organsmnist"
    question = "Which organ is in the centre of this sagittal CT slice?"
    classes = (
        "bladder", "left femur", "right femur", "heart", "left kidney", "right kidney", "liver",
        "left lung",
        "right lung", "pancreas", "spleen",
    )  # fmt: skip
