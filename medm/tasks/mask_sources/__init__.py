"""Sources of grounded records: published sets of images and masks, as records with `masks`.

The table at the end has one line per source: a `MaskSet` (see `medm.tasks.mask_sources.base`) that
reads the files as they are distributed. To add one, write a reader, or a row of an existing one,
and a line here. Questions and answers are data: one YAML file a task in `wordings/`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from medm.registry import Registry

if TYPE_CHECKING:
    from medm.tasks.mask_sources.base import MaskSet

MASK_SOURCES: Registry[MaskSet] = Registry("mask source", group="medm.mask_sources")

_COCO = "medm.tasks.mask_sources.biomedparse"
_RADGENOME = "medm.tasks.mask_sources.radgenome"
_VOLUMES = "medm.tasks.mask_sources.volumes"

# fmt: off
MASK_SOURCES.add("biomedparse", f"{_COCO}:BIOMEDPARSE", "BiomedParse layout: an image, a phrase and its mask")
MASK_SOURCES.add("unibiomed/segmentation-2d", f"{_COCO}:SEGMENTATION_2D", "UniBiomed 2-D sets: a phrase to its mask")
MASK_SOURCES.add("unibiomed/segmentation-3d", "medm.tasks.mask_sources.slices:SEGMENTATION_3D", "UniBiomed 3-D sets: slices of a volume that share one [SEG]")
MASK_SOURCES.add("unibiomed/disease", f"{_COCO}:DISEASE", "UniBiomed grounded disease recognition: name and mask of what is abnormal")
MASK_SOURCES.add("unibiomed/region", f"{_COCO}:REGION", "UniBiomed region understanding: a box to the name of what it holds")
MASK_SOURCES.add("unibiomed/medtrinity", f"{_COCO}:MEDTRINITY", "MedTrinity in UniBiomed's layout: an image to its description, no mask")
MASK_SOURCES.add("unibiomed/radgenome-report", f"{_RADGENOME}:REPORT", "RadGenome chest CT slices: a grounded report")
MASK_SOURCES.add("unibiomed/radgenome-vqa", f"{_RADGENOME}:VQA", "RadGenome chest CT slices: what is abnormal in an anatomy, and its mask")
MASK_SOURCES.add("m3d-seg", f"{_VOLUMES}:M3D_SEG", "M3D-Seg: a structure in a volume to its mask")
MASK_SOURCES.add("m3d-refseg", f"{_VOLUMES}:M3D_REFSEG", "M3D-RefSeg: a description or question to a mask in a volume")
MASK_SOURCES.add("decathlon", f"{_VOLUMES}:DECATHLON", "Medical Segmentation Decathlon: all classes of a volume, label maps by value")
MASK_SOURCES.add("sa2va", "medm.tasks.mask_sources.sa2va:SA2VA", "Sa2VA's own-data format: texts and polygons of an image")
# fmt: on
