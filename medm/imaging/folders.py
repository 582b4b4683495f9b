"""Files of a folder, and reports of those that are not part of its volume: no slice is lost."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from medm.errors import MediaError
from medm.imaging.formats import describe_content
from medm.imaging.notices import warn_of_file

logger = logging.getLogger(__name__)

_NAMED = 10
"""Files that one message names."""
_SYSTEM_FILES = {"dicomdir", "thumbs.db", "desktop.ini", "ehthumbs.db", "autorun.inf", "icon\r"}
_SYSTEM_SUFFIXES = {
    ".txt", ".xml", ".json", ".jsonl", ".csv", ".tsv", ".html", ".htm", ".css", ".js", ".pdf",
    ".doc", ".docx", ".md",
    ".log", ".ini", ".inf", ".cfg", ".yaml", ".yml", ".exe", ".dll", ".jar", ".app", ".sh", ".bat",
    ".py", ".md5",
    ".sha256", ".lnk", ".url",
}  # fmt: skip
"""Of viewers, reports and tables that lie beside slices."""
_UNFINISHED = {".part", ".partial", ".crdownload", ".filepart", ".tmp", ".download"}
_DICOM_SUFFIXES = {".dcm", ".dicom", ".ima", ".dic"}


def regular_files(folder: Path) -> tuple[list[Path], int]:
    """Return the regular files at any depth, folder by folder, and the number of links.

    Links to files and folders are not followed: a link may lead out of the folder, and one file
    would be read twice.
    """
    found: list[Path] = []
    links = 0
    for place, folders, names in os.walk(folder):
        folders.sort()
        for path in (Path(place) / name for name in (*folders, *sorted(names))):
            if path.is_symlink():
                links += 1
            elif path.is_file():
                found.append(path)
    return found, links


def is_system_file(path: Path) -> bool:
    """Return true for files that are never a slice: hidden, system files, text, programs."""
    name = path.name.lower()
    return name.startswith(".") or name in _SYSTEM_FILES or path.suffix.lower() in _SYSTEM_SUFFIXES


def refuse_lost_slice(
    path: Path, name: str, *, expected: str, suffixes: frozenset[str] = frozenset()
) -> None:
    """Refuse a file that by its name could be a slice, and by its content is none.

    Args:
        path: a file, link or device that is not read as a slice.
        name: the folder, for messages.
        expected: what the slices are: "DICOM".
        suffixes: of files that are slices, besides DICOM's own.

    Raises:
        MediaError: the file could be a slice. The volume would be shorter than the folder.
    """
    if is_system_file(path):
        return
    own = [suffix.lower() for suffix in path.suffixes]
    named = (
        not own
        or own[-1][1:].isdigit()
        or bool({*own} & (_DICOM_SUFFIXES | _UNFINISHED | suffixes))
    )
    if not named:
        return
    if not path.is_file():
        if path.is_symlink() and any(character.isdigit() for character in path.name):
            raise MediaError(
                f"{name}: {path.name} could be a slice, but is a link to a file that is missing; "
                "fetch the file, or remove the link"
            )
        return
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
            if head and _is_text(head) and not own:
                return  # README, LICENSE, VERSION
            what = describe_content(head[:132], stream, "") if head else "an empty file"
    except OSError as error:
        raise MediaError(
            f"{name}: {path.name} could be a slice, but cannot be opened ({error.strerror})"
        ) from None
    raise MediaError(
        f"{name}: {path.name} could be a slice, but is not {expected} ({what}); "
        "the volume would lack it. Repair the file, or move it out of the folder"
    )


def report_skipped(name: str, files: Sequence[Path], *, expected: str) -> None:
    """Name and count the files of a folder that were not read.

    Args:
        name: the folder, for messages.
        files: those files.
        expected: what was read: "DICOM slices".
    """
    if not files:
        return
    listing = ", ".join(path.name for path in files[:_NAMED]) + (
        ", ..." if len(files) > _NAMED else ""
    )
    skipped = "1 file is" if len(files) == 1 else f"{len(files)} files are"
    message = f"{name}: {skipped} skipped; expected {expected}, found {listing}"
    if all(is_system_file(path) for path in files):
        logger.info("%s", message)
    else:
        warn_of_file(logger, kind="skipped", file=name, message=message)


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # a character may be cut at the end
            return False
        text = head[: error.start].decode("utf-8")
    return all(character.isprintable() or character in "\t\r\n\f" for character in text)
