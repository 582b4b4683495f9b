"""3-D volumes: NIfTI, NRRD, MetaImage, DICOM, NPY, NPZ and stacks of slices, by one reader.

A volume comes with what its file says of unit, spacing and direction, and no other field of the
header. Nothing is repaired or guessed: missing fields are None, impossible fields are refused.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from medm.errors import MediaError
from medm.imaging.arrays import check_npy, check_npz, compact, read_npy, read_npz
from medm.imaging.constant import refuse_lost_values
from medm.imaging.dicom_bare import is_dicom_head
from medm.imaging.geometry import Geometry, check_size
from medm.imaging.paths import split_series
from medm.imaging.payload import open_binary
from medm.limits import MAX_BYTES, MAX_VOXELS


@dataclass(frozen=True, slots=True)
class Volume:
    """Voxels and their geometry."""

    voxels: np.ndarray
    """(D, H, W) int16 or float32, all finite."""
    name: str
    """The file, for messages."""
    unit: Literal["HU", "raw"] = "raw"
    """"HU" if the file proves it (CT in DICOM with its rescale); other formats cannot."""
    geometry: Geometry | None = None
    """Spacing, direction and origin in array-axis order; None if the file has no direction."""
    modality: str | None = None
    """DICOM modality, where there is one."""
    held: int | None = None
    """Bytes of the file on the disk; None for a folder, and for an array in memory."""


def read_volume(
    path: str | Path | np.ndarray,
    *,
    series: str | None = None,
    several: Literal["only", "largest"] = "only",
) -> Volume:
    """Read one volume.

    Args:
        path: a file, or a folder of DICOM or of numbered slices. "folder#3" names the DICOM series
            with SeriesNumber 3; or an array (D, H, W), as a .npy file holds it.
        series: the same as an argument: a SeriesNumber or SeriesInstanceUID.
        several: what to do with a DICOM folder of several series when none is named.

    Raises:
        MediaError: missing, truncated, damaged, too large, not three-dimensional, not finite, or of
            an unknown format.
    """
    if isinstance(path, np.ndarray):
        if path.dtype.kind not in "biuf" or path.dtype.itemsize > 8:
            raise MediaError(f"volume: expected an array of numbers, found {path.dtype}")
        return Volume(_checked(_three_axes(path, "volume"), "volume"), "volume")
    path = Path(path)
    if series is None:
        path, series = split_series(path)
    name = str(path)
    if not path.exists():
        raise MediaError(f"{name}: no such file or folder")
    try:
        volume = (
            _read_folder(path, name, series, several) if path.is_dir() else _read_file(path, name)
        )
    except OSError as error:
        error.filename = error.filename or name  # errors of reads have none
        raise
    voxels = _checked(volume.voxels, name)
    held = None if path.is_dir() else path.stat().st_size
    return Volume(voxels, name, volume.unit, volume.geometry, volume.modality, held)


def check_volume(
    path: Path, *, series: str | None = None, several: Literal["only", "largest"] = "only"
) -> tuple[int, ...] | None:
    """Check a volume by its headers and names: form, size, slices, positions. No voxel is decoded.

    Args:
        path: a file or folder, as in `read_volume`.
        series: a SeriesNumber or SeriesInstanceUID.
        several: what will be done with a DICOM folder of several series when none is named.

    Returns:
        The size (D, H, W) that the header of a file declares; None for DICOM and for folders.

    Raises:
        MediaError: as `read_volume`, except for damage of the voxels themselves.
    """
    path = Path(path)
    if series is None:
        path, series = split_series(path)
    name = str(path)
    if not path.exists():
        raise MediaError(f"{name}: no such file or folder")
    if path.is_dir():
        _check_folder(path, name, series, several)
        return None
    return _check_file(path, name)


def _check_folder(
    path: Path, name: str, series: str | None, several: Literal["only", "largest"]
) -> None:
    if not any(path.iterdir()):
        raise MediaError(f"{name}: the folder is empty; expected DICOM files or slices")
    if _holds_dicom(path):
        from medm.imaging.dicom_series import check_dicom_folder

        check_dicom_folder(path, name, series=series, several=several)
    else:
        from medm.imaging.slices import check_slices

        check_slices(path, name)


def _check_file(path: Path, name: str) -> tuple[int, ...] | None:
    kind = _format(path, name)
    if kind == "nifti":
        from medm.imaging.nifti import check_nifti

        return check_nifti(path, name)
    if kind == "nrrd":
        from medm.imaging.nrrd import NRRD

        return NRRD.check(path, name)
    if kind == "metaimage":
        from medm.imaging.metaimage import METAIMAGE

        return METAIMAGE.check(path, name)
    if kind == "dicom":
        from medm.imaging.dicom_series import check_dicom_file

        check_dicom_file(path, name)
        return None
    limits = {"max_items": MAX_VOXELS, "max_bytes": MAX_BYTES}
    if kind == "npz":
        shape, dtype = check_npz(path, name, **limits)
    else:
        with open_binary(path, name) as stream:
            length = os.fstat(stream.fileno()).st_size
            shape, dtype = check_npy(stream, name, length=length, **limits)
    shape = shape[1:] if len(shape) == 4 and shape[0] == 1 else shape
    check_size(shape, dtype.itemsize, name)
    return shape


def _holds_dicom(path: Path) -> bool:
    from medm.imaging.dicom import is_dicom

    return any(is_dicom(Path(place) / file) for place, _, files in os.walk(path) for file in files)


def _read_folder(
    path: Path, name: str, series: str | None, several: Literal["only", "largest"]
) -> Volume:
    if _holds_dicom(path):
        from medm.imaging.dicom_series import read_dicom_folder

        voxels, geometry, header = read_dicom_folder(path, name, series=series, several=several)
        return Volume(voxels, name, "HU" if header.hounsfield else "raw", geometry, header.modality)
    from medm.imaging.slices import read_slices

    return Volume(read_slices(path, name), name)


def _format(path: Path, name: str) -> Literal["nifti", "nrrd", "metaimage", "dicom", "npy", "npz"]:
    """Return the format of a file by suffix or first bytes. Raises `MediaError` for others."""
    if not path.is_file():
        raise MediaError(f"{name}: expected a file or folder, found a device or pipe")
    with open_binary(path, name) as stream:
        head = stream.read(352)
    if not head:
        raise MediaError(f"{name}: the file is empty")
    lower = path.name.lower()
    if lower.endswith((".nii", ".nii.gz", ".hdr", ".img")):
        return "nifti"
    if head.startswith(b"NRRD"):
        return "nrrd"
    if lower.endswith((".mha", ".mhd")):
        return "metaimage"
    if is_dicom_head(head):
        return "dicom"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if lower.endswith(".npz"):
        return "npz"
    raise MediaError(
        f"{name}: not a volume that is read; expected NIfTI, NRRD, MHA, DICOM, NPY, NPZ, or a "
        "folder of DICOM or slices"
    )


def _read_file(path: Path, name: str) -> Volume:
    kind = _format(path, name)
    if kind == "nifti":
        from medm.imaging.nifti import read_nifti

        voxels, geometry = read_nifti(path, name)
        return Volume(voxels, name, geometry=geometry)
    if kind == "nrrd":
        from medm.imaging.nrrd import NRRD

        voxels, geometry = NRRD.read(path, name)
        return Volume(voxels, name, geometry=geometry)
    if kind == "metaimage":
        from medm.imaging.metaimage import METAIMAGE

        voxels, geometry = METAIMAGE.read(path, name)
        return Volume(voxels, name, geometry=geometry)
    if kind == "dicom":
        from medm.imaging.dicom_series import read_dicom_file

        voxels, geometry, scan = read_dicom_file(path, name)
        return Volume(voxels, name, "HU" if scan.hounsfield else "raw", geometry, scan.modality)
    if kind == "npy":
        with open_binary(path, name) as stream:
            array = read_npy(
                stream,
                name,
                max_items=MAX_VOXELS,
                max_bytes=MAX_BYTES,
                length=os.fstat(stream.fileno()).st_size,
            )
            return Volume(_three_axes(array, name), name)
    return Volume(
        _three_axes(read_npz(path, name, max_items=MAX_VOXELS, max_bytes=MAX_BYTES), name), name
    )


def _three_axes(array: np.ndarray, name: str) -> np.ndarray:
    """(D, H, W) as it is, (1, D, H, W) without its channel (M3D stores that)."""
    return array[0] if array.ndim == 4 and array.shape[0] == 1 else array


def _checked(voxels: np.ndarray, name: str) -> np.ndarray:
    """Return the voxels as int16 or float32; refuses what is not finite."""
    check_size(voxels.shape, voxels.dtype.itemsize, name)
    stored, voxels = voxels, np.ascontiguousarray(compact(voxels))
    if voxels.dtype.kind == "f":
        bad = sum(int(plane.size - np.isfinite(plane).sum()) for plane in voxels)
        if bad:
            raise MediaError(
                f"{name}: {bad} of {voxels.size} voxels are NaN or infinite; replace them or "
                "leave the file out"
            )
        refuse_lost_values(stored, voxels, name, "single precision")
    return voxels
