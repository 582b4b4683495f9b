"""Atomic files and folders, fsync and locks: one implementation for everything that medm writes. Torch-free.

A file or folder is written under a temporary name beside its own and renamed when it is complete, so that a kill at any
moment leaves either the old content or the new one. Locks are those of the operating system: a killed process lets go.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from medm.os_errors import naming


class LockedError(Exception):
    """Another process holds a lock; the message says which, as far as is known."""


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Yield a temporary path beside a file, which replaces the file when everything went well.

    Whoever needs the content on the disk before the name calls `sync` on the temporary path.

    Raises:
        OSError: with the name of `file`, where the system names the temporary path or nothing.
    """
    temporary = _temporary(file)
    with naming(file, aside=temporary):
        try:
            yield temporary
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def atomic_write_text(file: Path, text: str) -> None:
    """Replace a file by a text, which is on the disk when this returns.

    Half of a surrogate pair, which UTF-8 cannot hold, is written as the escape that JSON has for it.

    Raises:
        OSError: with the file's name.
    """
    with atomic_file(file) as temporary, temporary.open("wb", buffering=0) as stream:
        left = memoryview(to_bytes(text))
        while left:
            left = left[stream.write(left) or 0 :]
        os.fsync(stream.fileno())


def to_bytes(text: str) -> bytes:
    """Return JSON text as UTF-8, with half of a surrogate pair as the escape that JSON has for it."""
    return text.encode("utf-8", errors="backslashreplace")


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`, whose place it takes when everything went well.

    Raises:
        OSError: with the name of `folder`; among others where it exists and is not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(folder)
    with naming(folder, aside=temporary):
        temporary.mkdir()
        try:
            yield temporary
            if folder.exists():
                folder.rmdir()
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(stream: IO[str] | IO[bytes], *, shared: bool = False) -> None:
    """Lock an open file until it is closed, without waiting.

    Args:
        stream: the file.
        shared: only keep away those who want it alone.

    Raises:
        LockedError: another process holds it.
        OSError: this file system cannot lock.
    """
    try:
        fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockedError("another process") from None


def wait_for_lock(stream: IO[str] | IO[bytes]) -> None:
    """Lock an open file until it is closed, as soon as no other process holds it."""
    fcntl.flock(stream, fcntl.LOCK_EX)


@contextmanager
def lock_file(file: Path, *, target: Path) -> Iterator[None]:
    """Hold a lock by a file of its own, which names the process and is there as long as the lock is held.

    Args:
        file: the lock's file.
        target: what it protects, for errors of the system.

    Raises:
        LockedError: another process holds it; the message is its number and machine.
        OSError: the file cannot be made, or this file system cannot lock.
    """
    stream = _locked_stream(file, target)
    try:
        with suppress(OSError):  # a full disk: the name is for people, the lock is held without it
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        file.unlink(missing_ok=True)
        stream.close()


def _locked_stream(file: Path, target: Path) -> IO[bytes]:
    while True:
        with naming(target, aside=file):
            stream = file.open("a+b", buffering=0)
        try:
            with naming(target):
                lock(stream)
            # The holder before may have removed the file between the two lines above; such a lock protects nothing.
            if file.exists() and os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                return stream
        except LockedError:
            stream.seek(0)
            holder = stream.read().decode(errors="replace").strip() or "a process that is just starting"
            stream.close()
            raise LockedError(holder) from None
        except BaseException:
            stream.close()
            raise
        stream.close()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
