"""Draws the pictures of the example records: geometric phantoms, made of arithmetic alone and of no patient.

Run from the checkout: python docs/examples_media/draw.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 96
FOLDER = Path(__file__).parent


def disc(row: float, column: float, radius: float) -> np.ndarray:
    """A filled disc, in fractions of the picture's side: (SIZE, SIZE) bool."""
    rows, columns = np.mgrid[:SIZE, :SIZE] / SIZE
    return (rows - row) ** 2 + (columns - column) ** 2 < radius**2


def picture(*discs: tuple[float, float, float]) -> Image.Image:
    """Bright discs in a dark oval "body" on black."""
    rows, columns = np.mgrid[:SIZE, :SIZE] / SIZE
    body = ((rows - 0.5) / 0.42) ** 2 + ((columns - 0.5) / 0.46) ** 2 < 1
    grey = np.where(body, 70, 0)
    for each in discs:
        grey = np.where(disc(*each), 220, grey)
    return Image.fromarray(grey.astype(np.uint8))


def bars(count: int) -> Image.Image:
    """Vertical bars of equal width."""
    columns = np.arange(SIZE) * count * 2 // SIZE
    return Image.fromarray(np.tile(np.where(columns % 2, 200, 30), (SIZE, 1)).astype(np.uint8))


def main() -> None:
    """Write all pictures beside this file."""
    picture((0.5, 0.3, 0.1)).save(FOLDER / "disc_left.png", optimize=True)
    picture((0.5, 0.7, 0.1)).save(FOLDER / "disc_right.png", optimize=True)
    picture((0.35, 0.35, 0.09), (0.65, 0.65, 0.13)).save(FOLDER / "two_discs.png", optimize=True)
    bars(4).convert("RGB").save(FOLDER / "bars.jpg", quality=80)


if __name__ == "__main__":
    main()
