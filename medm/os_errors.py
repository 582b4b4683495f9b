"""Messages for errors of the operating system, such as full disks and lost network drives.

Such an error is not a defect of medm. `explain` turns it into a message; `naming` adds the file
where Python does not know it; `require_writable` finds it before hours of work.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb

_AGAIN = "then run the same command again"
_SHARE = f"the disk or network share does not answer; check that it is mounted, {_AGAIN}"
_PERMISSION = "check the owner and the permissions, or choose another path"
_OPEN_FILES = f"too many files are open; raise the limit (ulimit -n) or use fewer workers, {_AGAIN}"

_LOCKS = (
    "choose a folder on another one, or set MEDM_LOCKS=off and start one run at a time in a folder"
)

_ADVICE: dict[int, str] = {
    errno.ENOSPC: f"make room on the disk, {_AGAIN}",
    errno.EDQUOT: f"the disk quota is used up; make room, {_AGAIN}",
    errno.EFBIG: "the file is larger than this file system or the limit (ulimit -f) allows; choose "
    "another folder",
    errno.EROFS: "choose a folder on a file system that can be written",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of this path is a file where a folder is expected; choose another path",
    errno.EISDIR: "this is a folder, expected a file; choose another path",
    errno.EEXIST: "something of this name exists already; remove it, or choose another path",
    errno.ENOTEMPTY: "the folder is not empty; choose another one",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle; choose another path",
    errno.EXDEV: "the two places are on different file systems; choose a path on one of them",
    errno.EBUSY: f"another program uses it; wait for that program, {_AGAIN}",
    errno.EMFILE: _OPEN_FILES,
    errno.ENFILE: _OPEN_FILES,
    errno.ENOMEM: "not enough memory; use smaller batches or fewer processes",
    errno.ENOLCK: f"this file system cannot lock files; {_LOCKS}",
    errno.ENOSYS: f"this file system cannot do that (lock files, perhaps); {_LOCKS}",
    errno.ENOTSUP: "this file system does not support it; choose a folder on another one",
    errno.EIO: _SHARE,
    errno.ESTALE: _SHARE,
    errno.ENODEV: _SHARE,
    errno.ENXIO: _SHARE,
    errno.ETIMEDOUT: _SHARE,
    errno.EHOSTDOWN: _SHARE,
    errno.EHOSTUNREACH: _SHARE,
    errno.ENOTCONN: _SHARE,
}
"""Advice by error code."""

_WITHOUT_PATH = frozenset(
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.EIO,
        errno.ESTALE,
    )
)
"""Codes of machine faults even without a file name. Without one, any other code may be a defect of
medm."""

_RUST_CODE = re.compile(r"\(os error (\d+)\)")
"""Pattern of the system errors that safetensors and tokenizers raise as their own."""
_SHARED_MEMORY = re.compile(r"unable to \w+ (?:to )?file </torch_[^>]*>.*\((\d+)\)")
"""Pattern of PyTorch's errors in exchanging tensors through /dev/shm."""
_RECEIVING = str(Path("torch", "multiprocessing", "reductions.py"))
"""File of PyTorch that receives the memory of a tensor from another process."""
_LOADER_WORKER = re.compile(r"DataLoader worker \(pid")


def explain(error: BaseException) -> str | None:
    """Return the message for an error of the operating system; None for any other error."""
    if _is_lost_worker(error):
        return (
            "a process that prepares data was killed, perhaps for lack of memory (its DataLoader "
            f"worker ended unexpectedly); use fewer workers or more memory, {_AGAIN}"
        )
    if isinstance(error, RuntimeError) and (match := _SHARED_MEMORY.search(str(error))):
        return (
            f"shared memory (/dev/shm) could not hold a batch ({os.strerror(int(match[1]))}); "
            f"make it larger (docker: --shm-size or --ipc=host) or use fewer workers, {_AGAIN}"
        )
    found = as_os_error(error)
    if found is None or found.errno not in _ADVICE:
        return None
    names = [os.fsdecode(name) for name in (found.filename, found.filename2) if _is_name(name)]
    if not names and found.errno not in _WITHOUT_PATH:
        return None
    place = f"{' to '.join(names)}: " if names else ""
    return f"{place}{found.strerror or os.strerror(found.errno)}; {_ADVICE[found.errno]}"


def _is_lost_worker(error: BaseException) -> bool:
    """Return whether a DataLoader worker ended.

    PyTorch reports it, or receiving the worker's tensors failed.
    """
    if isinstance(error, RuntimeError):
        return _LOADER_WORKER.search(str(error)) is not None
    if not isinstance(error, (ConnectionError, FileNotFoundError, EOFError)):
        return False
    return any(
        frame.f_code.co_filename.endswith(_RECEIVING) for frame, _ in walk_tb(error.__traceback__)
    )


def as_os_error(error: BaseException) -> OSError | None:
    """Return an error of the operating system as `OSError`; None for any other error."""
    if isinstance(error, OSError):
        return error
    if type(error).__name__ == "SafetensorError" and (match := _RUST_CODE.search(str(error))):
        code = int(match[1])
        return OSError(code, os.strerror(code))
    return None


@contextmanager
def naming(path: Path, *, temporary: Path | None = None) -> Iterator[None]:
    """Add the file name to errors of the operating system.

    Errors of write, sync and close have none.

    Args:
        path: file or folder that is being written.
        temporary: temporary file or folder, whose name is replaced.
    """
    try:
        yield
    except Exception as error:
        found = as_os_error(error)
        if found is None:
            raise
        named = [
            Path(os.fsdecode(name)) for name in (found.filename, found.filename2) if _is_name(name)
        ]
        if not named or (
            temporary is not None and any(name.is_relative_to(temporary) for name in named)
        ):
            found.filename, found.filename2 = str(path), None
        if found is error:
            raise
        raise found from error


def _is_name(name: object) -> bool:
    """Return whether a field of an error holds a file name, not a descriptor or None."""
    return isinstance(name, (str, bytes, os.PathLike))


def require_writable(path: Path, *, folder: bool = False) -> None:
    """Check that a file or folder can be created or replaced, without creating anything.

    Args:
        path: file or folder to be written; folders above it may be missing.
        folder: True for a folder.

    Raises:
        OSError: it cannot be written; with the path of the obstacle.
    """
    if path.exists():
        if path.is_dir() != folder:
            code = errno.ENOTDIR if folder else errno.EISDIR
            raise OSError(code, os.strerror(code), str(path))
        _require_access(path)
        if folder:
            return
    above = path.parent
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
    _require_access(above)
    limit = os.pathconf(above, "PC_NAME_MAX")
    for part in path.relative_to(above).parts:
        if len(os.fsencode(part)) > limit:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path))


def _require_access(path: Path) -> None:
    if os.access(path, os.W_OK):
        return
    code = errno.EROFS if os.statvfs(path).f_flag & os.ST_RDONLY else errno.EACCES
    raise OSError(code, os.strerror(code), str(path))
