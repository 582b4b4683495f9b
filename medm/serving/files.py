"""Uploaded files: kept in a private folder under random ids until they expire.

A file is read in whole by a limited process before it has an id. The names that clients give are
not kept: they may be those of patients.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from medm.imaging.dicom import MAX_FRAMES, is_dicom
from medm.serving.decoding import Decoders, Inspected
from medm.serving.errors import ServingError
from medm.serving.file_types import file_type
from medm.serving.options import Limits
from medm.types import JsonObject, Kind

_CHUNK = 2**20
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,8}")
_SECTOR = 4096
"""Bytes that the smallest file of a zip is counted as: many empty files are not free."""


@dataclass(slots=True)
class StoredFile:
    """One upload."""

    id: str
    kind: Kind
    path: Path
    """The file, or the folder of a DICOM series."""
    sha256: str
    size: int
    """Bytes of the upload."""
    stored: int
    """Bytes on the disk."""
    created: float
    expires: float
    """Seconds since 1970."""
    form: Inspected
    is_series: bool = False
    """A DICOM series, on which a DICOM SEG can lie."""
    users: int = field(default=0, compare=False)
    """Requests and jobs that read it."""

    def as_json(self) -> JsonObject:
        """Return the file as OpenAI's clients read it, and its geometry."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.size,
            "created_at": int(self.created),
            "expires_at": int(self.expires),
            "filename": f"{self.id}{'.zip' if self.is_series else ''.join(self.path.suffixes)}",
            "purpose": "user_data",
            "status": "processed",
            "sha256": self.sha256,
            "kind": self.kind,
            "geometry": self.form.as_json(),
        }


