"""Paths from annotation files: untrusted input that must stay inside the data root.

Records are often written on another operating system than the one that reads them. A name is
followed when it can mean one file only: backslashes as separators, another Unicode normalization
form. Anything else is refused, and the message says what differs.
"""

from __future__ import annotations

import functools
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.parse import unquote

from medm.errors import MediaError
from medm.types import Kind

_IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm", ".npy")
_DICOM = ".dcm"
_VOLUME_ENDINGS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".npy")

_URL = re.compile(r"^([a-z][a-z0-9+.-]*://|data:|file:)", re.IGNORECASE)
_DRIVE = re.compile(r"^[a-z]:", re.IGNORECASE)
_BASE64 = re.compile(
    r"(iVBORw0KGgo|/9j/|R0lGOD|UklGR|SUkqA|TU0AK|H4sI)[A-Za-z0-9+/\r\n]{50,}={0,2}\s*"
)
"""PNG, JPEG, GIF, WebP, TIFF or gzip as text."""
_MAX_UID = 64
"""Characters of the longest SeriesInstanceUID (DICOM PS3.5, 9.1)."""
_MAX_SHOWN = 160
"""Characters of a path that a message repeats."""
_MAX_LISTED = 100_000
"""Entries of the largest folder that is searched for a similar name."""
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")


class MissingFileError(MediaError):
    """Error for a record that names a file that does not exist under its root."""


def split_series(path: Path) -> tuple[Path, str | None]:
    """Split "folder#3" into the folder and its DICOM series: a SeriesNumber or SeriesInstanceUID.

    A path without a mark, and one that exists as written, comes back whole, with None.
    """
    name, mark, series = path.name.rpartition("#")
    marked = bool(mark) and name not in ("", ".", "..") and 0 < len(series) <= _MAX_UID
    if not marked or os.path.lexists(path):
        return path, None
    return path.with_name(name), series


def files_below(folder: Path, media: Kind) -> list[Path]:
    """Return the images or volumes at any depth of a folder, in the order of their paths."""
    endings = _IMAGE_ENDINGS if media == "image" else _VOLUME_ENDINGS
    found = (path for path in folder.rglob("*") if path.name.lower().endswith(endings))
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def media_below(folder: Path, kinds: Collection[str]) -> Iterator[tuple[str, Kind]]:
    """Yield every image and volume at any depth of a folder: its path in the folder, its kind.

    A folder with several DICOM files, other than the given one, is a volume where volumes are
    wanted; other images in it stay images. Where only images are wanted, each DICOM file is one.

    Args:
        folder: is searched.
        kinds: what is wanted. A .npy file, which may be either, is an image where `kinds` has it.
    """
    images, volumes = files_below(folder, "image"), files_below(folder, "volume")
    arrays = {path for path in images if path.suffix.lower() == ".npy"}
    dicom = [path for path in images if path.suffix.lower() == _DICOM]
    per_folder = Counter(path.parent for path in dicom)
    series = {path for path, count in per_folder.items() if count > 1 and path != folder}
    if "volume" not in kinds:
        series = set()
    in_series = {path for path in dicom if path.parent in series}
    images = [path for path in images if path not in in_series]
    if arrays:
        as_volumes = "image" not in kinds
        images = [path for path in images if not (as_volumes and path in arrays)]
        volumes = [path for path in volumes if as_volumes or path not in arrays]
    pairs: list[tuple[Path, Kind]] = [(path, "image") for path in images]
    pairs += [(path, "volume") for path in (*volumes, *series)]
    for path, kind in sorted(pairs):
        yield path.relative_to(folder).as_posix(), kind


