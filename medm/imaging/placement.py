"""Placement of prepared pixels in the file they come from: masks and points in either grid.

Every step of the preprocessing that moves pixels (reorientation, resampling, crop, padding,
resizing) is an affine map of indices. A placement is their product, so that a mask is resampled
once, whatever the number of steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from pydantic import TypeAdapter, ValidationError

from medm.errors import MediaError
from medm.imaging.geometry import Geometry

Rows: TypeAlias = tuple[tuple[float, ...], ...]
"""An affine map (dims, dims + 1): a matrix, and in the last column an offset."""

_ROUNDING = 1e-6
"""Part of a voxel below which a difference is the rounding of floating-point numbers."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Placement of a prepared grid in the grid of its file.

    Both grids are in the order of the reader's array: (rows, columns) of an image, upright as its
    EXIF orientation says; (slices, rows, columns) of a volume. The axes of NIfTI, NRRD and
    MetaImage files, which name the fastest one first, are reversed. A DICOM series has its slices
    in the order of their positions along the normal of the slices. A whole index is the center of a
    voxel; its faces lie half a voxel to either side.
    """

    source_shape: tuple[int, ...]
    """Size of the file's grid."""
    shape: tuple[int, ...]
    """Size of the prepared grid."""
    matrix: Rows
    """Index in the prepared grid to index in the file's grid."""
    affine: Rows | None = None
    """Index in the file's grid to mm of the patient (LPS); None without a direction."""

    def __post_init__(self) -> None:
        dims = len(self.source_shape)
        if not dims or len(self.shape) != dims or min(*self.source_shape, *self.shape, 1) < 1:
            raise ValueError(
                f"placement: expected two grids of as many axes, found {self.source_shape} and "
                f"{self.shape}"
            )
        for name, rows in (("matrix", self.matrix), ("affine", self.affine)):
            if rows is None:
                continue
            if len(rows) != dims or any(len(row) != dims + 1 for row in rows):
                expected = f"{dims} rows of {dims + 1} numbers"
            elif not all(map(math.isfinite, itertools.chain(*rows))):
                expected = "finite numbers"
            elif np.linalg.matrix_rank(np.asarray(rows)[:, :dims]) < dims:
                expected = "a map that can be inverted"
            else:
                continue
            raise ValueError(f"placement: {name}: expected {expected}, found {rows}")

    @classmethod
    def of_source(cls, shape: Sequence[int], geometry: Geometry | None = None) -> Placement:
        """Return the placement of a file's own grid, before any step of the preprocessing."""
        own = tuple(int(length) for length in shape)
        identity = np.eye(len(own), len(own) + 1)
        affine = None if geometry is None else _rows(geometry.steps, geometry.origin)
        return cls(own, own, _rows(identity[:, :-1], identity[:, -1]), affine)

    @classmethod
    def from_dict(cls, value: Mapping[str, object]) -> Placement:
        """Return the placement that `to_dict` wrote. Raises `ValueError` for anything else."""
        try:
            return _ADAPTER.validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"])
            raise ValueError(f"not a placement: {where}: {problem['msg']}") from None

    def to_dict(self) -> dict[str, object]:
        """Return the placement as plain JSON values, exact to the last digit."""
        return asdict(self)

    @property
    def geometry(self) -> Geometry | None:
        """Spacing, direction and origin of the file's grid; None where `affine` is."""
        if self.affine is None:
            return None
        steps, origin = _split(self.affine)
        spacing = np.linalg.norm(steps, axis=0)
        return Geometry(spacing, steps / spacing, origin)

    # Steps of the preprocessing: the placement of the grid that a step makes of this one.

    def permuted(self, order: Sequence[int]) -> Placement:
        """Return the placement after a transposition to the axes `order` of this grid."""
        matrix = np.eye(len(order))[:, list(order)]
        return self.sampled(matrix, np.zeros(len(order)), [self.shape[axis] for axis in order])

    def flipped(self, axis: int) -> Placement:
        """Return the placement after the order of an axis is reversed."""
        matrix, offset = np.eye(len(self.shape)), np.zeros(len(self.shape))
        matrix[axis, axis], offset[axis] = -1, self.shape[axis] - 1
        return self.sampled(matrix, offset, self.shape)

    def boxed(self, starts: Sequence[int], shape: Sequence[int]) -> Placement:
        """Return the placement of a box of this grid: cropped, and padded outside of the grid.

        Args:
            starts: the first index of the box along each axis; negative where it is padded.
            shape: size of the box.
        """
        return self.sampled(np.eye(len(self.shape)), np.asarray(starts, dtype=np.float64), shape)

    def resized(self, shape: Sequence[int]) -> Placement:
        """Return the placement after resizing; the faces of the grid stay where they are."""
        scale = np.asarray(self.shape, dtype=np.float64) / np.asarray(shape)
        return self.sampled(np.diag(scale), (scale - 1) / 2, shape)

    def sampled(self, matrix: np.ndarray, offset: np.ndarray, shape: Sequence[int]) -> Placement:
        """Return the placement of a grid whose index i is `matrix @ i + offset` of this one."""
        own, start = _split(self.matrix)
        return Placement(
            self.source_shape,
            tuple(int(length) for length in shape),
            _rows(own @ matrix, own @ offset + start),
            self.affine,
        )

    def carried(self, before: Placement, after: Placement) -> Placement:
        """Return the placement after the motion of another grid of the same file.

        Args:
            before: placement of the other grid.
            after: placement of the other grid when its pixels were moved.
        """
        back, back_offset = _inverse(before.matrix)
        moved, moved_offset = _split(after.matrix)
        own, offset = _split(self.matrix)
        matrix = moved @ back
        place = matrix @ offset + moved @ back_offset + moved_offset
        return Placement(self.source_shape, self.shape, _rows(matrix @ own, place), self.affine)

    def indices_of(self, other: Placement) -> tuple[np.ndarray, np.ndarray]:
        """Return the matrix and offset from an index of another grid of the file to this one."""
        back, back_offset = _inverse(self.matrix)
        matrix, offset = _split(other.matrix)
        return back @ matrix, back @ offset + back_offset

    # Masks and points.

    def to_prepared(self, mask: np.ndarray, *, fill: float = 0) -> np.ndarray:
        """Return a mask of the file's grid on the prepared grid, by the nearest voxel.

        Args:
            mask: (..., *source_shape) of any type; leading axes are masks of their own.
            fill: value of the padding.

        Raises:
            MediaError: a mask of another size than the file.
        """
        self._check(mask, self.source_shape, "the file")
        return _sample(mask, *_split(self.matrix), self.shape, fill=fill)

    def to_source(
        self,
        mask: np.ndarray,
        *,
        interpolation: Literal["nearest", "linear"] = "nearest",
        fill: float = 0,
    ) -> np.ndarray:
        """Return a mask of the prepared grid on the file's grid.

        Args:
            mask: (..., *shape); leading axes are masks of their own.
            interpolation: "nearest" for labels, whose type is kept; "linear" for soft maps, which
                become float32.
            fill: value of what the prepared grid does not show (cropped away).

        Raises:
            MediaError: a mask of another size than the prepared grid.
        """
        self._check(mask, self.shape, "the prepared grid")
        take = _interpolate if interpolation == "linear" else _sample
        return take(mask, *_inverse(self.matrix), self.source_shape, fill=fill)

    def points_to_prepared(self, points: ArrayLike) -> np.ndarray:
        """Return points (N, dims), in voxels of the file's grid, in voxels of the prepared grid."""
        matrix, offset = _inverse(self.matrix)
        return np.asarray(points, dtype=np.float64) @ matrix.T + offset

    def points_to_source(self, points: ArrayLike) -> np.ndarray:
        """Return points (N, dims), in voxels of the prepared grid, in voxels of the file's grid."""
        matrix, offset = _split(self.matrix)
        return np.asarray(points, dtype=np.float64) @ matrix.T + offset

    def _check(self, mask: np.ndarray, shape: tuple[int, ...], grid: str) -> None:
        if mask.shape[-len(shape) :] != shape:
            found, expected = (" x ".join(map(str, sides)) for sides in (mask.shape, shape))
            raise MediaError(f"a mask of {found} does not fit {grid}: expected {expected}")


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """An image or volume as a model takes it, and its placement in the file."""

    pixels: np.ndarray
    """(C, *spatial) float32 in host memory; (T, C, height, width) of an image that is cut into
    tiles."""
    placement: Placement
    """Of tiles that of the whole image, resized to their grid, before it is cut: the thumbnail is
    beside it."""


