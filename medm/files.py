"""Atomic files and folders, fsync and locks for everything that medm writes. Torch-free.

A file or folder is written under a temporary name in the same folder and renamed when it is
complete. A kill at any moment leaves either the old content or the new one. Locks are those of the
operating system, which releases the locks of a killed process. `MEDM_LOCKS=off` in the environment
switches them off, for shared file systems that have none: complete files still appear by rename.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from medm.os_errors import naming


class LockedError(Exception):
    """A lock that another process holds; the message names the process where it is known."""


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces a file when the block ends without an error.

    A caller that needs the content on the disk before the name calls `sync` on the temporary path.

    Raises:
        OSError: with the name of `file`, where the system names the temporary path or nothing.
    """
    temporary = _temporary(file)
    with naming(file, temporary=temporary):
        try:
            yield temporary
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def atomic_write_text(file: Path, text: str) -> None:
    """Replace the content of a file by a text. It is on the disk when this returns.

    Half of a surrogate pair, which UTF-8 cannot hold, is written as its JSON escape.

    Raises:
        OSError: with the file's name.
    """
    with atomic_file(file) as temporary, temporary.open("wb", buffering=0) as stream:
        left = memoryview(to_bytes(text))
        while left:
            left = left[stream.write(left) or 0 :]
        os.fsync(stream.fileno())


def atomic_create_text(file: Path, text: str) -> bool:
    """Write a complete file if there is none of its name. Return False if there is one.

    Of several processes that call it at once, on whatever machines, one writes.

    Raises:
        OSError: with the file's name.
    """
    temporary = _temporary(file)
    with naming(file, temporary=temporary):
        try:
            with temporary.open("wb") as stream:
                stream.write(to_bytes(text))
                stream.flush()
                os.fsync(stream.fileno())
            os.link(temporary, file)  # unlike a rename, it fails where the name is taken
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
    return True


def to_bytes(text: str) -> bytes:
    """Return JSON text as UTF-8, with half of a surrogate pair as its JSON escape."""
    return text.encode("utf-8", errors="backslashreplace")


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Yield a new folder that takes the name `folder` when the block ends without an error.

    Raises:
        OSError: with the name of `folder`; also where it exists and is not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(folder)
    with naming(folder, temporary=temporary):
        temporary.mkdir()
        try:
            yield temporary
            if folder.exists():
                folder.rmdir()
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def replace_directory(folder: Path, target: Path) -> None:
    """Give a complete folder its final name, in place of a folder of that name.

    The rename is on the disk when this returns. The old folder is renamed to `.tmp-old-NAME` and
    then removed: no part of either is ever left under the name.

    Args:
        folder: every file in it is on the disk; on the same file system as `target`.
        target: the final name.
    """
    old = _renamed(target) if target.exists() else None
    folder.rename(target)
    sync(target.parent)
    if old is not None:
        remove(old)


def remove_directory(folder: Path) -> None:
    """Rename a folder to `.tmp-old-NAME` and remove it.

    A kill leaves no part of it under its own name.
    """
    remove(_renamed(folder))


def _renamed(folder: Path) -> Path:
    old = folder.with_name(f".tmp-old-{folder.name}")
    remove(old)
    folder.rename(old)
    return old


def move_contents(folder: Path, target: Path, *, last: Sequence[str] = ()) -> None:
    """Move everything in a folder into another folder, and remove the empty one.

    Each file or folder is on the disk before it takes its place. Called again after a kill, it
    moves the rest.

    Args:
        folder: on the same file system as `target`.
        target: existing folder; files and folders of the same names are replaced.
        last: names that are moved after all others, in this order.
    """
    for path in sorted(
        folder.iterdir(), key=lambda path: last.index(path.name) if path.name in last else -1
    ):
        place = target / path.name
        if path.is_dir() and place.is_dir():
            shutil.rmtree(place)
        sync(path)
        path.replace(place)
    sync(target)
    folder.rmdir()


def remove(path: Path) -> None:
    """Remove a folder or a file if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file or folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _locks_off() -> bool:
    return os.environ.get("MEDM_LOCKS") == "off"


def lock(stream: IO[str] | IO[bytes], *, shared: bool = False) -> None:
    """Lock an open file until it is closed, without waiting.

    Args:
        stream: the file.
        shared: allow other shared locks, refuse exclusive ones.

    Raises:
        LockedError: another process holds it.
        OSError: this file system cannot lock.
    """
    if _locks_off():
        return
    try:
        fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockedError("another process") from None


def wait_for_lock(stream: IO[str] | IO[bytes]) -> None:
    """Wait for the lock of an open file, and hold it until the file is closed."""
    if _locks_off():
        return
    fcntl.flock(stream, fcntl.LOCK_EX)


@contextmanager
def lock_file(file: Path, *, target: Path) -> Iterator[None]:
    """Hold a lock through a file of its own.

    The file names the process, and exists while the lock is held.

    Args:
        file: the lock's file.
        target: file or folder that it protects, for errors of the system.

    Raises:
        LockedError: another process holds it; the message is its number and machine.
        OSError: the file cannot be created, or this file system cannot lock.
    """
    stream = _locked_stream(file, target)
    try:
        with suppress(OSError):  # a full disk: the lock is held without the name in it
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        file.unlink(missing_ok=True)
        stream.close()


def _locked_stream(file: Path, target: Path) -> IO[bytes]:
    while True:
        with naming(target, temporary=file):
            stream = file.open("a+b", buffering=0)
        try:
            with naming(target):
                lock(stream)
            # The previous holder may have removed the file between the two lines above. Such a lock
            # protects nothing.
            if file.exists() and os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                return stream
        except LockedError:
            stream.seek(0)
            holder = (
                stream.read().decode(errors="replace").strip() or "a process that is just starting"
            )
            stream.close()
            raise LockedError(holder) from None
        except BaseException:
            stream.close()
            raise
        stream.close()


def remove_leftovers(file: Path) -> None:
    """Remove what killed processes left of atomic writes of a file that has one writer."""
    for left in file.parent.glob(f".{glob.escape(file.name)}.*.tmp"):
        left.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
