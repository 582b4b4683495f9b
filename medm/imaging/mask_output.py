"""Masks to files on the grid of their image or volume: one file a mask, or one label map of all.

A mask of an image is an 8-bit PNG of 0 and 255, as large as the image and upright as its EXIF
orientation says. A mask of a volume is a NIfTI file of 0 and 1 with the affine of the volume.
Files are replaced atomically.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from medm.errors import MediaError
from medm.files import atomic_file, atomic_write_text
from medm.imaging.label_maps import write_label_map
from medm.imaging.placement import Placement

logger = logging.getLogger(__name__)

NamedMasks: TypeAlias = Sequence[tuple[str, np.ndarray]]
"""Masks (`source_shape` of their placement) with the phrases that they belong to. A phrase may
come twice: two nodules are two masks."""

MAX_IMAGE_LABELS = 255
"""Most structures in a label map of an image: PNG of 8 bits."""
_NAME_LENGTH = 40
"""Most characters of a phrase in a file name."""
_VOLUME_SUFFIXES = (".nii.gz", ".nii")


@dataclass(frozen=True, slots=True)
class WrittenLabels:
    """Content of a label map that `write_labels` wrote."""

    names: dict[int, str]
    """Phrase of each label, from 1 on in the order of the masks."""
    overlap: int
    """Voxels that belong to several masks; each has the label of the last one."""


def write_mask(path: str | Path, mask: np.ndarray, placement: Placement) -> None:
    """Write a mask on the grid of its file.

    Args:
        path: ends with .png for a mask of an image, with .nii.gz or .nii for one of a volume.
        mask: `source_shape` of the placement (see `Placement.to_source`), bool or 0 and 1.
        placement: of the image or volume.

    Raises:
        MediaError: another suffix, another size than the file, or values that are no mask.
        OSError: the file cannot be written.
    """
    path = Path(path)
    inside = as_mask(mask, placement, name=str(path))
    if len(placement.source_shape) == 3:
        _check_suffix(path, _VOLUME_SUFFIXES, "a volume")
        write_label_map(path, inside.view(np.uint8), placement)
    else:
        _check_suffix(path, (".png",), "an image")
        _write_png(path, inside.view(np.uint8) * np.uint8(255))


def write_masks(
    folder: str | Path, masks: NamedMasks, placement: Placement, *, prefix: str = ""
) -> list[Path]:
    """Write one file for each mask, named by its number and phrase: `000-left-lung.nii.gz`.

    Args:
        folder: is created where it is missing; files of the same names are replaced.
        masks: may be empty.
        placement: of the image or volume that all masks belong to.
        prefix: beginning of all names, such as the name of the scan and a hyphen.

    Returns:
        The files, in the order of the masks.

    Raises:
        MediaError: a mask of another size than the file, or values that are no mask.
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [
        folder / f"{prefix}{mask_file_name(number, phrase, placement)}"
        for number, (phrase, _) in enumerate(masks)
    ]
    for path, (_, mask) in zip(paths, masks, strict=True):
        write_mask(path, mask, placement)
    return paths


def mask_file_name(number: int, phrase: str, placement: Placement) -> str:
    """Return the name of a mask's file: its number, the phrase in small letters, the suffix.

    A phrase is text of a model: whatever is no letter or digit of ASCII becomes a hyphen, so that
    the name is a name on every system and never a path.
    """
    words = re.sub(r"[^a-z0-9]+", "-", phrase.lower())[:_NAME_LENGTH].strip("-")
    suffix = ".nii.gz" if len(placement.source_shape) == 3 else ".png"
    return f"{number:03d}{'-' if words else ''}{words}{suffix}"


def write_labels(path: str | Path, masks: NamedMasks, placement: Placement) -> WrittenLabels:
    """Write all masks as one label map, and their phrases as JSON beside it.

    Label 1 is the first mask. A voxel of several masks has the label of the last one; their number
    is logged and in the JSON, whose name is that of the label map with .json in place of the
    suffix: `{"labels": {"1": "liver"}, "overlap": 0}`.

    Args:
        path: ends with .nii.gz or .nii for a volume, with .png for an image.
        masks: at least one; at most 255 for an image.
        placement: of the image or volume.

    Raises:
        MediaError: no masks or too many, another suffix, another size than the file, or values
            that are no mask.
        OSError: a file cannot be written.
    """
    path, is_volume = Path(path), len(placement.source_shape) == 3
    suffix = _check_suffix(
        path, _VOLUME_SUFFIXES if is_volume else (".png",), "a volume" if is_volume else "an image"
    )
    most = 2**16 - 1 if is_volume else MAX_IMAGE_LABELS
    if not 1 <= len(masks) <= most:
        raise MediaError(
            f"{path}: expected 1 to {most} masks for a label map, found {len(masks)}; write one "
            "file for each mask"
        )
    labels = np.zeros(placement.source_shape, np.min_scalar_type(len(masks)))
    several = np.zeros(placement.source_shape, bool)
    for label, (phrase, mask) in enumerate(masks, start=1):
        inside = as_mask(mask, placement, name=f"{path}: mask {label} ({phrase!r})")
        several |= inside & (labels > 0)
        labels[inside] = label
    if is_volume:
        write_label_map(path, labels, placement)
    else:
        _write_png(path, labels)
    written = WrittenLabels(
        {label: phrase for label, (phrase, _) in enumerate(masks, start=1)}, int(several.sum())
    )
    if written.overlap:
        logger.warning(
            "%s: %d voxels belong to several masks and have the label of the last one; one file "
            "for each mask, or DICOM SEG, keeps all of them",
            path,
            written.overlap,
        )
    named = {str(label): phrase for label, phrase in written.names.items()}
    text = json.dumps({"labels": named, "overlap": written.overlap}, ensure_ascii=False, indent=2)
    atomic_write_text(path.with_name(path.name[: -len(suffix)] + ".json"), text + "\n")
    return written


def as_mask(mask: np.ndarray, placement: Placement, *, name: str) -> np.ndarray:
    """Return a mask as a contiguous bool array.

    Raises:
        MediaError: another size than the file of the placement, or other values than 0 and 1.
    """
    if mask.shape != placement.source_shape:
        found, expected = (
            " x ".join(map(str, sides)) or "one number"
            for sides in (mask.shape, placement.source_shape)
        )
        raise MediaError(
            f"{name}: a mask of {found} for a file of {expected}; expected the same size. Take it "
            "to the grid of the file by Placement.to_source"
        )
    if mask.dtype != np.bool_ and ((mask != 0) & (mask != 1)).any():
        raise MediaError(
            f"{name}: values {mask.min():g}..{mask.max():g} are no mask; expected 0 and 1. "
            "Compare soft values with a threshold, and choose one label of a label map"
        )
    return np.ascontiguousarray(mask, dtype=bool)


def _check_suffix(path: Path, suffixes: Sequence[str], of: str) -> str:
    """Return the suffix of a file. Raises `MediaError` for another one than the given."""
    for suffix in suffixes:
        if path.name.lower().endswith(suffix):
            return suffix
    raise MediaError(
        f"{path}: a mask of {of}; expected a name that ends with {' or '.join(suffixes)}"
    )


def _write_png(path: Path, pixels: np.ndarray) -> None:
    with atomic_file(path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG")
