"""Masks of records on the grid of their image or volume, from files, run lengths and polygons."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medm.errors import DataError, MediaError
from medm.imaging import rle
from medm.imaging.images import check_label_image
from medm.imaging.label_maps import read_label_map
from medm.imaging.paths import resolve_inside
from medm.imaging.placement import Placement
from medm.imaging.polygons import fill_polygons
from medm.imaging.volumes import check_volume
from medm.types import MaskSource


def read_mask(source: MaskSource, root: Path, placement: Placement) -> np.ndarray:
    """Return a mask on the grid of its image or volume, bool of `source_shape`.

    An absent target is a mask without voxels; so is a label that does not occur in its file.

    Args:
        source: the mask, as the record writes it.
        root: folder that its path is relative to.
        placement: of the image or volume that it belongs to, in any size.

    Raises:
        MediaError: with the field of the record: a file that is missing or no label map, another
            size or geometry than that of the image, run lengths or polygons that do not fit it.
    """
    try:
        return _read(source, root, placement)
    except DataError as error:
        if error.field is None or not error.field.startswith(source.field):
            inner = "" if error.field is None else f".{error.field}"
            error.field = f"{source.field}{inner}"
        raise


def check_mask(source: MaskSource, root: Path, shape: tuple[int, ...] | None) -> bool | None:
    """Check a mask as far as its text and the header of its file tell.

    Args:
        source: the mask.
        root: folder that its path is relative to.
        shape: size of the image or volume, of which None is a volume whose header does not tell it.

    Returns:
        Whether the mask has voxels; None for a file, which is not decoded.

    Raises:
        MediaError: as `read_mask`.
    """
    if source.path is not None:
        try:
            _check_file(resolve_inside(root, source.path), shape)
        except DataError as error:
            raise error.at(field=source.field) from None
        return None
    if source.rle is not None and shape is None:
        shape = rle.decoded_size(source.rle)
    if source.absent or shape is None:
        return not source.absent
    return bool(read_mask(source, root, Placement.of_source(shape)).any())


def _read(source: MaskSource, root: Path, placement: Placement) -> np.ndarray:
    shape = placement.source_shape
    if source.path is not None:
        labels = read_label_map(resolve_inside(root, source.path), placement).labels
        return labels != 0 if source.value is None else labels == source.value
    if source.rle is not None:
        try:
            size = rle.decoded_size(source.rle)
            if size != shape:
                raise MediaError(_other_size(size, shape), field="size")
            return rle.decode(source.rle)
        except MediaError as error:
            error.field = f"rle.{error.field}"
            raise
    if source.polygons is not None:
        if len(shape) != 2:
            raise MediaError(
                "outlines are for images, and the mask belongs to a volume; write a label map or "
                "run lengths",
                field="polygons",
            )
        try:
            return fill_polygons(source.polygons, (shape[0], shape[1]))
        except MediaError as error:
            error.field = f"polygons.{error.field}"
            raise
    return np.zeros(shape, dtype=bool)


def _check_file(path: Path, shape: tuple[int, ...] | None) -> None:
    """Check the header of a label map."""
    if shape is not None and len(shape) == 2:
        found: tuple[int, ...] | None = check_label_image(path)
    else:
        found = check_volume(path)
    # The axes of a volume may be in another order, which only both geometries tell.
    sides = sorted if shape is not None and len(shape) == 3 else tuple
    if found is not None and shape is not None and sides(found) != sides(shape):
        raise MediaError(f"{path}: {_other_size(found, shape)}")


def _other_size(found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    own, other = (" x ".join(map(str, sides)) for sides in (found, expected))
    return f"a mask of {own} for an image of {other}; expected the same size"
