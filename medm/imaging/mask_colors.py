"""Colors of masks, the same in overlay sheets and in DICOM SEG."""

from __future__ import annotations

from typing import TypeAlias

Color: TypeAlias = tuple[int, int, int]

COLORS: tuple[Color, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
"""Colors that people with any color vision tell apart, without black (Okabe and Ito, "Color
Universal Design", 2008)."""


def mask_color(index: int) -> Color:
    """Return the color of a mask by its position from 0; after seven masks they repeat."""
    return COLORS[index % len(COLORS)]
