"""Kills this process at one of its file operations below a folder, or takes away the power there.

For forked children: an audit hook stays for ever. "Before operation n + 1" is "after operation n".
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

How = Literal["before", "half", "power"]
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "shutil.")


def watch(folder: Path, *, die_at: int | None = None, how: How = "before") -> Callable[[], int]:
    """Count the operations below a folder from now on; returns a function that gives the count.

    Operations are opening for writing, fsync, rename, link, remove, truncate, and those on folders.

    Args:
        folder: names that lie below it count.
        die_at: number of the operation at which the process is killed, from 1.
        how: before it; after half of the file that is to be synced; or by a loss of power, which
            also takes what was not synced: new files hold zeros or nothing, the tail of grown files
            likewise. Names survive, as on a file system that orders them before the data.
    """
    count = 0
    place = str(folder)
    synced = {_key(path): path.stat().st_size for path in _files(folder)}
    untouched = {_key(path): path.stat().st_mtime_ns for path in _files(folder)}
    real_fsync = os.fsync

    def happens(descriptor: int | None = None) -> None:
        nonlocal count
        count += 1
        if count != die_at:
            return
        if how == "half" and descriptor is not None:
            size = os.fstat(descriptor).st_size
            os.truncate(f"/proc/self/fd/{descriptor}", size // 2)
        if how == "power":
            _lose(folder, synced, untouched, zeros=count % 2 == 0)
        os.kill(os.getpid(), signal.SIGKILL)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not flags & _WRITES or place not in os.fsdecode(path):
                return
            happens()
        elif event.startswith(_EVENTS) and any(place in str(value) for value in arguments):
            happens()

    def fsync(file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        inside = place in name
        if inside and Path(name).is_file():
            happens(descriptor)
        real_fsync(descriptor)
        if inside:
            status = os.fstat(descriptor)
            key = (status.st_dev, status.st_ino)
            synced[key], untouched[key] = status.st_size, status.st_mtime_ns

    os.fsync = fsync
    sys.addaudithook(note)
    return lambda: count


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def _key(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _lose(
    folder: Path,
    synced: dict[tuple[int, int], int],
    untouched: dict[tuple[int, int], int],
    *,
    zeros: bool,
) -> None:
    """Take away what was not synced."""
    for path in _files(folder):
        key, size = _key(path), path.stat().st_size
        kept = synced.get(key, 0)
        if untouched.get(key) == path.stat().st_mtime_ns or size <= kept:
            continue
        os.truncate(path, kept)
        if zeros:
            os.truncate(path, size)
