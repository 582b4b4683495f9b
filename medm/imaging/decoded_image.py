"""A decoded image on its way to an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medm.imaging.dicom_values import Voi


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A decoded image without its metadata."""

    pixels: np.ndarray
    """(H, W, 3) color or (H, W) gray, of uint8 or of a wider type with raw values."""
    name: str
    """The file, for messages."""
    window: tuple[float, float] | None = None
    """Lower and upper raw value of the file's own DICOM window."""
    full_range: tuple[float, float] | None = None
    """Smallest and largest raw value of the file's type; None for float and 32-bit types."""
    inverted: bool = False
    """The smallest raw value is white (DICOM MONOCHROME1, TIFF MinIsWhite)."""
    alpha: np.ndarray | None = None
    """(H, W) float32, opacity in 0..1 of deep pixels that are not opaque everywhere."""
    voi: Voi | None = None
    """VOI LUT or sigmoid window of the file (DICOM), which comes before `window`."""
    padding: np.ndarray | None = None
    """(H, W), true for pixels outside the image, shown black (DICOM Pixel Padding Value)."""

    def shown_range(self, window: Sequence[float] | None) -> tuple[float, float] | None:
        """Values that become black and white: of the recipe's window, the file or its type."""
        if window is not None:
            return window[0], window[1]
        return self.window or self.full_range

    @property
    def is_deep(self) -> bool:
        """Return true if the pixels need a window before they are shown."""
        return self.pixels.dtype != np.uint8
