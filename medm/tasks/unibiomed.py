"""UniBiomed's tasks on images: targets to masks, findings with masks, and words for regions."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from medm.errors import DataError
from medm.metrics import grounded, unibiomed
from medm.metrics.base import MetricResult, Resampling, mean_result, optional, undefined, with_note
from medm.metrics.match import token_f1
from medm.tasks import prompts, scoring
from medm.tasks.base import Record, Task, make_sample, pick_template
from medm.tasks.masks import MaskReference, MaskTask, number, present
from medm.tasks.unibiomed_files import LAYOUT, Annotation, read_annotations, read_plane
from medm.types import JsonObject, Media, PredictionField, Sample


class SetTask(Task):
    """A task on the sets of a folder, with a row for each.

    Args:
        only: names of the sets that are scored. Default: all.
    """

    layout = LAYOUT
    group_by = ("dataset",)
    cluster_by = "image"
    others: ClassVar[tuple[str, ...]] = ()
    """Folders below that of the data which hold sets of other tasks."""

    def __init__(
        self,
        *,
        only: Sequence[str] = (),
        rounds: int = 1000,
        seed: int = 0,
        cluster_by: str | None = None,
    ) -> None:
        super().__init__(rounds=rounds, seed=seed, cluster_by=cluster_by)
        self.only = tuple(only)

    def targets(self, folder: Path, split: str) -> Iterator[Annotation]:
        """Return the targets of a split."""
        return read_annotations(
            Path(folder), self._known_split(split), only=self.only, skip=self.others
        )


class PlaneTask(MaskTask):
    """A task on masks of images."""

    surfaces = False

    def reference(self, folder: Path, record: Record) -> MaskReference:
        """Return the union of `mask_files`, and each of them."""
        paths = scoring.require_field(record, "mask_files")
        planes = [read_plane(Path(folder), str(path)) for path in paths]
        sizes = {plane.shape for plane in planes}
        if len(sizes) > 1:
            raise DataError(
                f"the masks of {record.get('id')!r} differ in size: {sorted(sizes)}; expected that "
                "of their image"
            )
        return MaskReference(np.logical_or.reduce(planes), parts=tuple(planes))


def with_set_mean(
    results: Sequence[MetricResult], rows: Sequence[Record], resampling: Resampling
) -> list[MetricResult]:
    """Return results, and after the first its mean over sets, each with the same weight.

    Args:
        results: the first is a mean over `rows`.
        rows: with the set as `dataset`; with a single one nothing is added.
        resampling: of `rows`.
    """
    head = results[0]
    if head.per_item is None or len({row.get("dataset") for row in rows}) < 2:
        return list(results)
    mean = scoring.mean_over_groups(rows, head, "dataset", resampling)
    return [head, replace(mean, name=f"{head.name}-set-mean"), *results[1:]]


class Segment2D(SetTask, PlaneTask):
    """A phrase to a mask, on the sets of 2-D segmentation.

    An absent target (its mask is empty) is asked for as well. The published scores skip it, and
    take the first 300 annotations of a set.
    """

    class_field = "phrase"
    others = ("Disease", "MedTrinity")

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        for one in self.targets(folder, split):
            yield make_sample(
                pick_template(prompts.SEGMENT_IMAGE, rng).format(phrase=one.phrase),
                id=one.id,
                tag=self.tag,
                answer="It is [SEG].",
                media=[Media("image", one.image)],
                mask_files=[one.mask],
                phrase=one.phrase,
                dataset=one.dataset,
                position=one.position,
            )

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        part = present(records)
        rows, drawn = [records[index] for index in part], self.resampling_of(records).part(part)
        return with_set_mean(self.mask_results(records), rows, drawn)

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        part = [
            index
            for index in present(records)
            if int(scoring.require_field(records[index], "position")) < unibiomed.FIRST
        ]
        rows = [records[index] for index in part]
        scores = {
            "dice": [number(row, "dice") for row in rows],
            "iou": [number(row, "mask_iou") for row in rows],
        }
        # Classes of two sets are two classes, as the published script runs on one set.
        phrases = [f"{row['dataset']}: {row['phrase']}" for row in rows]
        return unibiomed.class_means(scores, phrases, self.resampling_of(records).part(part))


class Findings(PlaneTask):
    """Words and masks in one reply."""

    needs: frozenset[PredictionField] = frozenset({"text", "masks"})
    cluster_by = "image"
    overlaps: ClassVar[tuple[str, ...]] = (*MaskTask.overlaps, "paired_dice", "matched_dice")

    def measure_masks(
        self, predictions: Sequence[np.ndarray], reference: MaskReference, record: Record
    ) -> JsonObject:
        numbers = super().measure_masks(predictions, reference, record)
        drawn = [np.asarray(mask) > 0.5 for mask in predictions]
        # A reply without a mask draws an empty one: the original writes one for every reply.
        original = drawn or [np.zeros(reference.mask.shape, dtype=bool)]
        return {
            **numbers,
            "paired_dice": grounded.paired_dice_of(drawn, reference.parts),
            "matched_dice": unibiomed.matched_dice_of(original, reference.parts),
        }

    def paired(self, records: Sequence[Record]) -> list[MetricResult]:
        """Return the Dice of findings paired one to one, and the numbers of their union."""
        result = mean_result(
            "paired-dice",
            [number(row, "paired_dice") for row in records],
            "hard>0.5|one-to-one|without partner:0|both without mask:1|no answer:0|mean",
            self.resampling_of(records),
        )
        return [result, *self.mask_results(records)]

    def original_dice(self, records: Sequence[Record]) -> MetricResult:
        """Return the published Dice of findings."""
        return mean_result(
            "unibiomed-matched-dice",
            [number(row, "matched_dice") for row in records],
            "unibiomed|greedy one-to-one|without partner:left out|both empty:1|mean",
            self.resampling_of(records),
        )


class Disease(SetTask, Findings):
    """Grounded disease recognition: an image to the disease and its mask, without a hint.

    One question an image. Where it has several annotations, naming one of them is right; the
    published score leaves such images out.
    """

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        images: dict[str, list[Annotation]] = {}
        for one in self.targets(folder, split):
            images.setdefault(one.image, []).append(one)
        for found in images.values():
            phrases = list(dict.fromkeys(one.phrase for one in found))
            yield make_sample(
                pick_template(prompts.GROUNDED_DIAGNOSIS, rng),
                id=found[0].id,
                tag=self.tag,
                answer=found[0].phrase,
                media=[Media("image", found[0].image)],
                mask_files=[one.mask for one in found],
                phrases=phrases,
                annotations=len(found),
                dataset=found[0].dataset,
            )

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        resampling = self.resampling_of(records)
        replies = [row["prediction"] for row in records]
        phrases = [scoring.require_field(row, "phrases") for row in records]
        found = grounded.phrase_match(replies, phrases, resampling=resampling)
        found += token_f1(
            [grounded.statement_of(reply) for reply in replies], phrases, resampling=resampling
        )
        return [*with_set_mean(found, records, resampling), *self.paired(records)]

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        part = [i for i, row in enumerate(records) if int(row.get("annotations", 1)) == 1]
        drawn = self.resampling_of(records).part(part)
        found = unibiomed.phrase(
            [records[index]["prediction"].lower() for index in part],
            [str(records[index]["answer"]) for index in part],
            resampling=drawn,
        )
        left_out = len(records) - len(part)
        note = f"{left_out} of {len(records)} images have several annotations and are left out"
        if not part:
            found = [undefined(result, note) for result in found]
        return [
            *(with_note(result, note if left_out and part else None) for result in found),
            self.original_dice(records),
        ]


class Region(SetTask):
    """Region understanding: the words for a box that is drawn on the image.

    The box is that of the largest part of the mask, so that two runs ask the same. The published
    script draws one at random. Annotations with an empty mask have no region and are left out.
    """

    tag = "identify"

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        for one in self.targets(folder, split):
            box = region_box(read_plane(Path(folder), one.mask))
            if box is None:
                continue
            yield make_sample(
                pick_template(prompts.REGION, rng),
                id=one.id,
                tag=self.tag,
                answer=one.phrase,
                media=[Media("image", one.image)],
                regions=[{"box": box}],
                dataset=one.dataset,
            )

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        resampling, pair = self.resampling_of(records), scoring.texts(records)
        found = grounded.phrase_match(*pair, resampling=resampling)
        found += token_f1(*pair, resampling=resampling)
        return with_set_mean(found, records, resampling)

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        return unibiomed.region(*scoring.texts(records), resampling=self.resampling_of(records))


def region_box(mask: np.ndarray) -> list[int] | None:
    """Return the box x1, y1, x2, y2 in pixels around the largest part of a mask (H, W).

    The upper corner is one past the last pixel. None for an empty mask.
    """
    ndimage = optional("scipy.ndimage", package="scipy", extra="surface-metrics")
    parts, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    boxes = [
        [columns.start, rows.start, columns.stop, rows.stop]
        for rows, columns in ndimage.find_objects(parts)
    ]
    return max(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]), default=None)
