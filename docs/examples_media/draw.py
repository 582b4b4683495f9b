"""Draws the pictures and volumes of the example records: geometric phantoms, of arithmetic alone
and of no patient.

Run from the checkout: python docs/examples_media/draw.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
from PIL import Image

SIZE = 96
SHAPE = (20, 32, 32)
"""Slices, rows and columns of a volume."""
SPACING = (5.0, 8.0, 10.0)
"""Millimeters along columns, rows and slices."""
AIR, SOFT_TISSUE, BONE = -1000, 40, 700
"""Hounsfield units."""
FOLDER = Path(__file__).parent


def disc(row: float, column: float, radius: float) -> np.ndarray:
    """A filled disc, in fractions of the picture's side: (SIZE, SIZE) bool."""
    rows, columns = np.mgrid[:SIZE, :SIZE] / SIZE
    return (rows - row) ** 2 + (columns - column) ** 2 < radius**2


def picture(*discs: tuple[float, float, float]) -> Image.Image:
    """Bright discs in a dark oval "body" on black."""
    rows, columns = np.mgrid[:SIZE, :SIZE] / SIZE
    body = ((rows - 0.5) / 0.42) ** 2 + ((columns - 0.5) / 0.46) ** 2 < 1
    gray = np.where(body, 70, 0)
    for each in discs:
        gray = np.where(disc(*each), 220, gray)
    return Image.fromarray(gray.astype(np.uint8))


def label_map(*discs: tuple[float, float, float]) -> Image.Image:
    """Each disc by its number, from 1, on 0."""
    labels = np.zeros((SIZE, SIZE), np.uint8)
    for number, each in enumerate(discs, start=1):
        labels[disc(*each)] = number
    return Image.fromarray(labels)


def bars(count: int) -> Image.Image:
    """Vertical bars of equal width."""
    columns = np.arange(SIZE) * count * 2 // SIZE
    return Image.fromarray(np.tile(np.where(columns % 2, 200, 30), (SIZE, 1)).astype(np.uint8))


def ball(z: float, y: float, x: float, radius: float) -> np.ndarray:
    """A filled ball, in fractions of the volume's sides: SHAPE bool."""
    slices, rows, columns = (
        grid / length
        for grid, length in zip(np.mgrid[tuple(map(slice, SHAPE))], SHAPE, strict=True)
    )
    return (slices - z) ** 2 + (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def volume(*balls: tuple[float, float, float, float]) -> sitk.Image:
    """Bone-dense balls (slice, row, column, radius), in fractions of the volume's sides, in soft
    tissue in air.

    Axes are the patient's left, posterior and superior, as in CT: the first slice is the lowest,
    and a column of more than 0.5 is on the patient's left.
    """
    slices, rows, columns = (
        grid / length
        for grid, length in zip(np.mgrid[tuple(map(slice, SHAPE))], SHAPE, strict=True)
    )
    body = ((slices - 0.5) / 0.48) ** 2 + ((rows - 0.5) / 0.42) ** 2 + (
        (columns - 0.5) / 0.46
    ) ** 2 < 1
    values = np.where(body, SOFT_TISSUE, AIR)
    for each in balls:
        values = np.where(ball(*each), BONE, values)
    return on_grid(values.astype(np.int16))


def labels_of(*balls: tuple[float, float, float, float]) -> sitk.Image:
    """Each ball by its number, from 1, on 0."""
    values = np.zeros(SHAPE, np.uint8)
    for number, each in enumerate(balls, start=1):
        values[ball(*each)] = number
    return on_grid(values)


def on_grid(values: np.ndarray) -> sitk.Image:
    """Voxels with the spacing of the volumes."""
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(SPACING)
    return image


def main() -> None:
    """Write all pictures and volumes beside this file."""
    picture((0.5, 0.3, 0.1)).save(FOLDER / "disc_left.png", optimize=True)
    picture((0.5, 0.7, 0.1)).save(FOLDER / "disc_right.png", optimize=True)
    picture((0.35, 0.35, 0.09), (0.65, 0.65, 0.13)).save(FOLDER / "two_discs.png", optimize=True)
    label_map((0.35, 0.35, 0.09), (0.65, 0.65, 0.13)).save(FOLDER / "two_discs_labels.png")
    label_map((0.5, 0.3, 0.1)).save(FOLDER / "disc_left_labels.png", optimize=True)
    bars(4).convert("RGB").save(FOLDER / "bars.jpg", quality=80)
    for name, phantom in {
        "ball_left": volume((0.5, 0.5, 0.7, 0.12)),
        "ball_right": volume((0.5, 0.5, 0.3, 0.12)),
        "ball_left_upper": volume((0.75, 0.5, 0.65, 0.12)),
        "two_balls": volume((0.35, 0.5, 0.35, 0.09), (0.65, 0.5, 0.65, 0.15)),
        "two_balls_labels": labels_of((0.35, 0.5, 0.35, 0.09), (0.65, 0.5, 0.65, 0.15)),
    }.items():
        sitk.WriteImage(phantom, FOLDER / f"{name}.nii.gz", True)


if __name__ == "__main__":
    main()
