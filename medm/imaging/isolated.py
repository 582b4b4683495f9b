"""GDCM in a separate process, so that damaged compressed DICOM cannot crash or hang training.

GDCM's JPEG decoder writes out of bounds on damaged files, and its parser can be made to allocate
without end. The child has a limit of memory, each request a limit of time; when it dies the request
fails and the next one starts another.

The child is this module run as a program: `python -P -m medm.imaging.isolated`. Without -P, Python
would import from the working folder.
"""

from __future__ import annotations

import logging
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar, cast

try:
    import resource
except ImportError:  # not on every system; crashes are isolated even without it
    resource = None  # type: ignore[assignment]

import numpy as np
from numpy.lib import format as npy

from medm.children import child_environment
from medm.errors import MediaError
from medm.imaging.arrays import read_npy
from medm.limits import check_memory
from medm.stopping import ignore_stops

T = TypeVar("T")

logger = logging.getLogger(__name__)

_MEMORY, _BYTES_PER_NUMBER = 2**30, 32
"""Address space of the child (0.4 GiB at start), and more for each number the header declares."""
_BYTES_KEPT = 8
"""Bytes of memory for each number, here and in the child together."""
_SECONDS = 10
_NUMBERS_PER_SECOND = 5_000_000
"""CPU time of a request: `_SECONDS`, and more for its numbers at this slow pace."""
_PATIENCE = 30
"""Factor on that time by the clock; then the child counts as hung (busy machine, slow disk)."""
_REQUEST = struct.Struct("<IQI")
"""Seconds, bytes of address space, length of the path that follows."""
_REPLY = struct.Struct("<?")
"""True if an array follows."""


class ChildDiedError(Exception):
    """A program crashed, or took too much time or memory."""


class _ChildGoneError(Exception):
    """A program that was killed from outside, or did not start."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP)
"""Exit status of a program that did not end itself; its own limits end it with SIGXCPU."""


def _status(child: subprocess.Popen[bytes]) -> int:
    """Return the exit status of a program that closed its pipes; 0 while it runs."""
    try:
        return child.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return 0


class LimitedChild:
    """A program that answers requests over its pipes, in a process of its own.

    It is started on the first request and again after it died. Threads take turns. The program
    limits its memory and CPU time itself (`limit_process`).

    Args:
        command: the program.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def ask(
        self,
        request: Sequence[bytes | memoryview],
        answer: Callable[[IO[bytes]], T],
        *,
        seconds: float,
    ) -> T:
        """Write a request and return what `answer` reads of the reply.

        A program that was killed from outside (for lack of memory, say) or did not start is no
        fault of the request, which is asked once more.

        Args:
            request: its parts.
            answer: reads the whole reply.
            seconds: by the clock, after which the program is killed.

        Raises:
            ChildDiedError: the program crashed, or took too much time or memory.
            MediaError: of `answer`; the program is started anew for the next request.
        """
        with self._lock:
            try:
                return self._ask(request, answer, seconds)
            except _ChildGoneError as error:
                logger.warning(
                    "%s ended with status %d before it answered; it is started again",
                    self.command[-1], error.status,
                )  # fmt: skip
            try:
                return self._ask(request, answer, seconds)
            except _ChildGoneError:
                raise ChildDiedError from None

    def _ask(
        self,
        request: Sequence[bytes | memoryview],
        answer: Callable[[IO[bytes]], T],
        seconds: float,
    ) -> T:
        """Ask once. Raises as `ask`, and `_ChildGoneError`."""
        child = self._running()
        late = threading.Event()

        def end() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        try:
            timer.start()
            pipe = cast(IO[bytes], child.stdin)
            for part in request:
                pipe.write(part)
            pipe.flush()
            return answer(cast(IO[bytes], child.stdout))
        except (OSError, EOFError):
            status = _status(child)
            self._stop()
            if late.is_set() or not (status > 0 or status in _FROM_OUTSIDE):
                raise ChildDiedError from None
            raise _ChildGoneError(status) from None
        except BaseException:
            self._stop()  # remaining bytes in the pipe belong to this request
            raise
        finally:
            timer.cancel()

    def stop(self) -> None:
        """End the program; the next request starts it again."""
        with self._lock:
            self._stop()

    def forget(self) -> None:
        """Start anew in a forked process, which must not write to the pipes of its parent."""
        self._lock, self._child = threading.Lock(), None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self._child = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=child_environment(),
                # a signal to the group of the training must not end a decoding
                start_new_session=True,
            )
        return self._child

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            for pipe in (child.stdin, child.stdout):
                with suppress(OSError):
                    cast(IO[bytes], pipe).close()
            child.wait()


