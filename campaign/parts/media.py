"""Mutated images and volumes: pixels of the declared shape, or a message."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from campaign.harness import Part, WrongResultError
from campaign.mutate import Target, mutation_cases, prepare
from medm.errors import MedmError
from medm.imaging import ImagePreprocess, Preprocess, VolumePreprocess, load_pixels
from tests.imaging.test_images import noise
from tests.imaging.test_mutations import FORMATS
from tests.imaging.tiny import CANARY, body

IMAGE = ImagePreprocess(size=[8, 8])
VOLUME = VolumePreprocess(size=[4, 4, 4], scale="minmax")


def read(file: Path, preprocess: Preprocess, shape: tuple[int, ...]) -> None:
    """Read pixels; the message names the file and no patient."""
    try:
        pixels = load_pixels(file, preprocess)
    except MedmError as error:
        if CANARY.split("^")[0].lower() in str(error).lower():
            raise WrongResultError("the message holds the patient's name") from None
        if file.name not in str(error):
            raise WrongResultError(f"the message does not name the file: {error}") from None
        raise
    if pixels.shape != shape or not np.isfinite(pixels).all():
        raise WrongResultError(f"pixels of shape {pixels.shape}, or not finite")


def image(form: str, mode: str = "RGB", **options: object) -> Callable[[Path], Path]:
    """Return a maker of an image of noise."""

    def make(folder: Path) -> Path:
        file = folder / f"a.{form}"
        noise(12, 16, mode).save(file, **options)
        return file

    return make


def npz(folder: Path) -> Path:
    np.savez_compressed(folder / "a.npz", body())
    return folder / "a.npz"


_image = partial(read, preprocess=IMAGE, shape=(3, 8, 8))
_volume = partial(read, preprocess=VOLUME, shape=(1, 4, 4, 4))
TARGETS = [
    Target("PNG", image("png"), _image),
    Target("PNG of 16 bits", image("png", "I;16"), _image),
    Target("JPEG", image("jpg"), _image),
    Target("JPEG progressive", image("jpg", progressive=True), _image),
    Target("TIFF", image("tif"), _image),
    Target("TIFF deflate", image("tif", compression="tiff_adobe_deflate"), _image),
    Target("BMP", image("bmp"), _image),
    *(Target(name, make, _volume) for name, make in FORMATS.items()),
    Target("npz", npz, _volume),
]
PART = Part(
    "media",
    "Mutated images and volumes",
    partial(prepare, TARGETS),
    partial(mutation_cases, TARGETS),
    500,
)
