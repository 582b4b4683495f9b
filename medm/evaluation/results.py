"""The output of batch inference: lines that are appended as they come, survive a kill, and are never written twice.

Beside `out.jsonl` stands `out.jsonl.run.json`, which says what the lines are replies to: a run goes on only with
the same data, model and settings. Several processes write a part each, which are merged at the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from medm.errors import MedmError, RecipeError

_SAMPLE, _SAMPLES = 64 * 1024, 64
_SMALL_FILES = ("config", "generation_config", "processor_config", "tokenizer", "special_tokens", "chat_template")
"""Beginnings of the names of files, other than weights, that a reply depends on."""


class Results:
    """The lines of one inference run.

    Args:
        output: the JSONL file.
        settings: what the replies depend on, JSON-able; compared when a run goes on.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        self.output, self.settings = output, dict(settings)
        self.sidecar = output.with_name(f"{output.name}.run.json")

    def begin(self, *, overwrite: bool = False) -> None:
        """Make ready to append; one process does this before any of them writes.

        Raises:
            RecipeError: the file holds lines of another run.
        """
        self.output.parent.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for file in (self.sidecar, self.output, *self._parts()):
                file.unlink(missing_ok=True)
        if self.sidecar.exists():
            self._require_same(json.loads(self.sidecar.read_text(encoding="utf-8")))
        elif self.output.exists() and self.output.stat().st_size:
            raise RecipeError(
                f"{self.output}: exists, and no {self.sidecar.name} beside it says what its lines are; choose another "
                "--output, or --overwrite it"
            )
        write_aside(self.sidecar, json.dumps(self.settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n")

    def _require_same(self, before: Any) -> None:
        now = json.loads(json.dumps(self.settings))
        names = sorted(key for key in {*now, *before} if now.get(key) != before.get(key))
        if names:
            changes = "; ".join(f"{key} was {before.get(key)!r} and is now {now.get(key)!r}" for key in names)
            raise RecipeError(
                f"{self.output}: holds replies of another run ({changes}); choose another --output, repeat the run as "
                "it was, or --overwrite"
            )

    def done(self) -> dict[int, dict[str, Any]]:
        """Every finished line by record, of all files. Torn last lines are passed over."""
        lines: dict[int, dict[str, Any]] = {}
        for file in (self.output, *self._parts()):
            for line in read_lines(file):
                lines.setdefault(int(line["index"]), line)
        return lines

    @contextmanager
    def append(self, *, rank: int = 0, world: int = 1) -> Iterator[Appender]:
        """A file to append to: the output itself, or this process's part of it. It is locked while it is open."""
        file = self.output if world == 1 else self.output.with_name(f"{self.output.name}.part-{rank}-of-{world}")
        with Appender(file) as appender:
            yield appender

    def finish(self) -> dict[int, dict[str, Any]]:
        """Merge the parts, in the order of the records, and return every line."""
        lines = self.done()
        text = "".join(encode(lines[index]) for index in sorted(lines))
        write_aside(self.output, text)
        for part in self._parts():
            part.unlink()
        return lines

    def _parts(self) -> list[Path]:
        return sorted(self.output.parent.glob(f"{self.output.name}.part-*-of-*"))


class Appender:
    """Appends lines to one file and makes sure that they are on the disk.

    Raises:
        MedmError: another process is writing to the same file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._stream = file.open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stream.close()
            raise MedmError(
                f"{file}: another process is writing to it; wait for it, or choose another --output"
            ) from None
        self._drop_torn_line()

    def __enter__(self) -> Appender:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Write some lines; when this returns they survive a kill and a power failure.

        Raises:
            MedmError: the disk does not take them.
        """
        try:
            self._stream.write("".join(map(encode, lines)).encode())
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise MedmError(
                f"{self.file}: cannot be written ({error}); make room and run the same command again, which goes on "
                "behind the last whole line"
            ) from None

    def _drop_torn_line(self) -> None:
        """A process that was killed while writing leaves half a line, which is cut off."""
        self._stream.seek(0)
        whole = 0
        for line in self._stream:
            if line.endswith(b"\n"):
                whole += len(line)
        self._stream.truncate(whole)
        self._stream.seek(0, os.SEEK_END)


def encode(line: Mapping[str, Any]) -> str:
    """One line of JSONL."""
    return json.dumps(line, ensure_ascii=False) + "\n"


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Finished lines of a JSONL file; none where there is no file. A torn last line is passed over.

    Raises:
        MedmError: a line is not one that inference wrote.
    """
    if not file.exists():
        return
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                return
            try:
                content = json.loads(line)
            except ValueError as error:
                raise MedmError(f"{file}, line {number}: damaged ({error}); delete the line, or --overwrite") from None
            if not isinstance(content, dict) or not isinstance(content.get("index"), int):
                raise MedmError(f"{file}, line {number}: expected an object with an 'index'; delete it, or --overwrite")
            yield content


def write_aside(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def model_fingerprint(folder: Path) -> str:
    """A name of a model folder's content: its small files whole, and samples spread over its weights.

    Hashing gigabytes would take longer than many a run; two trainings differ in nearly every block of their weights.
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        size = file.stat().st_size
        offsets, length = [0], size
        if file.suffix == ".safetensors":
            if size > _SAMPLE * _SAMPLES:
                offsets, length = [size * number // _SAMPLES for number in range(_SAMPLES)], _SAMPLE
        elif not file.name.startswith(_SMALL_FILES):
            continue
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for offset in offsets:
                stream.seek(offset)
                digest.update(stream.read(length))
    return digest.hexdigest()[:16]
