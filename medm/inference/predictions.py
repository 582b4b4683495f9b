"""Output of batch inference: lines that survive a kill and are never written twice.

The file `out.jsonl.run.json` beside `out.jsonl` holds the settings of its replies: a run resumes
only with the same data, model and settings. Several processes write a part each, and the parts are
merged at the end. One run at a time locks the output.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NotRequired, TypedDict, cast

from pydantic import ValidationError

from medm.errors import MedmError, RecipeError
from medm.files import LockedError, atomic_write_text, lock, lock_file, to_bytes
from medm.inference.options import GenerationOptions
from medm.os_errors import explain, naming, require_writable
from medm.types import Config, JsonObject

logger = logging.getLogger(__name__)

_SAMPLE, _SAMPLES = 64 * 1024, 64
_SMALL_FILES = (
    "config",
    "generation_config",
    "processor_config",
    "tokenizer",
    "special_tokens",
    "chat_template",
)
"""Beginnings of the names of files, other than weights, that a reply depends on."""
_NOTES = "last_run"
"""Key of the settings file for the options that replies do not depend on."""
_CHANGES = {
    "data_sha256": "the data file changed",
    "model_fingerprint": "the model is another one, or its files changed",
}
"""Messages for changes of settings that are hashes."""


class RecordName(TypedDict):
    """Fields of an output line that identify its record."""

    index: int
    """Position of the record in the annotation file."""
    id: NotRequired[str]
    task: NotRequired[str]
    answer: NotRequired[str]
    """Reference answer."""


class ResultLine(RecordName):
    """A line of the output: a record with its reply or its vectors, or with its error."""

    reply: NotRequired[str]
    tokens: NotRequired[int]
    """Tokens of the reply, the end token included."""
    finished: NotRequired[bool]
    """False for a reply that was cut at `max_new_tokens`."""
    raw: NotRequired[str]
    """The reply with its marks (`[SEG]`, `<p>`), where it has some."""
    spans: NotRequired[list[JsonObject]]
    """Of a model with a mask head, for each mask: where its phrase stands in `reply`, and its
    file."""
    unmasked: NotRequired[int]
    """Marked phrases that no mask belongs to."""
    overlay: NotRequired[str | list[str]]
    """Sheet with the masks over their image; of several images a list."""
    report_file: NotRequired[str]
    """DICOM SR of the reply."""
    embedding: NotRequired[list[float]]
    """Vector of the file, of length 1."""
    text_embeddings: NotRequired[list[list[float]]]
    """Vectors of the captions."""
    scores: NotRequired[dict[str, float]]
    """By class, or logits by label."""
    probabilities: NotRequired[dict[str, float]]
    """By label, each by itself; not calibrated."""
    matches: NotRequired[dict[str, float]]
    """By candidate the logit of a match."""
    error: NotRequired[str]
    """Reason for a missing reply."""


class Results:
    """The lines of one inference run.

    Args:
        output: the JSONL file.
        settings: all that the replies depend on, JSON-able; compared when a run resumes.
        notes: other options, kept beside the settings for the reader and not compared.
        folders: of the masks, overlays and reports that the lines name; with lines that are removed
            go their files in these folders.
    """

    def __init__(
        self,
        output: Path,
        settings: Mapping[str, object],
        notes: Mapping[str, object] | None = None,
        folders: Sequence[Path] = (),
    ) -> None:
        self.output, self.settings, self.notes = output, dict(settings), dict(notes or {})
        self.folders = [folder.resolve() for folder in folders]
        self.sidecar = output.with_name(f"{output.name}.run.json")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the output for this run; the lock of a killed run ends with it.

        A run that ends before its first line leaves nothing behind.

        Raises:
            MedmError: another run has the lock.
            OSError: the output cannot be written.
        """
        require_writable(self.output)
        if self.output.exists() and not self.output.is_file():
            raise MedmError(
                f"{self.output}: expected a file, found a device, pipe or socket; choose another "
                "--output"
            )
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.output):
            try:
                yield
            finally:
                if not any(file.stat().st_size for file in self._files()):
                    for file in (self.sidecar, *self._files()):
                        file.unlink(missing_ok=True)

    def begin(self, *, overwrite: bool = False) -> None:
        """Prepare the output for lines of this run.

        The process that has the lock calls it once, before any process writes.

        Raises:
            RecipeError: the file holds replies of another run.
            MedmError: a process of a killed run is still writing.
        """
        if self.starts_over(overwrite=overwrite):
            self._remove_lines()
        content = {**self.settings, _NOTES: self.notes}
        atomic_write_text(
            self.sidecar, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        )

    def starts_over(self, *, overwrite: bool = False, partial: bool = False) -> bool:
        """Return whether `begin` removes lines of an earlier run. Writes nothing.

        Args:
            overwrite: as of `begin`.
            partial: the settings are some of the run's, and only these are compared.

        Raises:
            RecipeError: the file holds replies of another run.
            MedmError: a process of a killed run is still writing.
        """
        for file in self._files():
            _require_unused(file)
        if overwrite:
            return True
        if self.sidecar.exists():
            changes = self._changes(partial=partial)
            if changes and any("error" not in line for line in self.done().values()):
                raise RecipeError(
                    f"{self.output}: holds replies of another run ({'; '.join(changes)}); choose "
                    "another --output, repeat the run as it was, or --overwrite"
                )
            return bool(changes)  # a run that answered nothing does not bind the next one
        if self.output.exists() and self.output.stat().st_size:
            raise RecipeError(
                f"{self.output}: exists, but has no {self.sidecar.name} with its settings; choose "
                "another --output, or --overwrite it"
            )
        return False

    def require_same_settings(self) -> None:
        """Raise `RecipeError` where the file has lines of other settings, or no settings."""
        if not self.sidecar.exists():
            raise RecipeError(
                f"{self.output}: has no {self.sidecar.name} with its settings; run it again"
            )
        if changes := self._changes():
            raise RecipeError(
                f"{self.output}: holds replies of other settings ({'; '.join(changes)}); repeat "
                "the command with the options of its run, or run it again with --overwrite"
            )

    def _remove_lines(self) -> None:
        for name in {name for file in self._files() for name in _named_files(file)}:
            path = self.output.parent / name
            path = path.parent.resolve() / path.name
            if any(path.is_relative_to(folder) for folder in self.folders) and path.is_file():
                path.unlink()
        for file in (self.sidecar, *self._files()):
            file.unlink(missing_ok=True)

    def _changes(self, *, partial: bool = False) -> list[str]:
        """Return a message for each setting that differs from the run that began the output."""
        try:
            before = json.loads(self.sidecar.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise MedmError(
                f"{self.sidecar}: damaged, expected a JSON object; --overwrite, or choose another "
                "--output"
            )
        before, now = _upgrade(before), json.loads(json.dumps(self.settings))
        changes = []
        for key in sorted((set(now) if partial else {*now, *before}) - {_NOTES}):
            old, new = before.get(key), now.get(key)
            if old == new:
                continue
            logger.debug("%s: %s was %r and is now %r", self.sidecar, key, old, new)
            if key in _CHANGES:
                changes.append(_CHANGES[key])
            elif isinstance(old, dict) and isinstance(new, dict):
                inner = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
                changes += [
                    f"{name} was {old.get(name)!r} and is now {new.get(name)!r}" for name in inner
                ]
            else:
                changes.append(f"{key} was {old!r} and is now {new!r}")
        return changes

    def done(self) -> dict[int, ResultLine]:
        """Return the line of each record from all files: its reply, or else its last error.

        Incomplete last lines are skipped.
        """
        lines: dict[int, ResultLine] = {}
        for file in (self.output, *self._parts()):
            for line in read_lines(file):
                index = line["index"]
                if "error" in lines.get(index, {"error": None}):
                    lines[index] = line
        return lines

    @contextmanager
    def append(self, *, rank: int = 0, world: int = 1) -> Iterator[Appender]:
        """Open a file to append to: the output itself, or this process's part of it.

        The file is locked while it is open.
        """
        file = (
            self.output
            if world == 1
            else self.output.with_name(f"{self.output.name}.part-{rank}-of-{world}")
        )
        with Appender(file) as appender:
            yield appender

    def finish(self, lines: dict[int, ResultLine] | None = None) -> dict[int, ResultLine]:
        """Write one line a record in the order of the records, and return every line.

        Args:
            lines: by record; those of the output and its parts without it.
        """
        lines = self.done() if lines is None else lines
        text = "".join(encode(lines[index]) for index in sorted(lines))
        if not self.output.exists() or self.output.read_bytes() != to_bytes(text):
            atomic_write_text(self.output, text)
        for part in self._parts():
            part.unlink()
        return lines

    def _parts(self) -> list[Path]:
        return sorted(self.output.parent.glob(f"{glob.escape(self.output.name)}.part-*-of-*"))

    def _files(self) -> list[Path]:
        return [file for file in (self.output, *self._parts()) if file.exists()]


def _upgrade(settings: Config) -> Config:
    """Return settings that an earlier version wrote, with the generation options of this one.

    A new option gets its default, which is the behavior of the earlier version. A removed option is
    dropped if its value is the behavior of this version. Options that this version refuses stay as
    they are, and count as a change.
    """
    with suppress(ValidationError, KeyError):
        return {
            **settings,
            "generation": GenerationOptions.model_validate(settings["generation"]).model_dump(),
        }
    return settings


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Lock an output by a file beside it. Raises `MedmError` if another run has the lock."""
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_file(output.with_name(f".{output.name}.lock"), target=output))
        except LockedError as error:
            raise MedmError(
                f"{output}: another run is writing to it ({error}); wait for it, or choose "
                "another --output"
            ) from None
        yield


def _require_unused(file: Path) -> None:
    """Raise `MedmError` if a process that outlived its run still writes to a file."""
    with file.open("rb") as stream:
        try:
            lock(stream, shared=True)
        except LockedError:
            raise MedmError(
                f"{file}: a process of an earlier run is still writing to it; it ends after its "
                "batch: run the same command again in a moment"
            ) from None


class Appender:
    """Writer that appends lines to one file and syncs them to the disk.

    Raises:
        MedmError: another process is writing to the same file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        # Unbuffered, so that closing has nothing left to write.
        self._stream = file.open("a+b", buffering=0)
        try:
            with naming(file):
                lock(self._stream)
            self._drop_incomplete_line()
        except LockedError:
            self._stream.close()
            raise MedmError(
                f"{file}: another process is writing to it; wait for it, or choose another --output"
            ) from None
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> Appender:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        try:
            self._stream.close()
        except OSError as closing:
            if error is None:
                raise self._cannot_write(closing) from None
            logger.debug(
                "%s: closing failed too: %s", self.file, closing
            )  # the first error says what to do

    def add(self, lines: Sequence[Mapping[str, object]]) -> None:
        """Write lines; after it returns they survive a kill and a power failure.

        Raises:
            MedmError: the lines cannot be written.
        """
        left = memoryview(to_bytes("".join(map(encode, lines))))
        try:
            while left:
                left = left[self._stream.write(left) or 0 :]
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise self._cannot_write(error) from None

    def _cannot_write(self, error: OSError) -> MedmError:
        error.filename = str(self.file)
        reason = (
            explain(error)
            or f"{self.file}: cannot be written ({error}); run the same command again"
        )
        return MedmError(f"{reason}. It resumes after the last complete line")

    def _drop_incomplete_line(self) -> None:
        """Cut off the incomplete last line of a process that was killed while writing."""
        complete = 0
        with self.file.open("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):
                    complete += len(line)
        if complete != self.file.stat().st_size:
            self._stream.truncate(complete)


def encode(line: Mapping[str, object]) -> str:
    """Return one line of JSONL."""
    return json.dumps(line, ensure_ascii=False) + "\n"


def _named_files(file: Path) -> Iterator[str]:
    """Yield the masks, overlays and reports that lines name, as written; damaged ones name none."""
    with file.open("rb") as stream:
        for text in stream:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if not isinstance(line, dict):
                continue
            named = [line.get("report_file"), line.get("overlay")]
            for value in (line.get("overlay"), line.get("spans")):
                named += value if isinstance(value, list) else []
            for one in named:
                name = one.get("mask") if isinstance(one, dict) else one
                if isinstance(name, str) and "\0" not in name:
                    yield name


def read_lines(file: Path) -> Iterator[ResultLine]:
    """Yield the complete lines of a JSONL file; none if the file does not exist.

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
                raise MedmError(
                    f"{file}, line {number}: damaged ({error}); delete the line, or --overwrite"
                ) from None
            if not isinstance(content, dict) or not isinstance(content.get("index"), int):
                raise MedmError(
                    f"{file}, line {number}: expected an object with an 'index'; delete it, or "
                    "--overwrite"
                )
            yield cast(ResultLine, content)  # the rest is as inference wrote it


def model_fingerprint(folder: Path) -> str:
    """Return a hash of a model folder: its small files in full, and samples of its weights.

    Hashing gigabytes would take longer than many a run. Two trainings differ in nearly every block
    of their weights.
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
