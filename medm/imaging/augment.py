"""Random changes of preprocessed pixels, for training only. The same for images and volumes.

Works on the arrays that `load_pixels` gives, so that it can follow a cache; intensities are changed relative to the
range of the array, whatever its normalisation.
"""

from __future__ import annotations

import math

import numpy as np

from medm.imaging.options import Augment


def augment(options: Augment, pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A changed copy of (C, *spatial) float32; `pixels` itself where every option is off.

    All channels get the same change. What comes in from outside is the smallest value of its channel (air, black).

    Args:
        options: how far each change may go.
        pixels: (C, H, W) or (C, D, H, W).
        generator: draws the change: the same state gives the same change.
    """
    if options.rotate or options.scale or options.shift or options.mirror:
        pixels = _move(options, pixels, generator)
    if options.brightness or options.contrast or options.gamma:
        pixels = _shade(options, pixels, generator)
    return pixels


def _move(options: Augment, pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    import torch
    import torch.nn.functional as F

    sides = np.asarray(pixels.shape[1:], dtype=np.float64)
    dims = len(sides)
    angle = math.radians(_either_way(generator, options.rotate))
    zoom = 1 + _either_way(generator, options.scale)
    shifts = np.asarray([_either_way(generator, options.shift) for _ in range(dims)]) * sides
    mirror = options.mirror and generator.random() < 0.5

    # From voxels of the result to voxels of the source, both counted from the centre, axes in array order.
    matrix = np.eye(dims)
    cosine, sine = math.cos(angle), math.sin(angle)
    matrix[-2:, -2:] = [[cosine, sine], [-sine, cosine]]
    matrix /= zoom
    if mirror:
        matrix[:, -1] *= -1
    offset = -matrix @ shifts
    # affine_grid counts from -1 to 1 along each axis and names the last axis first.
    theta = np.concatenate([matrix * (sides[None, :] / sides[:, None]), (offset * 2 / sides)[:, None]], axis=1)
    theta[:, :dims] = theta[::-1, :dims][:, ::-1].copy()
    theta[:, dims] = theta[::-1, dims].copy()

    source = torch.from_numpy(np.ascontiguousarray(pixels))[None]  # [1, C, *spatial]
    floor = source.flatten(2).amin(dim=2).view(1, -1, *[1] * dims)
    grid = F.affine_grid(torch.from_numpy(theta[None]).to(source.dtype), list(source.shape), align_corners=False)
    moved = F.grid_sample(source - floor, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + floor
    return moved[0].numpy()


def _shade(options: Augment, pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    low, high = float(pixels.min()), float(pixels.max())
    brightness = _either_way(generator, options.brightness)
    contrast = 1 + _either_way(generator, options.contrast)
    gamma = 1 + _either_way(generator, options.gamma)
    if low == high:
        return pixels
    values = (pixels - low) / (high - low)
    mean = float(values.mean())
    values = np.clip((values - mean) * contrast + mean + brightness, 0, 1) ** gamma
    return (values * (high - low) + low).astype(np.float32)


def _either_way(generator: np.random.Generator, limit: float) -> float:
    return float(generator.uniform(-limit, limit))
