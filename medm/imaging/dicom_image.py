"""DICOM files that hold one image."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from medm.errors import MediaError, MediaSizeError
from medm.imaging.decoded_image import DecodedImage
from medm.imaging.dicom import Header, read_header, warn_not_applied
from medm.imaging.dicom_pixels import read_pixels
from medm.limits import MAX_PIXELS


def read_image_header(file: Path, name: str) -> Header:
    """Return the header of a file that holds one image.

    Raises:
        MediaError: as `read_header`, or the file holds several frames or no image.
    """
    header = read_header(file, name)
    if header is None:
        raise MediaError(
            f"{name}: a DICOM file without an image (a structure set, report or directory)"
        )
    if header.frames > 1:
        raise MediaError(
            f"{name}: holds {header.frames} frames where one image is expected; give it as a volume"
        )
    if header.rows * header.columns > MAX_PIXELS:
        raise MediaSizeError(
            f"{name}: {header.columns} x {header.rows} pixels are more than the {MAX_PIXELS} that "
            "are allowed"
        )
    return header


def read_dicom_image(file: Path | BinaryIO, name: str) -> DecodedImage:
    """A single-frame DICOM file as a `DecodedImage`, with the window that the file declares.

    Raises:
        MediaError: as `read_header`, or the file holds several frames or no image.
    """
    if not isinstance(file, Path):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "image.dcm"
            with path.open("wb") as copy:
                shutil.copyfileobj(file, copy)
            return read_dicom_image(path, name)
    header = read_image_header(file, name)
    warn_not_applied(header)
    pixels = read_pixels(header)
    values, padding = pixels.values[0], None if pixels.padding is None else pixels.padding[0]
    if header.samples == 3:
        return DecodedImage(values, name)
    plain = (
        header.rescale in (None, (1.0, 0.0))
        and header.window is None
        and header.table is None
        and header.voi is None
    )
    if plain and header.bits_stored == 8 and not header.signed:
        shades = values.astype(np.uint8)
        shades = 255 - shades if header.inverted else shades
        return DecodedImage(
            shades if padding is None else np.where(padding, np.uint8(0), shades), name
        )
    return DecodedImage(
        values,
        name,
        window=header.window,
        full_range=header.value_range,
        inverted=header.inverted,
        voi=header.voi,
        padding=padding,
    )
