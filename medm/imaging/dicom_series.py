"""DICOM slices or frames to one volume: selection, sorting, checks for gaps, duplicates and
tilt.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from medm.errors import GeometryError, MediaError
from medm.imaging.arrays import compact
from medm.imaging.dicom import MAX_FRAMES, Header, Plane, is_dicom, read_header, warn_not_applied
from medm.imaging.dicom_pixels import read_pixels
from medm.imaging.folders import refuse_lost_slice, report_skipped
from medm.imaging.geometry import Geometry, check_size, geometry_from_steps
from medm.imaging.notices import warn_of_file

logger = logging.getLogger(__name__)

_GAP_TOLERANCE = 0.1
"""Largest deviation of a slice distance from the usual one, as a fraction of it."""


def read_dicom_file(path: Path, name: str) -> tuple[np.ndarray, Geometry, Header]:
    """A multi-frame file as voxels (z, y, x). Raises `MediaError`, also for a single slice."""
    header = _multi_frame_header(path, name)
    order, geometry = _frame_order(header, name)
    return _read_frames(header, order), geometry, header


def check_dicom_file(path: Path, name: str) -> None:
    """Check all of a multi-frame file but its pixels. Raises `MediaError` as `read_dicom_file`."""
    _frame_order(_multi_frame_header(path, name), name)


def _multi_frame_header(path: Path, name: str) -> Header:
    header = read_header(path, name)
    if header is None:
        raise MediaError(
            f"{name}: a DICOM file without an image (a structure set, report or directory)"
        )
    if header.frames == 1:
        raise MediaError(
            f"{name}: one DICOM slice, not a volume; give the folder of its series, or give it as "
            "an image"
        )
    return header


def read_dicom_folder(
    folder: Path, name: str, *, series: str | None, several: Literal["only", "largest"]
) -> tuple[np.ndarray, Geometry, Header]:
    """One series of a folder (and the folders in it) as voxels (z, y, x).

    Args:
        folder: holds DICOM files under any names. Other files and DICOM without images are skipped,
            named and counted; a file that could be a slice and is not DICOM is refused.
        name: the folder, for messages.
        series: SeriesNumber or SeriesInstanceUID of the wanted one.
        several: what to do when there are several and none is named.

    Raises:
        MediaError: no image, no or no single series that fits, or slices that do not form a volume.
    """
    chosen, order, geometry = _series(folder, name, series=series, several=several)
    if chosen[0].frames > 1:
        return _read_frames(chosen[0], order), geometry, chosen[0]
    return _read_slices(chosen, order), geometry, chosen[0]


def check_dicom_folder(
    folder: Path, name: str, *, series: str | None, several: Literal["only", "largest"]
) -> None:
    """Check everything of a folder's series but its pixels: headers alone are read, each once.

    Raises:
        MediaError: as `read_dicom_folder`.
    """
    _series(folder, name, series=series, several=several)


def select_series(
    path: Path, name: str, *, series: str | None, several: Literal["only", "largest"]
) -> tuple[list[Header], list[int], Geometry]:
    """Return headers, order of the slices or frames, and geometry of a volume, without its pixels.

    Args:
        path: a folder as in `read_dicom_folder`, or a multi-frame file.
        name: the folder or file, for messages.
        series: SeriesNumber or SeriesInstanceUID of the wanted one of a folder.
        several: what to do when a folder has several and none is named.

    Returns:
        One header a slice in the order of the folder, or one of all frames; index of the slice or
        frame at each place along the normal; geometry of the sorted stack.

    Raises:
        MediaError: as `read_dicom_folder` and `read_dicom_file`.
    """
    if path.is_dir():
        return _series(path, name, series=series, several=several)
    header = _multi_frame_header(path, name)
    return [header], *_frame_order(header, name)


def _series(
    folder: Path, name: str, *, series: str | None, several: Literal["only", "largest"]
) -> tuple[list[Header], list[int], Geometry]:
    """Return the headers of the selected series, the order of its slices, and the geometry."""
    headers, others = _headers(folder, name)
    if not headers:
        raise MediaError(
            f"{name}: {others} DICOM files, none with an image (structure sets, reports or "
            "directories)"
        )
    groups: dict[str, list[Header]] = {}
    for header in headers:
        groups.setdefault(header.series_uid, []).append(header)
    chosen = _choose(list(groups.items()), name, series=series, several=several)
    return chosen, *arrange_series(chosen, name)


def arrange_series(headers: list[Header], name: str) -> tuple[list[int], Geometry]:
    """Return the order of the slices or frames of one series, and the geometry of the sorted stack.

    Args:
        headers: of all files of the series: slices, or one file of several frames.
        name: of the series, for messages.

    Raises:
        MediaError: they form no volume.
    """
    if any(header.frames > 1 for header in headers):
        if len(headers) > 1:
            raise MediaError(
                f"{name}: the series has {len(headers)} files of several frames; name one file "
                "instead"
            )
        return _frame_order(headers[0], name)
    return _slice_order(headers, name)


def _headers(folder: Path, name: str) -> tuple[list[Header], int]:
    """Return the headers of all images in a folder, and the number of other DICOM files."""
    headers: list[Header] = []
    without_image: list[Path] = []
    foreign: list[Path] = []
    count = 0
    root = os.path.realpath(folder)
    for place, _, files in os.walk(folder):
        for file in sorted(files):
            count += 1
            if count > MAX_FRAMES:
                raise MediaError(
                    f"{name}: more than {MAX_FRAMES} files in one folder; give the folder of one "
                    "study"
                )
            path = Path(place) / file
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
                raise MediaError(
                    f"{name}: {file} is a link out of the folder; copy the slices into it"
                )
            if not is_dicom(path):
                foreign.append(path)
            elif (header := read_header(path)) is not None:
                headers.append(header)
            else:
                without_image.append(path)
    suffixes = frozenset(header.path.suffix.lower() for header in headers) - {""}
    for path in foreign:
        refuse_lost_slice(path, name, expected="DICOM", suffixes=suffixes)
    report_skipped(name, foreign, expected="DICOM")
    if without_image:
        logger.info(
            "%s: skipped DICOM without an image (%d; structure sets, reports or directories): %s",
            name,
            len(without_image),
            ", ".join(path.name for path in without_image[:10]),
        )
    return headers, len(without_image)


def _choose(
    groups: list[tuple[str, list[Header]]],
    name: str,
    *,
    series: str | None,
    several: Literal["only", "largest"],
) -> list[Header]:
    if series is not None:
        fitting = [found for uid, found in groups if series in (uid, str(found[0].series_number))]
    elif several == "largest":
        most = max(_slices(found) for _, found in groups)
        fitting = [found for _, found in groups if _slices(found) == most]
    else:
        fitting = [found for _, found in groups]
    if len(fitting) == 1:
        return fitting[0]
    listing = "; ".join(
        f"SeriesNumber {found[0].series_number or 'missing'}: {_slices(found)} slices "
        f"{found[0].rows} x {found[0].columns} {found[0].modality}"
        for _, found in groups
    )
    wanted = (
        "the series asked for is not among them" if not fitting else f"{len(fitting)} series fit"
    )
    raise MediaError(
        f"{name}: {wanted}; name one in the record as 'folder#SeriesNumber', or read the largest: "
        "model.branches.volume.preprocess.series: largest in the recipe, series=largest for "
        f"'medm data preview'. Found: {listing}"
    )


def _slices(found: Sequence[Header]) -> int:
    return sum(header.frames for header in found)


def _slice_order(headers: list[Header], name: str) -> tuple[list[int], Geometry]:
    sizes = {(header.rows, header.columns, header.samples) for header in headers}
    if len(sizes) > 1:
        raise GeometryError(
            f"{name}: the series mixes slices of {len(sizes)} sizes (rows, columns, samples): "
            f"{sorted(sizes)}"
        )
    _check_gray(headers[0], name)
    _check_transforms(headers, name)
    check_size((len(headers), headers[0].rows, headers[0].columns), 4, name)
    planes = [header.planes[0] for header in headers if header.planes]
    if len(planes) < len(headers):
        raise GeometryError(
            f"{name}: {len(headers) - len(planes)} of {len(headers)} slices lack "
            "ImagePositionPatient, ImageOrientationPatient or PixelSpacing; their order in the "
            "body is unknown"
        )
    return arrange(planes, name)


def _frame_order(header: Header, name: str) -> tuple[list[int], Geometry]:
    _check_gray(header, name)
    check_size((header.frames, header.rows, header.columns), 4, name)
    if not header.planes:
        raise GeometryError(
            f"{name}: {header.frames} frames without positions (a film over time?); a volume "
            "needs a position for each"
        )
    return arrange(header.planes, name)


def _read_slices(headers: list[Header], order: list[int]) -> np.ndarray:
    for header in headers:
        warn_not_applied(header)
    slices = [read_pixels(headers[index]) for index in order]
    voxels = np.stack([compact(pixels.values[0]) for pixels in slices])
    if all(pixels.padding is None for pixels in slices):
        return voxels
    none = np.zeros(voxels.shape[1:], dtype=bool)
    return _filled(voxels, np.stack([none if p.padding is None else p.padding[0] for p in slices]))


def _read_frames(header: Header, order: list[int]) -> np.ndarray:
    warn_not_applied(header)
    pixels = read_pixels(header)
    voxels = compact(pixels.values)
    return (voxels if pixels.padding is None else _filled(voxels, pixels.padding))[order]


def _filled(voxels: np.ndarray, padding: np.ndarray) -> np.ndarray:
    """Set voxels outside the image (Pixel Padding Value) to the darkest value inside."""
    return np.where(padding, voxels[~padding].min(), voxels)


def _check_gray(header: Header, name: str) -> None:
    if header.samples != 1:
        raise MediaError(f"{name}: the slices are in color; expected one number a voxel")
    if header.inverted and not header.hounsfield:
        warn_of_file(
            logger,
            kind="inverted",
            file=name,
            message=f"{name}: MONOCHROME1 slices, which a viewer shows inverted; the volume keeps "
            "their values",
        )


def _check_transforms(headers: list[Header], name: str) -> None:
    """Refuse a series with a modality transform in some slices only: values must compare."""
    tables = sum(header.table is not None for header in headers)
    if 0 < tables < len(headers):
        raise MediaError(
            f"{name}: {tables} of {len(headers)} slices of the series have a Modality LUT "
            "Sequence (0028,3000)"
        )
    bare = sum(header.rescale is None for header in headers)
    changed = any(header.rescale not in (None, (1.0, 0.0)) for header in headers)
    if len({header.hounsfield for header in headers}) > 1 or (bare and changed):
        raise MediaError(
            f"{name}: some slices of the series have RescaleSlope and RescaleIntercept, others "
            "have not"
        )


def arrange(planes: Sequence[Plane], name: str) -> tuple[list[int], Geometry]:
    """Return the order of slices along their normal, and the geometry of the sorted stack.

    Raises:
        GeometryError: different orientations or pixel sizes, two slices at one place, gaps, uneven
            distances, a tilt.
    """
    first = planes[0]
    for plane in planes:
        if not (
            np.allclose(plane.across, first.across, atol=1e-3)
            and np.allclose(plane.down, first.down, atol=1e-3)
        ):
            raise GeometryError(
                f"{name}: the slices have different orientations (a scout among them?)"
            )
        if not np.allclose(plane.spacing, first.spacing, rtol=1e-3):
            raise GeometryError(f"{name}: the slices have different PixelSpacing")
    normal = np.cross(first.across, first.down)
    if abs(np.linalg.norm(normal) - 1) > 1e-2:
        raise GeometryError(
            f"{name}: DICOM ImageOrientationPatient is singular: not two unit vectors at a right "
            "angle"
        )
    positions = np.stack([plane.position for plane in planes])
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    _check_distances(np.diff(along[order]), name)

    travel = positions[order[-1]] - positions[order[0]]
    depth = float(along[order[-1]] - along[order[0]])
    offsets = positions[order] - positions[order[0]]
    sideways = offsets - np.outer(offsets @ normal, normal)
    drift = float(np.linalg.norm(sideways, axis=1).max())
    if drift > 0.5 * min(first.spacing):
        angle = np.degrees(np.arctan2(np.linalg.norm(travel - depth * normal), depth))
        raise GeometryError(
            f"{name}: the slices shift sideways by {drift:.1f} mm (gantry tilt of {angle:.1f} "
            "degrees?); resample to a right-angled grid first"
        )
    steps = np.stack(
        [
            first.across * first.spacing[1],
            first.down * first.spacing[0],
            normal * depth / (len(planes) - 1),
        ],
        axis=1,
    )
    return [int(index) for index in order], geometry_from_steps(steps, positions[order[0]], name)


def _check_distances(distances: np.ndarray, name: str) -> None:
    usual = float(np.median(distances))
    doubles = int((distances < 0.01).sum())
    if doubles:
        raise GeometryError(
            f"{name}: {doubles} slices lie where another lies (duplicates, or several phases in "
            "one series)"
        )
    gaps = distances[distances > (1 + _GAP_TOLERANCE) * usual]
    if len(gaps) and float(gaps.max()) > 1.5 * usual:
        missing = int(np.round(gaps / usual - 1).sum())
        raise GeometryError(
            f"{name}: about {missing} slice{' is' if missing == 1 else 's are'} missing: "
            f"distances of {usual:.2f} mm, but up to {gaps.max():.2f}"
        )
    if np.abs(distances - usual).max() > _GAP_TOLERANCE * usual:
        raise GeometryError(
            f"{name}: distances between slices are uneven, {distances.min():.2f} to "
            f"{distances.max():.2f} mm; resample to an even grid first"
        )
