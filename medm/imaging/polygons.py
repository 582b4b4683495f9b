"""Outlines to masks. A whole number is the center of a pixel; x counts columns, y rows.

A pixel belongs to the mask if its center lies inside of an outline or on it. Pillow's drawing is
not used: it cuts fractions off the corners, which moves a mask by up to a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from medm.errors import MediaError

_ROUNDING = 1e-9
"""Part of a pixel below which a difference is the rounding of floating-point numbers."""
_MARGIN = 1.0
"""Pixels beyond the outer pixel centers that a corner may lie: programs that count from the corner
of a pixel write the right border of an image as its width."""


def fill_polygons(polygons: Sequence[Sequence[float]], shape: tuple[int, int]) -> np.ndarray:
    """Return the union of outlines as a mask, bool of (rows, columns).

    Args:
        polygons: outlines x1, y1, x2, y2 ...; the last corner is joined to the first. One that
            crosses itself is filled by the even-odd rule.
        shape: rows and columns of the image.

    Raises:
        MediaError: with the number of the outline as field: a corner lies outside of the image.
    """
    mask = np.zeros(shape, dtype=bool)
    for number, polygon in enumerate(polygons):
        corners = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
        last = np.asarray([shape[1], shape[0]]) - 1
        outside = ((corners < -_MARGIN) | (corners > last + _MARGIN)).any(axis=1)
        if outside.any():
            x, y = corners[outside.argmax()]
            raise MediaError(
                f"the corner ({x:g}, {y:g}) lies outside of the image, {shape[1]} columns x "
                f"{shape[0]} rows; write x before y, in pixels of the file",
                field=str(number),
            )
        _fill(mask, corners)
    return mask


def _fill(mask: np.ndarray, corners: np.ndarray) -> None:
    """Set the pixels inside one outline, by rows."""
    rows, columns = mask.shape
    starts, ends = corners, np.roll(corners, -1, axis=0)
    turned = (starts[:, 1] > ends[:, 1])[:, None]
    low, high = np.where(turned, ends, starts), np.where(turned, starts, ends)
    flat = low[:, 1] == high[:, 1]
    slope = np.zeros(len(low))
    np.divide(high[:, 0] - low[:, 0], high[:, 1] - low[:, 1], out=slope, where=~flat)
    first = max(0, math.ceil(corners[:, 1].min() - _ROUNDING))
    last = min(rows - 1, math.floor(corners[:, 1].max() + _ROUNDING))
    for row in range(first, last + 1):
        crossing = low[:, 0] + (row - low[:, 1]) * slope
        # Edges with the upper, and with the lower end left out: together both borders are inside.
        for taken in (
            (low[:, 1] <= row) & (row < high[:, 1]),
            (low[:, 1] < row) & (row <= high[:, 1]),
        ):
            for start, end in np.sort(crossing[taken]).reshape(-1, 2):
                _set(mask, row, start, end, columns)
        for edge in np.flatnonzero(flat & (low[:, 1] == row)):
            start, end = sorted((low[edge, 0], high[edge, 0]))
            _set(mask, row, start, end, columns)


def _set(mask: np.ndarray, row: int, start: float, end: float, columns: int) -> None:
    first, last = math.ceil(start - _ROUNDING), math.floor(end + _ROUNDING)
    mask[row, max(0, first) : min(columns - 1, last) + 1] = True
