"""Questions about objects in images (name to box, box to name) for SLAKE and SA-Med2D."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medm.errors import DataError
from medm.metrics.base import MetricResult
from medm.metrics.boxes import CODECS, Box
from medm.tasks import prompts, scoring
from medm.tasks.base import Record, Task, make_sample, pick_template
from medm.tasks.benchmark_files import image_size, read_json_list
from medm.types import Media, Sample


@dataclass(frozen=True, slots=True)
class Region:
    """One object of one image."""

    id: str
    image: str
    """Path relative to the benchmark's folder."""
    name: str
    box: Box
    """Corners in pixels."""
    group: str
    """Group in the tables (modality)."""
    others: int
    """Objects of the same name in the same image: with any, the question has several right
    answers."""


def read_regions(file: Path, *, image: str, id: str, group: str) -> list[Region]:
    """Return the objects of one image from a list of one-key maps {name: [x, y, width, height]}."""
    found: list[tuple[str, Box]] = []
    for index, item in enumerate(read_json_list(file)):
        if len(item) != 1:
            raise DataError(f"expected one object a map, found {len(item)}", file=file, index=index)
        name, box = next(iter(item.items()))
        sides = box if isinstance(box, list) else []
        numbers = [
            float(n) for n in sides if isinstance(n, (int, float)) and not isinstance(n, bool)
        ]
        if len(sides) != 4 or len(numbers) != 4:
            raise DataError(
                "expected [x, y, width, height] in pixels", file=file, index=index, field=name
            )
        x, y, width, height = numbers
        found.append((name, (x, y, x + width, y + height)))
    counts = Counter(name for name, _ in found)
    return [
        Region(f"{id}:{index}", image, name, box, group, counts[name] - 1)
        for index, (name, box) in enumerate(found)
    ]


class RegionTask(Task):
    """Base class of tasks about regions; subclasses phrase the questions."""

    group_by: tuple[str, ...] = ("group", "unique_name")
    cluster_by = "image"

    def __init__(
        self,
        *,
        codec: str = "uni-med",
        rounds: int = 1000,
        seed: int = 0,
        cluster_by: str | None = None,
    ) -> None:
        super().__init__(rounds=rounds, seed=seed, cluster_by=cluster_by)
        self.codec = codec

    @abstractmethod
    def regions(self, folder: Path, split: str) -> Iterator[Region]:
        """Return the objects of a split, in the order of the files."""

    @abstractmethod
    def sample(self, region: Region, size: tuple[int, int], rng: random.Random | None) -> Sample:
        """One question about one object."""

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        sizes: dict[str, tuple[int, int]] = {}
        for region in self.regions(folder, split):
            if region.image not in sizes:
                sizes = {
                    region.image: image_size(folder, region.image)
                }  # objects of an image follow each other
            yield self.sample(region, sizes[region.image], rng)


class ReferTask(RegionTask):
    """A name to a box (REC)."""

    tag = "refer"

    def sample(self, region: Region, size: tuple[int, int], rng: random.Random | None) -> Sample:
        return make_sample(
            pick_template(prompts.REFER, rng).format(name=region.name),
            id=region.id,
            tag=self.tag,
            answer=CODECS[self.codec].encode(region.box, size),
            media=[Media("image", region.image)],
            box=list(region.box),
            size=list(size),
            group=region.group,
            unique_name=region.others == 0,
        )

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        return scoring.refer(records, self.resampling_of(records), self.codec)

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        return (
            scoring.uni_med_refer(records, self.resampling_of(records))
            if self.codec == "uni-med"
            else []
        )


class IdentifyTask(RegionTask):
    """A box to a name (REG)."""

    tag = "identify"
    group_by = ("group",)

    def sample(self, region: Region, size: tuple[int, int], rng: random.Random | None) -> Sample:
        box = CODECS[self.codec].encode(region.box, size)
        return make_sample(
            pick_template(prompts.IDENTIFY, rng).format(box=box),
            id=region.id,
            tag=self.tag,
            answer=region.name,
            media=[Media("image", region.image)],
            group=region.group,
        )

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        return scoring.identify(records, self.resampling_of(records))

    def original(self, records: Sequence[Record]) -> list[MetricResult]:
        return scoring.uni_med_identify(records, self.resampling_of(records))