def resolve_inside(root: Path, relative: str) -> Path:
    """Return the file or DICOM folder that a record names, verified to lie inside `root`.

    The name is taken as written where such a file exists. Otherwise backslashes are read as
    separators, and each part in either Unicode normalization form (NFC, NFD), if exactly one of
    them exists. Capital letters are never exchanged: `a.png` and `A.png` may be two patients.

    A last part "folder#3" names the series with SeriesNumber 3 of a DICOM folder; the mark is kept
    in the result.

    Raises:
        MissingFileError: no such file; the message names a similar one and what differs.
        MediaError: an absolute path, "..", a URL, control characters, a link that leaves the root,
            or something that is neither a file nor a folder (a device, a pipe).
    """
    shown = _shown(relative)
    _require_relative(root, relative, shown)
    base = Path(root).resolve()
    root = base if str(root) == "." else root  # "." is meaningless in a message read elsewhere
    try:
        target, series = _find(base, relative)
        real = target.resolve(strict=True)
        mode = real.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(
            f"{shown}: no such file under the data root {root}{_hint(base, relative)}"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise MediaError(
            f"{shown}: cannot be opened under the data root {root} ({_cause(error)})"
        ) from None
    if not real.is_relative_to(base):
        above = os.path.commonpath([base, real])
        raise MediaError(
            f"{shown}: a link leads out of the data root {root}; copy the file into it, or set "
            f"root to the folder above both{'' if above == '/' else f' ({above})'} and write the "
            "paths relative to that"
        )
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise MediaError(f"{shown}: expected a file or a folder, found a device, pipe or socket")
    return real if series is None else real.with_name(f"{real.name}#{series}")


def _require_relative(root: Path, relative: str, shown: str) -> None:
    """Raise `MediaError` for a name that is no relative path, before the file system is asked."""
    if re.match(r"data:", relative, re.IGNORECASE) or _BASE64.fullmatch(relative):
        raise MediaError(
            f"{shown}: an image as base64 text is not read, and URLs are not opened; write the "
            "image to a file and give its path under the data root"
        )
    if not relative or any(ord(character) < 32 or ord(character) == 127 for character in relative):
        raise MediaError(f"{shown}: expected a file name without control characters")
    if relative.lower().startswith("file:"):
        raise MediaError(
            f"{shown}: URLs are not opened; give the path relative to the data root, without "
            "'file:'"
        )
    if _URL.match(relative):
        raise MediaError(
            f"{shown}: URLs are not opened; download the file and give its path under the data root"
        )
    windows = PureWindowsPath(relative)
    if PurePosixPath(relative).is_absolute() or windows.is_absolute():
        # Compared as text: nothing outside the root is looked up.
        inside = PurePosixPath(relative)
        known = inside.is_relative_to(root) and ".." not in inside.parts
        advice = (
            f"write {str(inside.relative_to(root))!r}"
            if known
            else "give the path relative to the data root"
        )
        raise MediaError(f"{shown}: absolute paths are refused; {advice}")
    if ".." in PurePosixPath(relative).parts or ".." in windows.parts:
        raise MediaError(f"{shown}: '..' is refused; every file must lie inside the data root")


def _find(base: Path, relative: str) -> tuple[Path, str | None]:
    """Return the file that a name means, and its DICOM series. Raises `FileNotFoundError`."""
    for parts in _readings(relative):
        exact = base.joinpath(*parts)
        if os.path.lexists(exact):
            return exact, None
        plain, series = split_series(exact)
        for path, mark in ((exact, None), (plain, series)):
            found = _in_any_form(base, path.relative_to(base).parts)
            if found is not None:
                return found, mark
    base.joinpath(relative).stat()  # raises the reason
    raise FileNotFoundError(relative)


def _readings(relative: str) -> Iterator[tuple[str, ...]]:
    """Return the parts of a path as this system reads it, then as Windows does."""
    yield PurePosixPath(relative).parts
    windows = PureWindowsPath(relative)
    if "\\" in relative and not windows.anchor:
        yield windows.parts


def _in_any_form(base: Path, parts: tuple[str, ...]) -> Path | None:
    """Return the one path that exists in some Unicode normalization form; None if none or two."""
    path = base
    for part in parts:
        exact = path / part
        if not os.path.lexists(exact):
            forms = {unicodedata.normalize(form, part) for form in ("NFC", "NFD")}
            found = [path / form for form in sorted(forms) if os.path.lexists(path / form)]
            if len(found) != 1:
                return None
            exact = found[0]
        path = exact
    return path


def _hint(base: Path, relative: str) -> str:
    """Describe what exists instead, for the message about a missing file."""
    windows = PureWindowsPath(relative)
    if windows.anchor:
        return (
            "; it starts as an absolute path of Windows does: give the path relative to the data "
            "root"
        )
    if relative.startswith("~"):
        return "; '~' is not expanded: give the path relative to the data root"
    path, parts = base, windows.parts if "\\" in relative else PurePosixPath(relative).parts
    for position, part in enumerate(parts):
        if os.path.lexists(path / part):
            path /= part
            if not path.resolve().is_relative_to(base):  # files outside the root are not described
                return ""
            if path.is_symlink() and not path.exists():
                return (
                    "; it is a link to a file that does not exist (git-annex or DataLad content "
                    "not fetched yet?)"
                )
            if position < len(parts) - 1 and path.is_file():
                where = path.relative_to(base)
                packed = part.lower().endswith(_ARCHIVES)
                return f"; '{where}' is a file, not a folder{': unpack it' if packed else ''}"
            continue
        similar = _similar(path, part)
        names = ", ".join(repr(name) for name in similar[:3])
        if len(similar) > 1:
            return f"; {len(similar)} similar names are there ({names}): write one of them exactly"
        if similar:
            return f"; {names} is there, which differs in {_difference(part, similar[0])}"
        if position:
            return (
                f"; the folder '{path.relative_to(base)}' is there, and {part[:_MAX_SHOWN]!r} is "
                "not in it"
            )
        return "" if base.is_dir() else ", which does not exist itself"
    return ""


def _similar(folder: Path, name: str) -> list[str]:
    """Return names in a folder that differ only in what operating systems and programs change."""
    try:
        names = _names_by_key(folder, folder.stat().st_mtime_ns)
    except OSError:
        return []
    return names.get(_key(name), [])


@functools.lru_cache(maxsize=8)
def _names_by_key(folder: Path, _changed: int) -> dict[str, list[str]]:
    """Return names in a folder by `_key`, cached for further wrong paths; empty if too large."""
    names: dict[str, list[str]] = {}
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries):
            if count >= _MAX_LISTED:
                return {}
            names.setdefault(_key(entry.name), []).append(entry.name)
    return {key: sorted(found) for key, found in names.items()}


def _key(name: str) -> str:
    """Return a name without the differences that `_difference` describes."""
    return _trimmed(unicodedata.normalize("NFKC", unquote(name))).casefold()


def _trimmed(name: str) -> str:
    """Strip spaces and trailing full stops: Windows drops them, and tables often add spaces."""
    return name.strip().rstrip(". ")


def _difference(wanted: str, found: str) -> str:
    """Describe the difference between two names with the same `_key`."""
    steps = {
        "percent-encoding": unquote,
        "its Unicode characters (composed, decomposed or look-alike)": lambda name: (
            unicodedata.normalize("NFKC", name)
        ),
        "spaces or full stops at its ends": _trimmed,
        "capital letters": str.casefold,
    }

    def same_without(left_out: str) -> bool:
        names = [wanted, found]
        for words, step in steps.items():
            names = [step(name) if words != left_out else name for name in names]
        return names[0] == names[1]

    return " and ".join(words for words in steps if not same_without(words)) or "several ways"


def _shown(relative: str) -> str:
    return repr(relative) if len(relative) <= _MAX_SHOWN else f"{relative[:_MAX_SHOWN]!r}..."


def _cause(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