class FileStore:
    """Uploads of this server, in a folder that only its user can read; it is deleted at the end.

    Args:
        decoders: read every upload once.
        limits: of files.
        keep_seconds: after which a file is deleted, unless it is in use.
        max_bytes: of all files that are kept.
    """

    def __init__(
        self, decoders: Decoders, *, limits: Limits, keep_seconds: float, max_bytes: int
    ) -> None:
        self.decoders, self.limits = decoders, limits
        self.keep_seconds, self.max_bytes = keep_seconds, max_bytes
        self.folder = Path(tempfile.mkdtemp(prefix="medm-serve-"))
        self._files: dict[str, StoredFile] = {}
        self._removed: list[StoredFile] = []
        """Deleted ones that are still in use."""
        self._lock = threading.Lock()
        self._reserved = 0
        """Bytes of uploads that are being read."""

    @property
    def stored(self) -> int:
        """Bytes of all files."""
        with self._lock:
            return self._stored()

    def _stored(self) -> int:
        kept = [*self._files.values(), *self._removed]
        return self._reserved + sum(file.stored for file in kept)

    def add(self, stream: BinaryIO, size: int) -> StoredFile:
        """Keep an upload.

        Args:
            stream: seekable, at its start.
            size: its bytes.

        Raises:
            ServingError: an unknown type, too large, damaged, or no room for it.
        """
        self.sweep()
        found = file_type(stream, param="file")
        name = f"file-{secrets.token_urlsafe(18)}"
        folder = self.folder / name
        with self.room(size):
            folder.mkdir(mode=0o700)
            try:
                path = folder / f"content{found.suffix}"
                sha256 = _copy(stream, path)
                stored, is_series = size, found.suffix == ".zip"
                if is_series:
                    path = folder / "series"
                    archive = folder / "content.zip"
                    stored = unpack_series(archive, path, max_bytes=self.limits.max_file_bytes)
                    archive.unlink()
                with self.room(max(stored - size, 0)):
                    kind, form = self._inspect(path, "volume" if is_series else found.kind)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            now = time.time()
            file = StoredFile(
                id=name,
                kind=kind,
                path=path,
                sha256=sha256,
                size=size,
                stored=stored,
                created=now,
                expires=now + self.keep_seconds,
                form=form,
                is_series=is_series,
            )
            with self._lock:
                self._files[name] = file
        return file

    def get(self, name: str, *, param: str | None = None) -> StoredFile:
        """Return a file by its id. Raises `ServingError`."""
        self.sweep()
        with self._lock:
            return self._find(name, param)

    @contextmanager
    def using(
        self, names: Iterable[str], *, param: str | None = None
    ) -> Iterator[list[StoredFile]]:
        """Give files by their ids; they stay on the disk inside the block.

        Raises:
            ServingError: there is no such file.
        """
        self.sweep()
        files: list[StoredFile] = []
        try:
            with self._lock:
                for name in names:
                    file = self._find(name, param)
                    file.users += 1
                    files.append(file)
            yield files
        finally:
            with self._lock:
                for file in files:
                    file.users -= 1
            self.sweep()

    def _find(self, name: str, param: str | None) -> StoredFile:
        if name not in self._files:
            raise ServingError(
                "file_not_found", "no such file; it was deleted or is expired", param=param
            )
        return self._files[name]

    def keep_on(self, names: Iterable[str]) -> None:
        """Let files expire as if they were uploaded now; those that are gone are left out."""
        expires = time.time() + self.keep_seconds
        with self._lock:
            for name in names:
                if name in self._files:
                    self._files[name].expires = expires

    def delete(self, name: str) -> None:
        """Delete a file, at once or when nothing uses it any more. Raises `ServingError`."""
        file = self.get(name)
        with self._lock:
            if self._files.pop(name, None) is not None:
                self._removed.append(file)
        self.sweep()

    def sweep(self) -> None:
        """Delete what is expired and not in use."""
        now = time.time()
        with self._lock:
            for file in [file for file in self._files.values() if file.expires <= now]:
                self._removed.append(self._files.pop(file.id))
            gone = [file for file in self._removed if file.users == 0]
            self._removed = [file for file in self._removed if file.users > 0]
        for file in gone:
            shutil.rmtree(self.folder / file.id, ignore_errors=True)

    @contextmanager
    def room(self, size: int) -> Iterator[None]:
        """Count so many bytes inside the block. Raises `ServingError` if they are too many."""
        with self._lock:
            if self._stored() + size > self.max_bytes:
                raise ServingError(
                    "storage_full",
                    f"{size} bytes do not fit beside the {self._stored()} bytes that are kept; "
                    "delete files, or wait until some expire",
                )
            self._reserved += size
        try:
            yield
        finally:
            with self._lock:
                self._reserved -= size

    def close(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _inspect(self, path: Path, kind: Kind | None) -> tuple[Kind, Inspected]:
        """Return the kind of a file and its form. Of a DICOM file the header says the kind."""
        if kind is not None:
            return kind, self.decoders.inspect(path, kind, param="file")
        try:
            return "image", self.decoders.inspect(path, "image", param="file")
        except ServingError as error:
            if error.code != "invalid_image":
                raise
            return "volume", self.decoders.inspect(path, "volume", param="file")


def _copy(stream: BinaryIO, path: Path) -> str:
    """Write a stream to a file, and return its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as target:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            target.write(chunk)
    return digest.hexdigest()


def unpack_series(archive: Path, folder: Path, *, max_bytes: int) -> int:
    """Unpack a zip of a DICOM series into a new folder, under names of its own.

    Args:
        archive: the zip. Of its names only the ending is used.
        folder: is made.
        max_bytes: of all files together; what a header declares is not believed.

    Returns:
        Bytes on the disk.

    Raises:
        ServingError: damaged, encrypted, too large, or without DICOM.
    """
    folder.mkdir(mode=0o700)
    left = max_bytes
    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
            if not all(member.filename for member in members):  # is_dir would fail
                raise zipfile.BadZipFile("a member without a name")
            members = [member for member in members if not member.is_dir()]
            if len(members) > MAX_FRAMES:
                raise ServingError(
                    "body_too_large",
                    f"{len(members)} files in the zip; at most {MAX_FRAMES} are taken",
                    param="file",
                )
            for number, member in enumerate(members):
                suffix = PurePosixPath(member.filename).suffix
                suffix = suffix if _SUFFIX.fullmatch(suffix) else ""
                path = folder / f"{number:06d}{suffix}"
                left -= _unpack(opened, member, path, min(left, max_bytes))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
        # RuntimeError: an encrypted member; NotImplementedError, one of its kind: a compression.
        raise ServingError(
            "invalid_file",
            f"the zip is damaged, encrypted or compressed in an unknown way "
            f"({type(error).__name__}); expected a plain zip of a DICOM series",
            param="file",
        ) from None
    if not any(is_dicom(path) for path in folder.iterdir()):
        raise ServingError(
            "unsupported_type", "the zip holds no DICOM files; expected a series", param="file"
        )
    return max_bytes - left


def _unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, left: int) -> int:
    """Unpack one file of at most `left` bytes. Return the bytes that it counts as."""
    written = 0
    with archive.open(member) as source, path.open("wb") as target:
        while chunk := source.read(_CHUNK):
            written += len(chunk)
            if written > left:
                raise ServingError(
                    "body_too_large",
                    "the files of the zip are larger than this server takes",
                    param="file",
                )
            target.write(chunk)
    return max(written, _SECTOR)
