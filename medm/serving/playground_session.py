"""Open pages of the playground: their uploads, conversations and running replies.

Everything of a page is deleted when it is closed, after some time without a request, and at the
end of the program.
"""

from __future__ import annotations

import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from medm.serving.errors import ServingError
from medm.serving.files import FileStore, StoredFile
from medm.serving.worker import ReplyStream
from medm.types import Turn

Message: TypeAlias = dict[str, str]
"""Role and text of a turn, as the page shows it."""

_NAME = re.compile(r"[A-Za-z0-9_-]{24}\.(png|nii\.gz)")


class ViewerFiles:
    """Files that a page shows, under random names in a folder that only this user can read."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="medm-playground-"))

    def new(self, suffix: str) -> Path:
        """Return the path of a file that is to be written."""
        return self.folder / f"{secrets.token_urlsafe(18)}{suffix}"

    def find(self, name: str) -> Path | None:
        """Return the file of a name that a page asks for; None where there is none."""
        path = self.folder / name
        return path if _NAME.fullmatch(name) and path.is_file() else None

    def delete(self, paths: Iterable[Path]) -> None:
        """Delete some files."""
        for path in paths:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Delete all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(slots=True)
class Session:
    """One open page."""

    files: list[StoredFile] = field(default_factory=list)
    """All uploads."""
    pending: list[StoredFile] = field(default_factory=list)
    """Those that belong to the next question."""
    turns: dict[int, list[Turn]] = field(default_factory=dict)
    """Conversation with each model, by its number."""
    shown: dict[int, list[StoredFile]] = field(default_factory=dict)
    """Uploads of each conversation, in the order of the prompt."""
    messages: dict[int, list[Message]] = field(default_factory=dict)
    """What the page shows of each conversation. The page itself is not asked for it."""
    viewed: dict[str, Path] = field(default_factory=dict)
    """By the id of an upload the file that the viewer shows of it."""
    windows: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By the id of a volume the values that the viewer shows as black and white at first."""
    masks: list[Path] = field(default_factory=list)
    """Files of masks and heat maps."""
    streams: list[ReplyStream] = field(default_factory=list)
    """Replies that are being generated."""
    used: float = field(default_factory=time.monotonic)
    """Time of the last request."""
    closed: bool = False
    """The page is forgotten: what its events still write is deleted when they end."""
    _replying: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @contextmanager
    def replying(self) -> Iterator[None]:
        """Reply to one question at a time. Raises `ServingError` for a second one."""
        if not self._replying.acquire(blocking=False):
            raise ServingError("invalid_value", "a reply is being generated; stop it first")
        try:
            yield
        finally:
            self._replying.release()

    @contextmanager
    def writing(self, path: Path) -> Iterator[Path]:
        """Write a file inside the block, which is deleted with the conversation.

        It is noted at the end: what is noted before it is written may be deleted too early.
        """
        try:
            yield path
        finally:
            self.masks.append(path)

    def stop(self) -> None:
        """Cancel the running replies, which frees their slots."""
        for stream in list(self.streams):
            stream.cancel()


class Sessions:
    """All open pages.

    Args:
        store: of uploads.
        viewer_files: files that pages show.
        keep_seconds: without a request, after which a page is forgotten.
    """

    def __init__(self, store: FileStore, viewer_files: ViewerFiles, *, keep_seconds: float) -> None:
        self.store, self.viewer_files, self.keep_seconds = store, viewer_files, keep_seconds
        self._open: dict[str, Session] = {}
        self._lock = threading.Lock()

    def get(self, page: str) -> Session:
        """Return the session of a page, a new one at its first request; its files are kept on."""
        self.sweep()
        with self._lock:
            session = self._open.setdefault(page, Session())
            session.used = time.monotonic()
        self.store.keep_on(file.id for file in session.files)
        return session

    @contextmanager
    def handling(self, page: str) -> Iterator[Session]:
        """Give the session of a page to one of its events.

        What the event writes after the page was forgotten is deleted at the end of the block.
        """
        session = self.get(page)
        try:
            yield session
        finally:
            session.used = time.monotonic()
            if session.closed:
                self.clear(session)

    def sweep(self) -> None:
        """Forget the pages without a request for too long, and delete expired files."""
        now = time.monotonic()
        with self._lock:
            late = [
                name
                for name, one in self._open.items()
                if now - one.used > self.keep_seconds and not one.streams
            ]
            old = [self._open.pop(name) for name in late]
        for session in old:
            self._forget(session)
        self.store.sweep()

    def clear(self, session: Session) -> None:
        """Forget the conversation of a page and delete its files."""
        session.stop()
        for file in session.files:
            with suppress(ServingError):  # it expired before
                self.store.delete(file.id)
        self.viewer_files.delete([*session.viewed.values(), *session.masks])
        session.files, session.pending, session.masks = [], [], []
        session.turns, session.shown, session.messages = {}, {}, {}
        session.viewed, session.windows = {}, {}

    def close(self, page: str) -> None:
        """Forget a page that is closed."""
        with self._lock:
            session = self._open.pop(page, None)
        if session is not None:
            self._forget(session)

    def _forget(self, session: Session) -> None:
        session.closed = True
        self.clear(session)

    def close_all(self) -> None:
        """Forget all pages and delete every file."""
        for page in list(self._open):
            self.close(page)
        self.viewer_files.close()
        self.store.close()
