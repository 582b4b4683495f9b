"""The SA-Med2D-20M subset of Uni-Med: objects with boxes in images of many modalities."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from medm.errors import DataError
from medm.tasks.benchmark_files import require
from medm.tasks.regions import IdentifyTask, ReferTask, Region, RegionTask, read_regions


class _SAMed2DRegions(RegionTask):
    layout = (
        "images_small_{train,test}/<modality>/<id>.png and "
        "regions_small_{train,test}/<modality>/<id>.json"
    )

    def regions(self, folder: Path, split: str) -> Iterator[Region]:
        regions = require(folder, f"regions_small_{split}", layout=self.layout)
        images = require(folder, f"images_small_{split}", layout=self.layout)
        files = sorted(
            regions.glob("*/*.json")
        )  # sorted: the published order depends on the file system
        if not files:
            raise DataError(f"holds no <modality>/<id>.json; expected {self.layout}", file=regions)
        for file in files:
            modality, name = file.parent.name, file.stem
            image = f"{images.name}/{modality}/{name}.png"
            yield from read_regions(file, image=image, id=f"{modality}/{name}", group=modality)


class SAMed2DREC(_SAMed2DRegions, ReferTask):
    """A name to a box."""


class SAMed2DREG(_SAMed2DRegions, IdentifyTask):
    """A box to a name."""
