"""Paths from annotation files: they come from strangers and must stay inside the data root."""

from __future__ import annotations

import re
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath

from medm.errors import MediaError

_URL = re.compile(r"^([a-z][a-z0-9+.-]*://|data:|file:)", re.IGNORECASE)


def resolve_inside(root: Path, relative: str) -> Path:
    """The file or folder (a DICOM series) that a record names, proven to lie inside `root`.

    A last part "folder#3" names the series with SeriesNumber 3 of a DICOM folder; the mark is kept in the result.

    Raises:
        MediaError: an absolute path, "..", a URL, control characters, a link that leaves the root, a missing file, or
            something that is neither a file nor a folder (a device, a pipe).
    """
    if not relative or any(ord(character) < 32 or ord(character) == 127 for character in relative):
        raise MediaError(f"{relative!r}: expected a file name without control characters")
    if _URL.match(relative):
        raise MediaError(f"{relative!r}: URLs are not opened; download the file and give its path under the data root")
    pure = PurePosixPath(relative)
    if pure.is_absolute() or PureWindowsPath(relative).is_absolute():
        raise MediaError(f"{relative!r}: absolute paths are refused; give the path relative to the data root")
    if ".." in pure.parts or ".." in PureWindowsPath(relative).parts:
        raise MediaError(f"{relative!r}: '..' is refused; every file must lie inside the data root")

    base = Path(root).resolve()
    target, mark = base / pure, ""
    if "#" in pure.name and not target.exists():
        name, _, series = pure.name.rpartition("#")
        target, mark = target.with_name(name) if name else target, f"#{series}"
    try:
        real = target.resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError:
        raise MediaError(f"{relative!r}: no such file under the data root {root}") from None
    except (OSError, RuntimeError) as error:
        raise MediaError(f"{relative!r}: cannot be opened under the data root {root} ({_cause(error)})") from None
    if not real.is_relative_to(base):
        raise MediaError(f"{relative!r}: a link leads out of the data root {root}; copy the file into it")
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise MediaError(f"{relative!r}: expected a file or a folder, found a device, pipe or socket")
    return real.with_name(real.name + mark) if mark else real


def _cause(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
