"""Mutated images and volumes: pixels of the declared shape, or a message."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image

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


def refuse(file: Path) -> None:
    """A format that is not read, or several frames: always a message."""
    try:
        load_pixels(file, IMAGE)
    except MedmError as error:
        if file.name not in str(error):
            raise WrongResultError(f"the message does not name the file: {error}") from None
    else:
        raise WrongResultError("it was read")


def image(form: str, mode: str = "RGB", **options: object) -> Callable[[Path], Path]:
    """Return a maker of an image of noise."""

    def make(folder: Path) -> Path:
        file = folder / f"a.{form}"
        noise(12, 16, mode).save(file, **options)
        return file

    return make


def frames(form: str) -> Callable[[Path], Path]:
    """Return a maker of an image of three frames."""

    def make(folder: Path) -> Path:
        file = folder / f"a.{form}"
        first, *others = [Image.fromarray(np.full((9, 9), shade, np.uint8)) for shade in range(3)]
        first.save(file, save_all=True, append_images=others)
        return file

    return make


def compressed(name: str) -> Callable[[Path], Path]:
    """Return a maker of a compressed DICOM file, which a limited process decodes."""

    def make(folder: Path) -> Path:
        file = folder / "a.dcm"
        found = Path(pydicom.__file__).parent / "data" / "test_files" / f"{name}.dcm"
        file.write_bytes(found.read_bytes())
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
    Target("PNG with a palette", image("png", "P"), _image),
    Target("PNG with alpha", image("png", "RGBA"), _image),
    Target("JPEG CMYK", image("jpg", "CMYK"), _image),
    Target("TIFF CMYK", image("tif", "CMYK"), _image),
    Target("TIFF of 16 bits", image("tif", "I;16"), _image),
    Target("GIF", frames("gif"), refuse),
    *(
        Target(f"dicom {name}", compressed(file), _image)
        for name, file in (
            ("RLE", "MR_small_RLE"),
            ("JPEG 2000", "MR_small_jp2klossless"),
            ("JPEG-LS", "MR_small_jpeg_ls_lossless"),
        )
    ),
    *(Target(name, make, _volume) for name, make in FORMATS.items()),
    Target("npz", npz, _volume),
]
PART = Part(
    "media",
    "Mutated images and volumes",
    partial(prepare, TARGETS),
    partial(mutation_cases, TARGETS),
    2000,
)
