"""Voxel positions in the patient, and the limits of every volume.

Everything here is in the order of the array's axes. Positions are LPS, as in DICOM: x grows to the
patient's left, y to the back, z to the head; NIfTI's RAS is turned when a file is read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medm.errors import GeometryError, MediaError, MediaSizeError
from medm.limits import MAX_BYTES, MAX_VOXELS

SPACING_RANGE = (0.01, 50.0)
"""Plausible range of millimeters between voxels."""

_LETTERS = ("LR", "PA", "SI")
"""Growing and falling along x, y, z of the patient."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Spacing, direction and origin of a voxel grid."""

    spacing: np.ndarray
    """(3,) millimeters between voxels along each array axis."""
    direction: np.ndarray
    """(3, 3): column i is the unit vector (LPS) along which the index of array axis i grows."""
    origin: np.ndarray
    """(3,) position of voxel [0, 0, 0]."""

    @property
    def axes(self) -> str:
        """One letter per array axis: the direction of the patient that is nearest to it ("SPL")."""
        return "".join(
            _LETTERS[axis][int(self.direction[axis, column] < 0)]
            for column, axis in enumerate(self.nearest_axes())
        )

    @property
    def steps(self) -> np.ndarray:
        """(3, 3): column i is the step in mm (LPS) between voxels along array axis i."""
        return self.direction * self.spacing

    @property
    def tilt(self) -> float:
        """Largest angle in degrees between an array axis and the patient axis nearest to it."""
        cosines = [
            abs(self.direction[axis, column]) for column, axis in enumerate(self.nearest_axes())
        ]
        return math.degrees(math.acos(min(1.0, min(cosines))))

    def indices_of(self, other: Geometry) -> tuple[np.ndarray, np.ndarray]:
        """Return the matrix and offset that map an index in another grid to this one."""
        steps = np.linalg.inv(self.steps)
        return steps @ other.steps, steps @ (other.origin - self.origin)

    def nearest_axes(self) -> tuple[int, ...]:
        """Return the patient axis of each array axis, each used once, by the best agreement."""
        return max(
            itertools.permutations(range(3)),
            key=lambda order: sum(
                abs(self.direction[axis, column]) for column, axis in enumerate(order)
            ),
        )


def check_size(shape: Sequence[int], itemsize: int, name: str) -> None:
    """Refuse shapes before anything is allocated. Raises `MediaError`, by its kinds."""
    text = " x ".join(str(length) for length in shape)
    if len(shape) != 3:
        raise MediaError(
            f"{name}: expected a volume of 3 axes, found {len(shape)} ({text}); extract one 3-D "
            "volume"
        )
    if any(length < 1 for length in shape):
        raise MediaError(f"{name}: declares an impossible size {text}")
    if math.prod(shape) > MAX_VOXELS or math.prod(shape) * itemsize > MAX_BYTES:
        raise MediaSizeError(
            f"{name}: declares {text} voxels, more than the {MAX_VOXELS} voxels or {MAX_BYTES} "
            "bytes that are allowed (environment: MEDM_MAX_VOXELS, MEDM_MAX_VOLUME_BYTES)"
        )
    if any(length < 2 for length in shape):
        raise GeometryError(
            f"{name}: {text} voxels are a single slice, not a volume; give it as an image"
        )


def check_spacing(spacing: Sequence[float], name: str, *, source: str = "") -> None:
    """Refuse impossible spacings; `source` names their origin. Raises `GeometryError`."""
    low, high = SPACING_RANGE
    if not all(math.isfinite(value) and low <= value <= high for value in spacing):
        text = join_numbers(spacing)
        raise GeometryError(
            f"{name}: spacing {text}{source}: expected {low:g} to {high:g} mm between voxels; "
            "correct the header"
        )


def largest_turn(one: Geometry, other: Geometry) -> float:
    """Largest angle in degrees between the same axis of two grids."""
    cosines = np.sum(one.direction * other.direction, axis=0)
    return math.degrees(math.acos(float(np.clip(cosines.min(), -1.0, 1.0))))


def spacings_differ(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> bool:
    """Return true if two spacings differ by more than rounding: one percent."""
    return not np.allclose(one, other, rtol=1e-2, atol=0)


def join_numbers(values: Sequence[float] | np.ndarray) -> str:
    """Numbers of a header for a message."""
    return ", ".join(f"{value:g}" for value in values)


def geometry_from_steps(steps: np.ndarray, origin: np.ndarray, name: str) -> Geometry:
    """Return the geometry of an array whose axes are (z, y, x) from the steps of x, y, z.

    Args:
        steps: (3, 3), column i is the step in mm (LPS) from one voxel to the next along x, y, z of
            the file.
        origin: (3,) position of the first voxel (LPS).
        name: the file, for messages.

    Raises:
        GeometryError: steps that are not finite, vanish, are parallel or sheared.
    """
    if not (np.isfinite(steps).all() and np.isfinite(origin).all()):
        raise GeometryError(
            f"{name}: the direction or origin in the header holds NaN or infinite numbers"
        )
    spacing = np.linalg.norm(steps, axis=0)
    check_spacing([float(value) for value in spacing], name)
    direction = steps / spacing
    if abs(np.linalg.det(direction)) < 1e-3:
        raise GeometryError(
            f"{name}: the direction in the header is singular: two axes are parallel"
        )
    skew = np.abs(direction.T @ direction - np.eye(3)).max()
    if skew > 1e-2:
        angle = math.degrees(math.asin(min(1.0, float(skew))))
        raise GeometryError(
            f"{name}: the axes are sheared by {angle:.1f} degrees (a tilted gantry?); "
            "resample to a right-angled grid first"
        )
    return Geometry(
        spacing[::-1].copy(), direction[:, ::-1].copy(), np.asarray(origin, dtype=np.float64).copy()
    )
