"""Random changes of preprocessed pixels, for training only. The same for images and volumes.

Works on the arrays that `load_pixels` gives, so that it can follow a cache; intensities are changed
relative to the range of the array, whatever its normalization. Masks follow through the placement,
which is that of the moved pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from medm.imaging.options import Augment
from medm.imaging.placement import Placement, Prepared


def augment(options: Augment, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a changed copy of (C, *spatial) float32; `pixels` itself where every option is off.

    All channels get the same change. Voxels from outside get the smallest value of its channel
    (air, black).

    Args:
        options: how far each change may go.
        pixels: (C, H, W) or (C, D, H, W).
        rng: draws the change: the same state gives the same change.
    """
    return _changed(options, pixels, _draw_motion(options, pixels.shape[1:], rng), rng)


def augment_prepared(options: Augment, prepared: Prepared, rng: np.random.Generator) -> Prepared:
    """Return pixels changed as by `augment`, from the same random numbers, and their placement.

    `placement.to_prepared(mask)` of the result gives a mask of the file the same rotation, size,
    shift and mirroring as the pixels. For a mask that is on the prepared grid already, hand over
    pixels with `Placement.of_source` of that grid.
    """
    motion = _draw_motion(options, prepared.pixels.shape[1:], rng)
    placement = prepared.placement
    if motion is not None:
        placement = placement.sampled(*motion.index_map(), placement.shape)
    return Prepared(_changed(options, prepared.pixels, motion, rng), placement)


def follow(prepared: Prepared, before: Placement, after: Placement) -> Prepared:
    """Return pixels moved as those of another view of the same file, and their placement.

    The views may differ in size, crop and orientation: the motion is carried over through the
    grid of the file.

    Args:
        prepared: the view that follows.
        before: placement of the other view.
        after: placement of its moved pixels.
    """
    if before == after:
        return prepared
    placement = prepared.placement.carried(before, after)
    matrix, offset = prepared.placement.indices_of(placement)
    sides = np.asarray(prepared.pixels.shape[1:], dtype=np.float64)
    center = (sides - 1) / 2
    motion = _Motion(matrix, offset + matrix @ center - center, sides)
    return Prepared(_moved(prepared.pixels, motion), placement)


@dataclass(frozen=True, slots=True)
class _Motion:
    """From voxels of the result to voxels of the source, both counted from the center."""

    matrix: np.ndarray
    offset: np.ndarray
    sides: np.ndarray

    def index_map(self) -> tuple[np.ndarray, np.ndarray]:
        """Matrix and offset from an index of the result to an index of the source."""
        center = (self.sides - 1) / 2
        return self.matrix, self.offset + center - self.matrix @ center

    def theta(self) -> np.ndarray:
        """(dims, dims + 1) for `affine_grid`: from -1 to 1 along each axis, the last axis first."""
        sides, dims = self.sides, len(self.sides)
        linear = self.matrix * (sides[None, :] / sides[:, None])
        theta = np.concatenate([linear, (self.offset * 2 / sides)[:, None]], axis=1)
        theta[:, :dims] = theta[::-1, :dims][:, ::-1].copy()
        theta[:, dims] = theta[::-1, dims].copy()
        return theta


def _draw_motion(
    options: Augment, shape: tuple[int, ...], rng: np.random.Generator
) -> _Motion | None:
    """Return the spatial change; None if no change is enabled; then nothing is drawn."""
    if not options.motions:
        return None
    sides = np.asarray(shape, dtype=np.float64)
    dims = len(sides)
    angle = math.radians(_either_way(rng, options.rotate))
    zoom = 1 + _either_way(rng, options.scale)
    shifts = np.asarray([_either_way(rng, options.shift) for _ in range(dims)]) * sides
    mirror = options.mirror and rng.random() < 0.5

    matrix = np.eye(dims)
    cosine, sine = math.cos(angle), math.sin(angle)
    matrix[-2:, -2:] = [[cosine, sine], [-sine, cosine]]
    matrix /= zoom
    if mirror:
        matrix[:, -1] *= -1
    return _Motion(matrix, -matrix @ shifts, sides)


def _changed(
    options: Augment, pixels: np.ndarray, motion: _Motion | None, rng: np.random.Generator
) -> np.ndarray:
    if motion is not None:
        pixels = _moved(pixels, motion)
    if options.brightness or options.contrast or options.gamma:
        pixels = _shade(options, pixels, rng)
    return pixels


def _moved(pixels: np.ndarray, motion: _Motion) -> np.ndarray:
    import torch
    import torch.nn.functional as F

    source = torch.from_numpy(np.ascontiguousarray(pixels))[None]  # [1, C, *spatial]
    floor = source.flatten(2).amin(dim=2).view(1, -1, *[1] * len(motion.sides))
    theta = torch.from_numpy(motion.theta()[None]).to(source.dtype)
    grid = F.affine_grid(theta, list(source.shape), align_corners=False)
    moved = (
        F.grid_sample(
            source - floor, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        + floor
    )
    return moved[0].numpy()


def _shade(options: Augment, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    low, high = float(pixels.min()), float(pixels.max())
    brightness = _either_way(rng, options.brightness)
    contrast = 1 + _either_way(rng, options.contrast)
    gamma = 1 + _either_way(rng, options.gamma)
    if low == high:
        return pixels
    values = (pixels - low) / (high - low)
    mean = float(values.mean())
    values = np.clip((values - mean) * contrast + mean + brightness, 0, 1) ** gamma
    return (values * (high - low) + low).astype(np.float32)


def _either_way(rng: np.random.Generator, limit: float) -> float:
    return float(rng.uniform(-limit, limit))
