"""Perceptual hash of images: near duplicates have nearly the same bits.

Difference hash: the image in 16 rows of 17 gray levels, one bit for each pair of neighbors
(N. Krawetz, "Kind of Like That", 2013). Sizes, compression and brightness hardly change it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from medm.imaging.images import read_image

_SIDE = 16
BITS = _SIDE * _SIDE


def image_hash(path: Path) -> int:
    """Return the hash of an image of any format that is read: `BITS` bits; 0 for a constant one.

    Raises:
        MediaError: the image cannot be read.
    """
    pixels = np.asarray(read_image(path).pixels, dtype=np.float32)
    gray = pixels.mean(axis=-1) if pixels.ndim == 3 else pixels  # (H, W)
    small = Image.fromarray(gray).resize((_SIDE + 1, _SIDE), Image.Resampling.BOX)
    levels = np.asarray(small)
    bits = np.packbits(levels[:, 1:] > levels[:, :-1])
    return int.from_bytes(bits.tobytes(), "big")