class Decoder(LimitedChild):
    """The program that decodes compressed DICOM.

    Args:
        command: the program that answers requests; this module by default.
    """

    def __init__(
        self, command: Sequence[str] = (sys.executable, "-P", "-m", "medm.imaging.isolated")
    ) -> None:
        super().__init__(command)

    def decode(self, path: Path, name: str, *, max_items: int) -> np.ndarray:
        """Return the pixels of a DICOM file from SimpleITK: (frames, rows, columns[, samples]).

        Args:
            path: the file; its header has been checked.
            name: the file, for messages.
            max_items: numbers that the header declares.

        Raises:
            MediaError: GDCM refused the file, crashed on it, or took too much time or memory.
        """
        # Two bytes in the child, two here, and two to four more for what they are converted to.
        check_memory(max_items * _BYTES_KEPT, held=path.stat().st_size, name=name, error=MediaError)
        seconds = _SECONDS + max_items // _NUMBERS_PER_SECOND
        memory = _MEMORY + max_items * _BYTES_PER_NUMBER
        encoded = os.fsencode(path.resolve())

        def pixels_of(reply: IO[bytes]) -> np.ndarray | None:
            (decoded,) = _REPLY.unpack(read_exactly(reply, _REPLY.size))
            return read_npy(reply, name, max_items=max_items, exact=False) if decoded else None

        try:
            pixels = self.ask(
                [_REQUEST.pack(seconds, memory, len(encoded)), encoded],
                pixels_of,
                seconds=seconds * _PATIENCE,
            )
        except ChildDiedError:
            raise MediaError(
                f"{name}: the DICOM pixels are damaged: decoding them crashed or took too "
                "much time or memory"
            ) from None
        if pixels is None:
            raise MediaError(
                f"{name}: the DICOM pixels are damaged or encoded in a way that is not read"
            )
        return pixels


def read_exactly(stream: IO[bytes], count: int) -> bytes:
    """Return so many bytes. Raises `EOFError` where the stream ends before."""
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data


def main() -> None:
    """Answer requests until the other end is closed."""
    ignore_stops()
    # Codecs print on standard output; the pipe for replies is moved out of their way.
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    while len(head := requests.read(_REQUEST.size)) == _REQUEST.size:
        seconds, memory, length = _REQUEST.unpack(head)
        limit_process(seconds, memory)
        reader = SimpleITK.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(os.fsdecode(read_exactly(requests, length)))
        try:
            image = reader.Execute()
            pixels = SimpleITK.GetArrayFromImage(image)
        except (RuntimeError, MemoryError):
            replies.write(_REPLY.pack(False))  # the text of the error may quote the header
        else:
            pixels = np.ascontiguousarray(pixels if image.GetDimension() == 3 else pixels[None])
            replies.write(_REPLY.pack(True))
            npy.write_array_header_1_0(replies, npy.header_data_from_array_1_0(pixels))
            replies.write(pixels.data)
        replies.flush()


def limit_process(seconds: int, memory: int) -> None:
    """Limit CPU time (it stands still while other programs run) and address space from now on.

    A lower limit that this process was started with (`ulimit -v`) stays.

    Args:
        seconds: from now on.
        memory: bytes of address space in all.
    """
    if resource is not None:
        spent = resource.getrusage(resource.RUSAGE_SELF)
        for what, limit in (
            (resource.RLIMIT_CPU, int(spent.ru_utime + spent.ru_stime) + 1 + seconds),
            (resource.RLIMIT_AS, memory),
            (resource.RLIMIT_CORE, 0),
        ):
            _, hard = resource.getrlimit(what)
            allowed = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(what, (allowed, hard))


DECODER = Decoder()
"""The decoder of this process."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=DECODER.forget)

if __name__ == "__main__":
    main()
