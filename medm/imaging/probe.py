"""A look at a file without preparing it: is it there, is its header whole, can it be decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from medm.errors import MediaError
from medm.imaging.paths import split_series


def probe(
    path: Path, *, kind: Literal["image", "volume"], decode: bool = False, series: Literal["only", "largest"] = "only"
) -> None:
    """Look at one image or volume.

    Args:
        path: the file, or the folder of a DICOM series.
        kind: what it should be.
        decode: read all of it; otherwise the header of an image or NIfTI file, and of the other formats of volumes
            only whether they hold anything.
        series: what will be done with a DICOM folder of several, as in `VolumePreprocess`.

    Raises:
        MediaError: it is missing, empty, damaged or of no known format.
    """
    if kind == "image":
        from medm.imaging.images import check_image, read_image

        if decode:
            read_image(path)
        else:
            check_image(path)
    elif decode:
        from medm.imaging.volumes import read_volume

        read_volume(path, several=series)
    else:
        _check_volume(path)


def _check_volume(path: Path) -> None:
    path, _ = split_series(path)
    if not path.exists():
        raise MediaError(f"{path}: no such file or folder")
    if path.is_dir():
        if not any(path.iterdir()):
            raise MediaError(f"{path}: the folder is empty; expected DICOM files or slices")
    elif not path.is_file():
        raise MediaError(f"{path}: expected a file or folder, found a device or pipe")
    elif path.stat().st_size == 0:
        raise MediaError(f"{path}: the file is empty")
    elif path.name.lower().endswith((".nii", ".nii.gz")):
        from medm.imaging.nifti import check_nifti

        check_nifti(path, str(path))