_ADAPTER = TypeAdapter(Placement)


def _rows(matrix: np.ndarray, offset: np.ndarray) -> Rows:
    """An affine map as plain numbers. Adding 0 turns -0 into 0: equal maps are written alike."""
    return tuple(tuple(row) for row in (np.column_stack([matrix, offset]) + 0.0).tolist())


def _split(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Matrix and offset of an affine map."""
    array = np.asarray(rows, dtype=np.float64)
    return array[:, :-1], array[:, -1]


def _inverse(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    matrix, offset = _split(rows)
    inverse = np.linalg.inv(matrix)
    return inverse, -inverse @ offset


def _aligned(matrix: np.ndarray, shape: Sequence[int]) -> list[int] | None:
    """Return the axis of the result along each axis of the values; None for turned grids."""
    used = np.abs(matrix) * np.asarray(shape) > _ROUNDING
    if (used.sum(axis=0) == 1).all() and (used.sum(axis=1) == 1).all():
        return used.argmax(axis=1).tolist()
    return None


def _sample(
    values: np.ndarray,
    matrix: np.ndarray,
    offset: np.ndarray,
    shape: tuple[int, ...],
    *,
    fill: float,
) -> np.ndarray:
    """Sample (..., *grid) at `matrix @ i + offset` for i in `shape`, by the nearest voxel."""
    lead, sides = values.shape[: -len(shape)], values.shape[-len(shape) :]
    flat = values.reshape(-1, *sides)
    axes = _aligned(matrix, shape)
    if axes is None:
        result = np.full((len(flat), shape[0], math.prod(shape[1:])), fill, dtype=values.dtype)
        table = flat.reshape(len(flat), -1)
        for index, places in enumerate(_places(matrix, offset, shape)):
            nearest = _nearest(places)  # [dims, n]
            inside = ((nearest >= 0) & (nearest < np.asarray(sides)[:, None])).all(axis=0)
            cells = np.ravel_multi_index(tuple(nearest[:, inside]), sides)
            result[:, index, inside] = table[:, cells]
        return result.reshape(*lead, *shape)
    lines = [_nearest(places) for places in _lines(matrix, offset, shape, axes)]
    clipped = [line.clip(0, side - 1) for line, side in zip(lines, sides, strict=True)]
    result = flat[np.ix_(np.arange(len(flat)), *clipped)]
    outside = [(line < 0) | (line >= side) for line, side in zip(lines, sides, strict=True)]
    return _finished(result, outside, axes, fill).reshape(*lead, *shape)


def _interpolate(
    values: np.ndarray,
    matrix: np.ndarray,
    offset: np.ndarray,
    shape: tuple[int, ...],
    *,
    fill: float,
) -> np.ndarray:
    """Sample as `_sample`, linear between voxel centers; outer values are extended."""
    lead, sides = values.shape[: -len(shape)], values.shape[-len(shape) :]
    table = values.reshape(-1, math.prod(sides)).astype(np.float32)
    axes = _aligned(matrix, shape)
    if axes is not None:
        blended, outside = table.reshape(-1, *sides), []
        lines = _lines(matrix, offset, shape, axes)
        for axis, (places, side) in enumerate(zip(lines, sides, strict=True)):
            outside.append((places < -0.5 - _ROUNDING) | (places > side - 0.5 + _ROUNDING))
            blended = _blended(blended, 1 + axis, places.clip(0, side - 1))
        return _finished(blended, outside, axes, fill).reshape(*lead, *shape)
    last = np.asarray(sides)[:, None] - 1
    result = np.full((len(table), shape[0], math.prod(shape[1:])), fill, dtype=np.float32)
    for index, places in enumerate(_places(matrix, offset, shape)):
        inside = ((places >= -0.5 - _ROUNDING) & (places <= last + 0.5 + _ROUNDING)).all(axis=0)
        places = places[:, inside].clip(0, last)
        below = np.floor(places).astype(np.int64)
        weight = (places - below).astype(np.float32)
        total = np.zeros((len(table), places.shape[1]), dtype=np.float32)
        for corner in itertools.product((0, 1), repeat=len(sides)):
            step = np.asarray(corner)[:, None]
            cells = np.ravel_multi_index(tuple(np.minimum(below + step, last)), sides)
            total += table[:, cells] * np.where(step, weight, 1 - weight).prod(axis=0)
        result[:, index, inside] = total
    return result.reshape(*lead, *shape)


def _lines(
    matrix: np.ndarray, offset: np.ndarray, shape: Sequence[int], axes: Sequence[int]
) -> list[np.ndarray]:
    """Return the sampling positions of parallel grids, by axis of the values."""
    return [
        matrix[axis, along] * np.arange(shape[along]) + offset[axis]
        for axis, along in enumerate(axes)
    ]


def _blended(values: np.ndarray, axis: int, places: np.ndarray) -> np.ndarray:
    """Values at places along one axis, linear between its voxels."""
    below = np.floor(places).astype(np.int64)
    weight = (places - below).astype(np.float32)
    result = values.take(below, axis)
    above = values.take(np.minimum(below + 1, values.shape[axis] - 1), axis)
    above -= result
    above *= weight.reshape(-1, *[1] * (values.ndim - axis - 1))
    result += above
    return result


def _finished(
    result: np.ndarray, outside: Sequence[np.ndarray], axes: Sequence[int], fill: float
) -> np.ndarray:
    """Fill the outside with `fill` and order the axes as in the result, for parallel grids."""
    for axis, places in enumerate(outside):
        if places.any():
            np.moveaxis(result, 1 + axis, 0)[places] = fill
    return np.ascontiguousarray(result.transpose(0, *(1 + np.argsort(axes))))


def _places(matrix: np.ndarray, offset: np.ndarray, shape: Sequence[int]) -> Iterator[np.ndarray]:
    """`matrix @ i + offset`, [dims, prod(shape[1:])], by first index: all take too much memory."""
    plane = np.indices(shape[1:]).reshape(len(shape) - 1, -1)
    within = matrix[:, 1:] @ plane + offset[:, None]
    for index in range(shape[0]):
        yield within + matrix[:, :1] * index


def _nearest(places: np.ndarray) -> np.ndarray:
    """Whole indices; a place halfway between two voxels belongs to the later one."""
    return np.floor(places + 0.5 + _ROUNDING).astype(np.int64)
