"""Regions of an image drawn on its pixels: boxes, outlines, areas and points.

Marks are drawn on the image as it is shown (RGB of 8 bits, deep images after their window), in the
file's own grid, before the preprocessing resizes it. UniBiomed marks a box with a green rectangle,
two pixels wide; the other marks have the same color.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from medm.errors import MediaError
from medm.imaging.decoded_image import DecodedImage
from medm.imaging.images import check_image, read_image, shown
from medm.imaging.options import ImagePreprocess

COLOR = (0, 255, 0)
"""Green, as published for boxes."""
TINT = 0.5
"""Part of the color in a marked area; the rest is the image."""
MIN_RADIUS = 5
"""Smallest radius of a point's disc, in pixels; on large images it is a hundredth of the longer
side."""


@dataclass(frozen=True, slots=True, eq=False)
class Mark:
    """One region: exactly one of a box, a point, an outline or an area."""

    field: str
    """Field of the record, for messages."""
    box: tuple[float, ...] | None = None
    """x1, y1, x2, y2 in pixels; the upper corner is one past the last pixel."""
    point: tuple[float, ...] | None = None
    """x, y in pixels."""
    outline: np.ndarray | None = None
    """(H, W) bool, a mask whose outline is drawn."""
    area: np.ndarray | None = None
    """(H, W) bool, a mask that is tinted."""

    def require_inside(self, size: Sequence[int], name: str) -> None:
        """Raise `MediaError` unless the mark lies in an image of `size` (height, width)."""
        height, width = size
        wrong = None
        if self.box is not None:
            x1, y1, x2, y2 = self.box
            if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
                wrong = f"box {list(self.box)}: expected 0 <= x1 < x2 <= {width} and 0 <= y1 < y2"
                wrong += f" <= {height}"
        elif self.point is not None:
            x, y = self.point
            if not (0 <= x < width and 0 <= y < height):
                wrong = f"point {list(self.point)}: expected 0 <= x < {width} and 0 <= y < {height}"
        else:
            mask = self.outline if self.outline is not None else self.area
            assert mask is not None  # one of the four is given
            if mask.shape != (height, width):
                wrong = f"a mask of {mask.shape[1]} x {mask.shape[0]} pixels"
            elif not mask.any():
                wrong = "an empty mask marks nothing; leave the region out"
        if wrong is not None:
            raise MediaError(
                f"{name}: {wrong}; the image has {width} x {height} pixels", field=self.field
            )


@dataclass(frozen=True, slots=True, eq=False)
class MarkedImage:
    """An image whose regions are drawn on it before it is prepared."""

    source: Path | BinaryIO
    marks: tuple[Mark, ...]

    @property
    def name(self) -> str:
        """The image, for messages."""
        return str(self.source) if isinstance(self.source, Path) else "image"

    def check(self) -> None:
        """Check the file by its header, and that the marks lie in it. Raises `MediaError`."""
        size = check_image(self.source)
        for mark in self.marks:
            mark.require_inside(size, self.name)

    def read(self, preprocess: ImagePreprocess) -> DecodedImage:
        """Return the marked image, (H, W, 3) uint8.

        Args:
            preprocess: its window shows a deep image.

        Raises:
            MediaError: the file cannot be read, or a mark does not lie in the image.
        """
        image = read_image(self.source)
        for mark in self.marks:
            mark.require_inside(image.pixels.shape[:2], image.name)
        return DecodedImage(draw(shown(preprocess, image), self.marks), image.name)


def draw(pixels: np.ndarray, marks: Sequence[Mark]) -> np.ndarray:
    """Return an image with marks drawn on it, areas first, so that no line is tinted.

    Args:
        pixels: (H, W, 3) uint8.
        marks: that lie in it.
    """
    from PIL import Image, ImageDraw

    result = pixels.copy()
    for mark in marks:
        if mark.area is not None:
            blend = (1 - TINT) * result[mark.area] + TINT * np.asarray(COLOR)
            result[mark.area] = np.round(blend).astype(np.uint8)
    image = Image.fromarray(result)
    canvas = ImageDraw.Draw(image)
    for mark in marks:
        if mark.box is not None:
            x1, y1, x2, y2 = (round(value) for value in mark.box)
            # Two pixels wide: one inside of the box, so that a box as large as the image is seen,
            # and one outside.
            canvas.rectangle((x1 - 1, y1 - 1, x2, y2), outline=COLOR, width=2)
        elif mark.point is not None:
            x, y = mark.point
            radius = max(MIN_RADIUS, max(pixels.shape[:2]) // 100)
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOR)
    result = np.array(image)
    for mark in marks:
        if mark.outline is not None:
            result[edge(mark.outline)] = COLOR
    return result


def edge(mask: np.ndarray) -> np.ndarray:
    """Return the outline of a mask (H, W), two pixels wide: one inside of it and one outside."""
    from scipy.ndimage import binary_dilation, binary_erosion

    inner: np.ndarray = binary_dilation(mask) & ~binary_erosion(mask)
    return inner


def box_around(mask: np.ndarray) -> tuple[float, ...]:
    """Return x1, y1, x2, y2 of the smallest box around a mask (H, W) that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (
        float(columns[0]),
        float(rows[0]),
        float(columns[-1] + 1),
        float(rows[-1] + 1),
    )
