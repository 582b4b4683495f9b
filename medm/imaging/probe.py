"""A look at a file without preparing it: is it there, is its header whole, can it be decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from medm.errors import MediaError


def probe(path: Path, *, kind: Literal["image", "volume"], decode: bool = False) -> None:
    """Look at one image or volume.

    Args:
        path: the file, or the folder of a DICOM series.
        kind: what it should be.
        decode: read all of it; otherwise an image's header, and whether a volume's file holds anything.

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

        read_volume(path, several="largest")
    elif path.is_file() and path.stat().st_size == 0:
        raise MediaError(f"{path}: the file is empty")
