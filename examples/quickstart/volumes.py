"""The committed volumes: what each one is, in `data/volumes.yaml`, and how one is read.

Knows nothing of slices, questions or models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np
import SimpleITK as sitk  # noqa: N813
from pydantic import Field

from medm.config import Options, read_yaml, validate

DATA = Path(__file__).parent / "data"

Region = Literal["head", "chest", "abdomen", "spine"]
Plane = Literal["axial", "coronal", "sagittal"]

Structure = Literal["liver", "spleen", "aorta", "vertebrae", "lungs"]

STRUCTURES: tuple[Structure, ...] = get_args(Structure)
"""Structures of label maps, by their label from 1: TotalSegmentator's own output, not drawn by a
person."""
PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")
AXIS = {"axial": 0, "coronal": 1, "sagittal": 2}
"""Array axis that a plane cuts across; arrays are (superior, posterior, left)."""


class Volume(Options):
    """One scan, or one average of scans, and everything about it that is taken for true."""

    split: Literal["train", "test", "extra"]
    """Which side it is on, fixed before any training; `extra` is held out too, but not part of the
    repository."""
    modality: Literal["CT", "MR"]
    """As the source says."""
    region: Region
    """As seen."""
    source: str
    """Package, version and file it was made from."""
    licence: str
    """File in `data/licences/` with the licence of that package."""
    planes: list[Plane] = Field(default=list(PLANES), min_length=1)
    """Planes worth cutting: not across a thin slab."""
    windows: list[list[float]] = Field(min_length=1)
    """Ranges shown as black to white: HU for CT, 0 to 255 for MR (255 is the source's 99.5th
    percentile)."""
    level: list[int] | None = Field(default=None, min_length=2, max_length=2)
    """Lowest and highest axial slice of the organ whose thirds are asked for: lungs in the chest,
    brain in the head."""
    lesion: bool = False
    """A lesion mask lies beside it: every lesion that was marked by the source."""
    lungs: bool = False
    """A lung mask lies beside it: 1 the right lung, 2 the left, from air below -450 HU
    (`build_data.py`)."""
    labels: list[int] | None = Field(default=None, min_length=2, max_length=2)
    """First and last axial slice whose structures are marked in a label map beside it."""
    structures: list[Structure] = list(STRUCTURES)
    """Structures that the label map marks; others may be there unmarked."""
    about: str
    """One sentence."""


class _Table(Options):
    volumes: dict[str, Volume]


def read_table(path: Path = DATA / "volumes.yaml") -> dict[str, Volume]:
    """Every volume by name. Raises `RecipeError` where the table does not fit."""
    return validate(_Table, read_yaml(path), source=str(path)).volumes


def read_voxels(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (superior, posterior, left) as stored, and the spacing of these axes in mm."""
    image = sitk.DICOMOrient(sitk.ReadImage(file), "LPS")
    return sitk.GetArrayFromImage(image), np.array(image.GetSpacing()[::-1])
