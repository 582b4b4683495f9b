"""A look at a file without preparing it: is it there, is its header whole, can it be decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from medm.errors import MediaError
from medm.imaging import Preprocess, load_pixels
from medm.imaging.constant import warn_if_constant
from medm.imaging.paths import split_series


def probe(
    path: Path,
    *,
    kind: Literal["image", "volume"],
    decode: bool = False,
    series: Literal["only", "largest"] = "only",
    preprocess: Preprocess | None = None,
) -> None:
    """Look at one image or volume.

    Args:
        path: the file, or the folder of a DICOM series.
        kind: what it should be.
        decode: read all of it; otherwise the header of an image or NIfTI file, and of the other formats of volumes
            only whether they hold anything.
        series: what will be done with a DICOM folder of several, as in `VolumePreprocess`.
        preprocess: with `decode`, also prepare the file as it will be, so that what preprocessing makes of it is known.

    Raises:
        MediaError: it is missing, empty, damaged or of no known format, or nothing of it is left after `preprocess`.
    """
    if decode and preprocess is not None:
        load_pixels(path, preprocess)
    elif kind == "image":
        from medm.imaging.images import check_image, read_image

        if decode:
            warn_if_constant(read_image(path).pixels, str(path), unit="pixel")
        else:
            check_image(path)
    elif decode:
        from medm.imaging.volumes import read_volume

        warn_if_constant(read_volume(path, several=series).voxels, str(path))
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
