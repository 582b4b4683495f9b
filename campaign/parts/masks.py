"""Mutated masks: run lengths, polygons and label maps give a mask of the image's size, or a
message.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from campaign.harness import Part, WrongResultError
from campaign.mutate import Target, mutation_cases, prepare
from medm.data.mask_entries import mask_entries
from medm.data.record_files import parse_json
from medm.imaging import rle
from medm.imaging.geometry import Geometry
from medm.imaging.mask_files import check_mask, read_mask
from medm.imaging.nifti import write_nifti
from medm.imaging.placement import Placement
from medm.types import MaskSource

SHAPE = (20, 30)
VOXELS = (6, 8, 10)
GEOMETRY = Geometry(direction=np.eye(3), spacing=np.ones(3), origin=np.zeros(3))


def squares() -> np.ndarray:
    """Two labels, uint8."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[3:9, 4:20], labels[12:18, 2:9] = 1, 2
    return labels


def entries(value: Callable[[], object]) -> Callable[[Path], Path]:
    """Return a maker of the `masks` of a record as a JSON file."""

    def make(folder: Path) -> Path:
        (folder / "masks.json").write_text(json.dumps(value()))
        return folder / "masks.json"

    return make


def read_entries(file: Path) -> None:
    for group in mask_entries(parse_json(file.read_bytes())):
        for entry in group:
            source = entry.source(token=0, media=0, phrase=None)
            _require(source, file.parent, Placement.of_source(SHAPE), SHAPE)


def read_map(file: Path, placement: Placement, shape: tuple[int, ...]) -> None:
    source = MaskSource(token=0, media=0, field="masks.0", path=file.name, value=1)
    _require(source, file.parent, placement, shape)


def _require(source: MaskSource, root: Path, placement: Placement, shape: tuple[int, ...]) -> None:
    check_mask(source, root, shape)
    mask = read_mask(source, root, placement)
    if mask.shape != shape or mask.dtype != bool:
        raise WrongResultError(f"a mask of {mask.shape}, {mask.dtype}")


def png(folder: Path) -> Path:
    Image.fromarray(squares()).save(folder / "a.png")
    return folder / "a.png"


def npy(folder: Path) -> Path:
    np.save(folder / "a.npy", squares())
    return folder / "a.npy"


def nifti(folder: Path) -> Path:
    voxels = np.zeros(VOXELS, np.uint8)
    voxels[2:4, 3:6, 2:7] = 1
    write_nifti(folder / "a.nii", voxels, GEOMETRY)
    return folder / "a.nii"


_flat = partial(read_map, placement=Placement.of_source(SHAPE), shape=SHAPE)
TARGETS = [
    Target(
        "RLE of numbers",
        entries(lambda: [{"rle": rle.encode(squares() == 1, compressed=False)}]),
        read_entries,
        text=True,
    ),
    Target(
        "RLE compressed",
        entries(lambda: [{"rle": rle.encode(squares() == 1)}, None]),
        read_entries,
        text=True,
    ),
    Target(
        "polygons",
        entries(lambda: [{"polygons": [[2, 3, 20.5, 3, 11, 17], [1, 1, 5, 1, 5, 5, 1, 5]]}]),
        read_entries,
        text=True,
    ),
    Target("label map PNG", png, _flat),
    Target("label map NPY", npy, _flat),
    Target(
        "label map NIfTI",
        nifti,
        partial(read_map, placement=Placement.of_source(VOXELS, GEOMETRY), shape=VOXELS),
    ),
]
PART = Part(
    "masks",
    "Mutated masks",
    partial(prepare, TARGETS),
    partial(mutation_cases, TARGETS),
    2000,
)
