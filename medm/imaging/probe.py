"""Check of a file before it is used: its header and its place in a series, or all of it."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, Literal

from medm.errors import MediaError
from medm.imaging import ImagePreprocess, Preprocess, load_pixels
from medm.imaging.constant import warn_if_constant
from medm.imaging.marks import MarkedImage


def probe(
    path: Path | BinaryIO | MarkedImage,
    *,
    kind: Literal["image", "volume"],
    decode: bool = False,
    series: Literal["only", "largest"] = "only",
    preprocess: Preprocess | None = None,
) -> None:
    """Check one image or volume.

    Args:
        path: the file, or the folder of a DICOM series; or a seekable stream of an image, or an
            image and the regions that are drawn on it.
        kind: expected kind.
        decode: read all of it; otherwise only headers and file names, each once: enough to find a
            second series, missing or doubled slices, uneven spacing, a wrong format and most
            truncated files.
        series: what will be done with a DICOM folder of several, as in `VolumePreprocess`.
        preprocess: with `decode`, also prepare the file as it will be, so that what preprocessing
            makes of it is known.

    Raises:
        MediaError: it is missing, empty, damaged or of no known format, or nothing of it is left
            after `preprocess`.
    """
    if decode and preprocess is not None:
        load_pixels(path, preprocess)
        return
    if isinstance(path, MarkedImage):
        path.check()
        path = path.source
    if kind == "image":
        from medm.imaging.images import check_image, read_image

        if decode:
            name = str(path) if isinstance(path, Path) else "image"
            warn_if_constant(read_image(path).pixels, name, unit="pixel")
        else:
            check_image(path)
    elif not isinstance(path, Path):
        raise MediaError("a volume is read from a file, not from a stream")
    elif decode:
        from medm.imaging.volumes import read_volume

        warn_if_constant(read_volume(path, several=series).voxels, str(path))
    else:
        from medm.imaging.volumes import check_volume

        check_volume(path, several=series)


def count_items(file: Path | BinaryIO | MarkedImage, preprocess: ImagePreprocess) -> int:
    """Return the items that `prepare` makes of an image, from its header alone.

    Args:
        file: a path, or a seekable stream; or such an image and its regions.
        preprocess: says whether the image is cut into tiles.

    Raises:
        MediaError: the header cannot be read.
    """
    if preprocess.tiles is None:
        return 1
    from medm.imaging.images import check_image
    from medm.imaging.tiles import num_items

    file = file.source if isinstance(file, MarkedImage) else file
    if not isinstance(file, Path):
        file.seek(0)
    return num_items(preprocess, check_image(file))
