"""Sources of image-text pairs: published annotation files, turned into records of the pipeline
`pairs`.

The table at the end has one line per source: a `PairSource` (see `medm.tasks.pair_sources.base`)
that reads the files as they are distributed. To add one, write a reader, or a row of an existing
one, and a line here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from medm.registry import Registry

if TYPE_CHECKING:
    from medm.tasks.pair_sources.base import PairSource

PAIR_SOURCES: Registry[PairSource] = Registry("pair source", group="medm.pair_sources")

_UNIMED = "medm.tasks.pair_sources.unimed"
_LABELS = "medm.tasks.pair_sources.labels"

# fmt: off
PAIR_SOURCES.add("unimed/chexpert", f"{_UNIMED}:CHEXPERT", "CheXpert frontal views, UniMed's caption CSV")
PAIR_SOURCES.add("unimed/mimic-cxr", f"{_UNIMED}:MIMIC_CXR", "MIMIC-CXR frontal views, UniMed's CSV of reports and captions")
PAIR_SOURCES.add("unimed/openi", f"{_UNIMED}:OPENI", "OpenI, captions and their variants from UniMed's two JSON files")
PAIR_SOURCES.add("unimed/chest-xray8", f"{_UNIMED}:CHEST_XRAY8", "ChestX-ray8, UniMed's caption CSV")
PAIR_SOURCES.add("unimed/radimagenet", f"{_UNIMED}:RADIMAGENET", "RadImageNet (CT, MR, US), UniMed's caption CSV")
PAIR_SOURCES.add("unimed/retina-part1", f"{_UNIMED}:RETINA_PART1", "fundus sets of FLAIR, UniMed's caption CSV of each")
PAIR_SOURCES.add("unimed/retina-part2", f"{_UNIMED}:RETINA_PART2", "DEN fundus images, keywords and descriptions")
PAIR_SOURCES.add("unimed/retina-part3", f"{_UNIMED}:RETINA_PART3", "MM-Retinal fundus images and captions")
PAIR_SOURCES.add("unimed/quilt-1m", f"{_UNIMED}:QUILT_1M", "Quilt-1M histopathology, the distributed lookup table")
PAIR_SOURCES.add("unimed/pmc-oa", f"{_UNIMED}:PMC_OA", "PMC-OA subfigures, the distributed JSONL")
PAIR_SOURCES.add("unimed/rocov2", f"{_UNIMED}:ROCOV2", "ROCOv2 radiology figures, the distributed training captions")
PAIR_SOURCES.add("unimed/llava-med-alignment", f"{_UNIMED}:LLAVA_MED_ALIGNMENT", "LLaVA-Med alignment set, UniMed's filtered JSON")
PAIR_SOURCES.add("unimed/llava-med-instruct", f"{_UNIMED}:LLAVA_MED_INSTRUCT", "LLaVA-Med figures: caption and in-text mention are a pair each")
PAIR_SOURCES.add("unimed/chexpert-labels", f"{_LABELS}:CHEXPERT_LABELS", "CheXpert frontal views, captions from medm's templates and train.csv")
PAIR_SOURCES.add("unimed/chest-xray8-labels", f"{_LABELS}:CHEST_XRAY8_LABELS", "ChestX-ray8, captions from medm's templates and Data_Entry_2017.csv")
PAIR_SOURCES.add("unimed/radimagenet-labels", f"{_LABELS}:RADIMAGENET_LABELS", "RadImageNet, captions from medm's templates and the folders of classes")
PAIR_SOURCES.add("unimed/retina-labels", f"{_LABELS}:RETINA_LABELS", "fundus sets of FLAIR, captions from medm's templates and its CSV of each")
PAIR_SOURCES.add("m3d/cap", "medm.tasks.pair_sources.m3d:M3D_CAP", "M3D-Cap: CT volumes and their reports")
# fmt: on
