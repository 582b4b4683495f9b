"""Sources of studies: published annotation files, turned into records of the pipeline `studies`.

The table at the end has one line per source: a `StudySource` (see `medm.tasks.study_sources.base`)
that reads the files as they are distributed. Tasks on studies read the same sources. To add one,
write a reader and a line here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from medm.registry import Registry

if TYPE_CHECKING:
    from medm.tasks.study_sources.base import StudySource

STUDY_SOURCES: Registry[type[StudySource]] = Registry("study source", group="medm.study_sources")

# fmt: off
STUDY_SOURCES.add("studies/annotation", "medm.tasks.study_sources.annotation:AnnotationFile", "R2Gen's annotation.json or MOTOR's JSON (lists by split, or one list): images, report, triplets, labels")
STUDY_SOURCES.add("studies/nih-chest-xray14", "medm.tasks.study_sources.nih:NIHChestXray14", "NIH ChestX-ray14: Data_Entry_2017.csv and the official lists, 14 labels")
STUDY_SOURCES.add("studies/mimic-cxr", "medm.tasks.study_sources.mimic:MimicCXR", "MIMIC-CXR-JPG: the official split and the 14 labels of CheXpert or NegBio")
STUDY_SOURCES.add("studies/vqa-rad", "medm.tasks.study_sources.questions:VQARADQuestions", "VQA-RAD: questions and answers, the public file or split files with classes")
STUDY_SOURCES.add("studies/slake", "medm.tasks.study_sources.questions:SlakeQuestions", "SLAKE English: questions and answers, the distributed JSON or MOTOR's classes")
# fmt: on
