"""What the first campaign did not try: loss of power, exchange of a file between check and read,
I/O errors, control and pad tokens and bidirectional characters as text.

GPU-only faults are listed in the report as not run.
"""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from campaign.harness import Case, Limits, Part, WrongResultError
from campaign.parts import kills, media
from medm.errors import MedmError
from medm.imaging import load_pixels
from medm.models import load, load_processor
from medm.training.recipe import load_recipe
from medm.types import Sample, Turn
from tests.inference.tiny import save_tiny

TEXTS = {
    "bidi": "a\u202egnp.\u202c \u2066b\u2069",
    "control characters": "a\x00b\x1b[2J\x7f\x85",
    "zero width": "a\u200b\u200d\ufeffb",
    "placeholder": "<image><volume>",
    "combining": "e" + "\u0301" * 500,
}


def _texts(folder: Path, name: str) -> None:
    """A text gives ids that hold no control token, and comes back."""
    processor = load_processor(str(folder / "texts" / "model"))
    tokenizer = processor.tokenizer
    control = set(tokenizer.all_special_ids)
    text = TEXTS.get(name, name)

    def ids(words: str) -> list[int]:
        sample = Sample((Turn("user", (words,)),))
        return [int(one) for one in processor.encode(sample, {}, generation=True).input_ids]

    around = sum(one in control for one in ids("x"))
    found = ids(text)
    if sum(one in control for one in found) != around:
        raise WrongResultError(f"{text!r} gives control tokens: {found}")


def _special_tokens(folder: Path) -> None:
    """Every special token of the tokenizer, written by a person, is text."""
    processor = load_processor(str(folder / "texts" / "model"))
    for token in processor.tokenizer.all_special_tokens:
        _texts(folder, f"a {token} b")


def _exchange(folder: Path, make: Callable[[Path], Path], other: bytes, at: int) -> None:
    """The file is another one from its opening number `at` on.

    A reader that opens it fewer times has no gap between check and read there.
    """
    place = Path(tempfile.mkdtemp(dir=folder))
    file = make(place)
    opened = 0

    def exchange(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal opened
        if event == "open" and str(arguments[0]) == str(file):
            opened += 1
            if opened == at:
                os.replace(place / "other", file)  # noqa: PTH105 - opens nothing

    (place / "other").write_bytes(other)
    sys.addaudithook(exchange)  # stays, and knows this file alone
    load_pixels(file, media.IMAGE if file.suffix in (".png", ".jpg") else media.VOLUME)
    if opened >= at and other != file.read_bytes():
        raise WrongResultError("the file was not exchanged")
    if opened >= at:
        raise WrongResultError("an exchanged file, which holds no pixels, gave pixels")


class _FailingFile(io.FileIO):
    """A file whose reads fail behind some bytes, as on a disk with a bad block."""

    def readinto(self, buffer: Any) -> int:
        if self.tell() >= 64:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().readinto(memoryview(buffer)[:64])

    def readall(self) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= 64 or size is None or size < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(min(size, 64))


def _io_error(folder: Path, make: Callable[[Path], Path], read: Callable[[Path], object]) -> None:
    """Reads of the file fail with EIO: an error that names the file, and no result."""
    place = Path(tempfile.mkdtemp(dir=folder))
    file = make(place)
    real, met = io.open, False

    def failing(path: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        if not isinstance(path, int) and str(path) == str(file) and "r" in mode:
            nonlocal met
            met = True
            raw = _FailingFile(os.fspath(path), "r")
            buffered = raw if keywords.get("buffering") == 0 else io.BufferedReader(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")
        return real(path, mode, *arguments, **keywords)

    io.open = builtins.open = failing
    try:
        read(file)
    except OSError as error:
        if error.errno == errno.EIO and error.filename is None and file.name not in str(error):
            raise WrongResultError(f"EIO without the file's name: {error}") from None
        raise MedmError(str(error)) from None  # the command line explains it
    finally:
        io.open = builtins.open = real
    raise WrongResultError("a result in spite of the error" if met else "no read was met")


def _recipe_file(place: Path) -> Path:
    (place / "recipe.yaml").write_text("# " + "x" * 200 + "\nmodel: {}\n")
    return place / "recipe.yaml"


READS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    **{
        name: (media.FORMATS[name], lambda file: load_pixels(file, media.VOLUME))
        for name in ("nifti", "nifti.gz", "nrrd", "mha", "npy", "dicom")
    },
    "recipe": (_recipe_file, load_recipe),
    "config.json": (
        lambda place: save_tiny(place) / "config.json",
        lambda file: load(str(file.parent)),
    ),
}


def prepare(folder: Path) -> None:
    """Prepare the works for losses of power, and a model for texts."""
    kills.prepare(folder)
    (folder / "texts").mkdir()
    save_tiny(folder / "texts")


def cases(folder: Path, count: int, seed: int) -> list[Case]:
    """Return `count` losses of power of each work, and each other trial once."""
    made = [
        Case(f"power: {case.name}", case.run, "loss of power")
        for case in kills.cases_of(("power",), folder, count, seed)
    ]
    made += [Case(f"text {name}", partial(_texts, folder, name), "texts") for name in TEXTS]
    made.append(Case("special tokens as text", partial(_special_tokens, folder), "texts"))
    for name, make in {"PNG": media.image("png"), **media.FORMATS}.items():
        for other, at in itertools.product((b"", b"\x00" * 5000), (1, 2)):
            run = partial(_exchange, folder, make, other, at)
            made.append(
                Case(f"{name} exchanged for {len(other)} bytes, opening {at}", run, "exchange")
            )
    made += [
        Case(f"EIO: {name}", partial(_io_error, folder, make, read), "EIO")
        for name, (make, read) in READS.items()
    ]
    return made


PART = Part(
    "untried",
    "Loss of power, exchanged files, I/O errors, hostile text",
    prepare,
    cases,
    8,
    Limits(cpu=120, gib=4, wall=900),
    "cases",
)
