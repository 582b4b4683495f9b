"""Record of the folders whose files were compared with their checksums before.

With it gigabytes are not read again at every opening.

A file counts as the same while device, inode, size and both of its times stay: what writing,
copying or replacing it changes. What none of them shows, a disk that loses bits by itself, is found
by a comparison that does not ask here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path

from medm.files import atomic_write_text

logger = logging.getLogger(__name__)

SETTLED = 2.0
"""Seconds since the last change. A younger file may change once more without another time (file
systems count in ticks of milliseconds, some of seconds)."""


def state(files: Iterable[Path]) -> str | None:
    """Return a short name of the files as they are now.

    None if one changed just now, so that its times say too little.
    """
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        if time.time() - max(stat.st_mtime, stat.st_ctime) < SETTLED:
            return None
        times = f"{stat.st_mtime_ns}\0{stat.st_ctime_ns}"
        digest.update(
            f"{file.name}\0{stat.st_dev}\0{stat.st_ino}\0{stat.st_size}\0{times}\0".encode()
        )
    return digest.hexdigest()


def is_known(folder: Path, name: str) -> bool:
    """Return whether this state of the folder was noted."""
    file = _record()
    return file is not None and _read(file).get(os.path.realpath(folder)) == name


def note(folder: Path, name: str) -> None:
    """Note a state as verified; folders that are gone are forgotten.

    If the record cannot be written, nothing is noted.
    """
    if (file := _record()) is None:
        return
    entries = {place: held for place, held in _read(file).items() if Path(place).is_dir()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, json.dumps(entries | {os.path.realpath(folder): name}, indent=1))
    except OSError as error:
        logger.debug("%s: not kept (%s); the next opening compares again", file, error)


def _record() -> Path | None:
    """Return the user's file of verified folders; None for a user without a home.

    It follows the convention of the XDG base directories.
    """
    if place := os.environ.get("XDG_CACHE_HOME"):
        return Path(place) / "medm" / "verified.json"
    try:
        return Path.home() / ".cache" / "medm" / "verified.json"
    except RuntimeError:
        logger.debug("no home folder; every opening compares checksums")
        return None


def _read(file: Path) -> dict[str, str]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # not there yet, or damaged: nothing is known
    return entries if isinstance(entries, dict) else {}
