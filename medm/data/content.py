"""State and content of a path on disk, over all files that reading it depends on.

A path may be a file, a header with its voxels in a file beside it, or a folder of slices, perhaps
with the series that is meant ("folder#3"). Caches find their entries by these names.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from medm.errors import MediaError
from medm.imaging.dicom import MAX_FRAMES
from medm.imaging.paths import split_series


def identity(path: Path) -> str:
    """Return a hash of name, size and time of every file that is read.

    It changes when a file changes. No file is opened.

    Raises:
        MediaError: a file is missing, a folder holds too many or links out of itself, or something
            is not a regular file.
    """
    files, series = _parts(path)
    digest = hashlib.sha256(f"{os.path.realpath(path)}\0{series}".encode())
    for file in files:
        try:
            stat = file.stat()
        except OSError as error:
            raise MediaError(f"{file}: cannot be opened ({error.strerror})") from None
        digest.update(f"\0{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def content_hash(path: Path) -> str:
    """Return a hash of the content of all files: equal for copies and moved files.

    Raises:
        MediaError: as `identity`, or a file cannot be read.
    """
    files, series = _parts(path)
    digest = hashlib.sha256(series.encode())
    for file in files:
        try:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise MediaError(f"{file}: cannot be read ({error.strerror})") from None
        # Slices are put in order by their names, and a format is recognized by its suffix.
        digest.update(
            file.name.encode() if len(files) > 1 else "".join(file.suffixes).lower().encode()
        )
    return digest.hexdigest()


def total_size(path: Path) -> int:
    """Return the bytes of all files: different sizes are different contents. Raises `MediaError`
    as `identity`.
    """
    files, _ = _parts(path)
    try:
        return sum(file.stat().st_size for file in files)
    except OSError as error:
        raise MediaError(f"{path}: cannot be opened ({error.strerror})") from None


def _parts(path: Path) -> tuple[list[Path], str]:
    """Return the regular files of a path (all of a folder), and the series that it names."""
    path, named = split_series(path)
    series = named or ""
    if path.is_dir():
        return _files_in(path), series
    if not path.exists():
        raise MediaError(f"{path}: no such file or folder")
    if not path.is_file():
        raise MediaError(f"{path}: expected a file or folder, found a device or pipe")
    beside = _voxels_beside(path)
    return [path] if beside is None else [path, beside], series


def _files_in(folder: Path) -> list[Path]:
    """Return every regular file in a folder without opening any.

    Pipes and devices are left out, as the readers do.
    """
    root = os.path.realpath(folder)
    found: list[Path] = []
    count = 0
    for place, _, names in os.walk(folder):
        count += len(names)
        if count > MAX_FRAMES:
            raise MediaError(
                f"{folder}: more than {MAX_FRAMES} files in one folder; give the folder of one "
                "study"
            )
        for name in names:
            path = Path(place) / name
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
                raise MediaError(
                    f"{folder}: {name} is a link out of the folder; copy the slices into it"
                )
            if path.is_file():
                found.append(path)
    if not found:
        raise MediaError(f"{folder}: the folder holds no files; expected DICOM files or slices")
    return sorted(found)


def _voxels_beside(path: Path) -> Path | None:
    """Return the data file of a detached header; None for files that hold their own voxels."""
    suffix = path.suffix.lower()
    if suffix == ".mhd":
        from medm.imaging.metaimage import METAIMAGE

        return METAIMAGE.data_file(path, str(path))
    if suffix == ".nhdr":
        from medm.imaging.nrrd import NRRD

        return NRRD.data_file(path, str(path))
    return None
