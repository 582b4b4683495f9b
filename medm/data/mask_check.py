"""Check of the masks of a record: they exist, fit their image, and have voxels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from medm.imaging.images import check_image
from medm.imaging.mask_files import check_mask, read_mask
from medm.imaging.placement import Placement
from medm.imaging.volumes import check_volume, read_volume
from medm.types import BaseSample

ABSENT = "absent target"
"""Noun of masks without voxels."""
MISSING = "missing label"
"""Noun of labels that do not occur in their file."""


def check_masks(
    sample: BaseSample,
    root: Path,
    path_of: Callable[[int], Path],
    *,
    decode: bool,
    several: Literal["only", "largest"] = "only",
) -> Counter[str]:
    """Check the masks of a record, and count them by noun.

    Args:
        sample: the record.
        root: folder that the paths of masks are relative to.
        path_of: file of an image or volume, by its position in `sample.media`.
        decode: read every mask in full; otherwise files only as far as their header, while run
            lengths and outlines are read.
        several: what is done with a DICOM folder of several series.

    Raises:
        DataError: with the field of the mask: its file is missing or damaged, or it does not fit
            the size and, with `decode`, the geometry of its image.
    """
    counts: Counter[str] = Counter()
    placements: dict[int, Placement] = {}
    shapes: dict[int, tuple[int, ...] | None] = {}
    for mask in sample.masks:
        counts["mask"] += 1
        if mask.absent:
            counts[ABSENT] += 1
            continue
        media = mask.media
        is_image = sample.media[media].branch == "image"
        if media not in shapes:
            path = path_of(media)
            shapes[media] = check_image(path) if is_image else check_volume(path, several=several)
        has_voxels = check_mask(mask, root, shapes[media])
        if decode and (has_voxels is None or shapes[media] is None):
            if media not in placements:
                placements[media] = _placement(path_of(media), shapes[media], is_image, several)
            has_voxels = bool(read_mask(mask, root, placements[media]).any())
        if has_voxels is False:
            counts[ABSENT if mask.value is None else MISSING] += 1
    return counts


def _placement(
    path: Path, shape: tuple[int, ...] | None, is_image: bool, several: Literal["only", "largest"]
) -> Placement:
    """Return the placement of the file's own grid."""
    if is_image and shape is not None:
        return Placement.of_source(shape)
    volume = read_volume(path, several=several)
    return Placement.of_source(volume.voxels.shape, volume.geometry)
