"""Label maps: masks of an image or volume, read and written with their geometry.

A label map holds a whole number for each voxel: 0 for the background, any other for a structure.
Its grid is the grid of its image (`Placement.source_shape`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medm.errors import MediaError
from medm.imaging.geometry import Geometry, join_numbers
from medm.imaging.nifti import write_nifti
from medm.imaging.placement import Placement

_TOLERANCE = 0.1
"""Part of a voxel by which the corners of two grids may differ: headers are rounded."""


@dataclass(frozen=True, slots=True, eq=False)
class LabelMap:
    """Labels and their placement."""

    labels: np.ndarray
    """(H, W) or (D, H, W), whole numbers."""
    name: str
    """The file, for messages."""
    geometry: Geometry | None = None
    """None for images and for volumes whose file gives no direction."""


def read_label_map(path: str | Path, placement: Placement) -> LabelMap:
    """Read the label map of an image or volume.

    Args:
        path: an image for an image, whose stored numbers are the labels: the indices of a palette,
            and 0 and 1 of one bit; a file or folder that `read_volume` reads for a volume. Axes of
            a volume that are exchanged or reversed against those of its image are put in the order
            of the image.
        placement: of the image or volume, whose grid the labels have to fit.

    Raises:
        MediaError: it cannot be read, its values are no labels, or its grid is not that of its
            image.
    """
    from medm.imaging.images import read_label_image
    from medm.imaging.volumes import read_volume

    name = str(path)
    if len(placement.source_shape) == 2:
        found = LabelMap(_single_channel(read_label_image(Path(path)), name), name)
    else:
        volume = read_volume(path)
        found = _in_order(LabelMap(volume.voxels, name, volume.geometry), placement.geometry)
    labels = LabelMap(_whole_numbers(found.labels, found.name), found.name, found.geometry)
    check_geometry(labels, placement)
    return labels


def _in_order(labels: LabelMap, other: Geometry | None) -> LabelMap:
    """Return a label map whose axes run as those of another grid; no voxel is interpolated.

    Programs that read a DICOM series and write NIfTI often turn axes over.
    """
    from medm.imaging.transforms import reoriented

    own = labels.geometry
    if own is None or other is None or own.axes == other.axes:
        return labels
    voxels, geometry = reoriented(labels.labels, own, other.axes)
    return LabelMap(voxels, labels.name, geometry)


def check_geometry(labels: LabelMap, placement: Placement) -> None:
    """Check that a label map lies on the grid of its image.

    Raises:
        MediaError: with both sizes; or with both orientations, spacings and origins.
    """
    shape = placement.source_shape
    if labels.labels.shape != shape:
        found, expected = (" x ".join(map(str, sides)) for sides in (labels.labels.shape, shape))
        raise MediaError(
            f"{labels.name}: a label map of {found} voxels for an image of {expected}; expected "
            "the same grid. Resample the label map to its image"
        )
    own, other = labels.geometry, placement.geometry
    if own is None or other is None:
        return
    corners = np.array(list(itertools.product(*[(0, side - 1) for side in shape])))
    places = [corners @ grid.steps.T + grid.origin for grid in (own, other)]
    distance = float(np.linalg.norm(places[0] - places[1], axis=1).max())
    allowed = _TOLERANCE * float(other.spacing.min())
    if distance > allowed:
        raise MediaError(
            f"{labels.name}: a label map with {_described(own)} for an image with "
            f"{_described(other)}; their corners are up to {distance:.3g} mm apart, expected at "
            f"most {allowed:.3g}. Resample the label map to its image"
        )


def write_label_map(path: str | Path, labels: np.ndarray, placement: Placement) -> None:
    """Write a label map on the grid of its volume as NIfTI, with the affine of the volume's file.

    Args:
        path: ends with .nii or .nii.gz.
        labels: `source_shape` of the placement (see `Placement.to_source`), whole numbers or bool.
        placement: of the volume.

    Raises:
        MediaError: labels of another size than the file, no volume, or numbers that are no labels.
        OSError: the file cannot be written.
    """
    name = str(path)
    if len(placement.source_shape) != 3:
        raise MediaError(f"{name}: a label map of an image is no NIfTI file; expected a volume")
    check_geometry(LabelMap(labels, name), placement)
    write_nifti(Path(path), _whole_numbers(labels, name), placement.geometry)


def _described(grid: Geometry) -> str:
    """A grid for a message."""
    return (
        f"axes {grid.axes}, voxels of {join_numbers(grid.spacing)} mm and origin "
        f"{join_numbers(grid.origin)}"
    )


def _single_channel(pixels: np.ndarray, name: str) -> np.ndarray:
    if pixels.ndim == 2:
        return pixels
    if (pixels != pixels[..., :1]).any():
        raise MediaError(f"{name}: a label map in color; expected one gray value for each label")
    return pixels[..., 0]


def _whole_numbers(labels: np.ndarray, name: str) -> np.ndarray:
    """Return labels in the smallest unsigned type. Raises `MediaError` for other numbers."""
    low, high = labels.min(), labels.max()
    fractions = labels.dtype.kind == "f" and (labels != np.floor(labels)).any()
    if low < 0 or high >= 2**32 or fractions:
        raise MediaError(
            f"{name}: values {low:g}..{high:g} are no labels; expected whole numbers from 0 on"
        )
    return labels.astype(np.min_scalar_type(int(high)))
