"""Folder of numbered slice images (PNG, JPEG, TIFF, BMP, NPY) to one stack without geometry."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from medm.errors import MediaError
from medm.imaging.folders import is_system_file, refuse_lost_slice, report_skipped
from medm.imaging.geometry import check_size
from medm.imaging.images import check_image, read_image
from medm.imaging.payload import check_cost

_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".npy"}
_OTHER_IMAGES = {
    ".webp", ".gif", ".jp2", ".j2k", ".jpx", ".jxl", ".heic", ".heif", ".avif", ".pgm", ".ppm",
    ".pnm", ".exr",
    ".jpe", ".jfif", ".dib", ".apng",
}  # fmt: skip


def _numbered(folder: Path, name: str) -> list[tuple[int, Path]]:
    """Slice images and the last number in each name, in their order.

    Raises:
        MediaError: no images, names without numbers, a number twice or missing.
    """
    inside = sorted(folder.iterdir())
    files = [
        path
        for path in inside
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
    ]
    others = [path for path in inside if path not in set(files)]
    for path in others:
        if not path.is_dir():
            _refuse_lost_slice(path, name)
    if not files:
        found = f"; found {', '.join(path.name for path in others[:5])}" if others else ""
        raise MediaError(f"{name}: the folder holds neither DICOM files nor slice images{found}")
    report_skipped(name, others, expected="slice images")
    numbered: dict[int, Path] = {}
    for path in files:
        numbers = re.findall(r"\d+", path.stem)
        if not numbers:
            raise MediaError(
                f"{name}: {path.name} has no number in its name, so its place in the stack is "
                "unknown"
            )
        if int(numbers[-1]) in numbered:
            raise MediaError(f"{name}: slice {int(numbers[-1])} is there twice")
        numbered[int(numbers[-1])] = path
    order = sorted(numbered)
    if missing := order[-1] - order[0] + 1 - len(order):
        raise MediaError(
            f"{name}: {missing} slices are missing between numbers {order[0]} and {order[-1]}"
        )
    return [(number, numbered[number]) for number in order]


def check_slices(folder: Path, name: str) -> None:
    """Check the names and headers of all slices. Raises `MediaError` as `read_slices`."""
    sizes: dict[tuple[int, int], str] = {}
    for _, path in _numbered(folder, name):
        _require_inside(path)
        sizes.setdefault(check_image(path), path.name)
    if len(sizes) > 1:
        found = ", ".join(
            f"{file} is {height} x {width}" for (height, width), file in sorted(sizes.items())[:3]
        )
        raise MediaError(f"{name}: the slices have {len(sizes)} sizes: {found}")


def read_slices(folder: Path, name: str) -> np.ndarray:
    """Voxels (D, H, W), in the order of the last number in each file's name.

    Raises:
        MediaError: no images, names without numbers, a number twice or missing, different sizes or
            types, color.
    """
    files = _numbered(folder, name)
    start = files[0][0]
    first = _gray(files[0][1])
    check_size((len(files), *first.shape), first.dtype.itemsize, name)
    held = sum(path.stat().st_size for _, path in files)
    check_cost((len(files) * 2, *first.shape), first.dtype, held=held, name=name)
    slices = [first]
    for number, path in files[1:]:
        pixels = _gray(path)
        if pixels.shape != first.shape or pixels.dtype != first.dtype:
            raise MediaError(
                f"{name}: slice {number} is {pixels.shape} of {pixels.dtype}, "
                f"slice {start} is {first.shape} of {first.dtype}"
            )
        slices.append(pixels)
    return np.stack(slices)


def _refuse_lost_slice(path: Path, name: str) -> None:
    """Refuse an image of another format beside the slices: a stack without it would be shorter."""
    if is_system_file(path):
        return
    if path.suffix.lower() in _OTHER_IMAGES and re.search(r"\d", path.stem):
        raise MediaError(
            f"{name}: {path.name} could be a slice, but {path.suffix} is not read; convert it, or "
            "move it out"
        )
    refuse_lost_slice(path, name, expected="an image that is read")


def _require_inside(path: Path) -> None:
    if path.is_symlink() and Path(os.path.realpath(path)).parent != path.parent.resolve():
        raise MediaError(f"{path}: a link out of the folder; copy the slices into it")


def _gray(path: Path) -> np.ndarray:
    _require_inside(path)
    image = read_image(path)
    pixels = image.pixels
    if image.alpha is not None:
        raise MediaError(f"{path}: a slice with transparent pixels; expected opaque gray")
    if pixels.ndim == 3:
        if (pixels != pixels[..., :1]).any():
            raise MediaError(f"{path}: a slice in color; expected gray")
        pixels = pixels[..., 0]
    if image.inverted:
        if image.full_range is None:
            raise MediaError(
                f"{path}: a MinIsWhite slice of {pixels.dtype}, whose values cannot be inverted; "
                "store it as MinIsBlack"
            )
        pixels = (sum(image.full_range) - pixels.astype(np.float64)).astype(pixels.dtype)
    return pixels
