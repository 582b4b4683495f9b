"""What a codec does to its process does not happen to ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import pydicom
import pytest

from medm.errors import MediaError
from medm.imaging import isolated
from medm.imaging.images import read_image
from medm.imaging.isolated import ChildDiedError, Decoder, LimitedChild
from tests.crafted import rle_dicom

FILES = Path(pydicom.__file__).parent / "data" / "test_files"
GOOD = FILES / "MR_small_RLE.dcm"
EXPECTED = pydicom.dcmread(FILES / "MR_small.dcm").pixel_array[None]


def decode(decoder: Decoder, path: Path = GOOD) -> np.ndarray:
    return decoder.decode(path, "scan", max_items=64 * 64)


def test_a_child_that_died_is_replaced() -> None:
    decoder = Decoder()
    np.testing.assert_array_equal(decode(decoder), EXPECTED)
    child = decoder._child
    assert child is not None
    np.testing.assert_array_equal(decode(decoder), EXPECTED)
    assert decoder._child is child  # one program for many files
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    np.testing.assert_array_equal(decode(decoder), EXPECTED)
    # Of a damaged file only the request fails. More numbers than declared are refused before they
    # are read.
    with pytest.raises(MediaError, match="scan: declares shape"):
        decoder.decode(GOOD, "scan", max_items=64)
    with pytest.raises(
        MediaError, match="scan: the DICOM pixels are damaged or encoded in a way that is not read"
    ):
        decode(decoder, Path(__file__))
    np.testing.assert_array_equal(decode(decoder), EXPECTED)
    decoder._stop()


def killed_at_first(times: int, marks: Path) -> list[str]:
    """A program that is killed while it has its first requests, and then echoes a byte."""
    program = (
        "import os, pathlib, signal, sys\n"
        "byte = os.read(0, 1)\n"
        f"marks = pathlib.Path({str(marks)!r})\n"
        "marks.write_text(marks.read_text() + 'x' if marks.exists() else 'x')\n"
        f"if len(marks.read_text()) <= {times}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.write(1, byte)\n"
    )
    return [sys.executable, "-c", program]


def test_a_request_is_asked_again_if_its_program_was_killed_from_outside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    child = LimitedChild(killed_at_first(1, tmp_path / "once"))
    one = partial(isolated.read_exactly, count=1)
    assert child.ask([b"a"], one, seconds=60) == b"a"
    assert "ended with status -9 before it answered" in caplog.text
    child.stop()
    child = LimitedChild(killed_at_first(2, tmp_path / "twice"))
    with pytest.raises(ChildDiedError):
        child.ask([b"a"], one, seconds=60)
    assert (tmp_path / "twice").read_text() == "xx"


def test_after_an_error_of_the_reader_no_bytes_of_a_request_are_left() -> None:
    """Otherwise the next request would read the rest of this reply."""
    program = "import os\nwhile (byte := os.read(0, 1)): os.write(1, byte * 4)"
    child = LimitedChild([sys.executable, "-c", program])

    def fail(reply: IO[bytes]) -> bytes:
        reply.read(1)
        raise ValueError("no JSON")

    with pytest.raises(ValueError, match="no JSON"):
        child.ask([b"a"], fail, seconds=60)
    assert child.ask([b"b"], lambda reply: reply.read(4), seconds=60) == b"bbbb"
    child.stop()


def test_a_crash_is_a_media_error() -> None:
    with pytest.raises(
        MediaError, match="scan: the DICOM pixels are damaged: decoding them crashed"
    ):
        decode(Decoder([sys.executable, "-c", "import os; os.read(0, 9); os.abort()"]))


def test_a_hang_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "_SECONDS", 1)
    monkeypatch.setattr(isolated, "_PATIENCE", 1)
    start = time.monotonic()
    with pytest.raises(MediaError, match="took too much time"):
        decode(Decoder([sys.executable, "-c", "import time; time.sleep(600)"]))
    assert time.monotonic() - start < 60


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space")
def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    decoder = Decoder()
    np.testing.assert_array_equal(decode(decoder), EXPECTED)
    big = tmp_path / "big.dcm"  # more than the child may have free within what it holds
    rle_dicom(4096, 4096, 1)(big)
    with monkeypatch.context() as patch:
        patch.setattr(isolated, "_MEMORY", 1)  # less than it has: nothing more is given
        patch.setattr(isolated, "_BYTES_PER_NUMBER", 0)
        with pytest.raises(MediaError, match="damaged"):
            decoder.decode(big, "scan", max_items=4096 * 4096)
    assert decoder.decode(big, "scan", max_items=4096 * 4096).shape == (1, 4096, 4096)
    decoder._stop()


def test_a_file_on_which_gdcm_writes_out_of_bounds(tmp_path: Path) -> None:
    """Found by changing bytes at random: four of a JPEG lossless stream. In one process it
    ends it."""
    data = bytearray((FILES / "SC_rgb_jpeg_gdcm.dcm").read_bytes())
    for at, value in ((402, 217), (626, 143), (1115, 55), (1358, 206)):
        data[at] = value
    (tmp_path / "a.dcm").write_bytes(data)
    with pytest.raises(MediaError, match="the DICOM pixels are damaged"):
        read_image(tmp_path / "a.dcm")
    assert read_image(FILES / "SC_rgb_jpeg_gdcm.dcm").pixels.shape == (100, 100, 3)


def test_signals_to_the_process_group_spare_the_child() -> None:
    """Ctrl-C and batch systems reach the whole group, and the run needs its decoder until the
    checkpoint is written."""
    decoder = Decoder()
    decode(decoder)
    child = decoder._child
    assert child is not None
    assert os.getpgid(child.pid) != os.getpgid(0)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(child.pid, number)
    np.testing.assert_array_equal(decode(decoder), EXPECTED)
    assert decoder._child is child


def test_a_forked_process_has_a_child_of_its_own() -> None:
    parent = isolated.DECODER
    np.testing.assert_array_equal(decode(parent), EXPECTED)
    child = parent._child
    pid = os.fork()
    if pid == 0:
        fresh = parent._child is None and np.array_equal(decode(parent), EXPECTED)
        os._exit(0 if fresh else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert parent._child is child
    np.testing.assert_array_equal(decode(parent), EXPECTED)


def test_a_lower_limit_of_the_machine_stays() -> None:
    """Asking for more memory than `ulimit -v` allows is no damage of a file."""
    program = (
        "import resource as r; from medm.imaging.isolated import limit_process; "
        "r.setrlimit(r.RLIMIT_AS, (2**33, 2**33)); "
        "limit_process(5, 2**34); print(r.getrlimit(r.RLIMIT_AS)); "
        "limit_process(5, 2**32); print(r.getrlimit(r.RLIMIT_AS))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{(2**33, 2**33)}\n{(2**32, 2**33)}\n"
