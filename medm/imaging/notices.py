"""Warnings about files: each issued once, a few of each kind logged, all returned to a check."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

MAX_NAMED = 20
"""Files that this process names in its log for one kind of warning."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Warning about a file that is used nevertheless."""

    kind: str
    """Subject of the warning, the same for all files: "constant", "scale" ..."""
    file: str
    message: str
    """Message for the user; names the file and the numbers."""


_logged: set[str] = set()
"""Topics, and kinds with their files, that were logged."""
_collector: ContextVar[list[Notice] | None] = ContextVar("collector", default=None)


def warn_once(logger: logging.Logger, topic: str, message: str) -> None:
    """Log the first message of a topic in this process."""
    if topic not in _logged:
        _logged.add(topic)
        logger.warning("%s (reported once; other files may be alike)", message)


def warn_of_file(logger: logging.Logger, *, kind: str, file: str, message: str) -> None:
    """Log a warning about a file once; after `MAX_NAMED` files of a kind, log that more follow.

    Nothing is logged inside `collected`: its caller shows the warnings.
    """
    collector = _collector.get()
    if collector is not None:
        collector.append(Notice(kind, file, message))
        return
    topic = f"{kind}\0{file}"
    named = sum(other.startswith(f"{kind}\0") for other in _logged)
    if topic in _logged or named > MAX_NAMED:
        return
    _logged.add(topic)
    if named < MAX_NAMED:
        logger.warning("%s", message)
    else:
        logger.warning(
            "more than %d files give a warning of this kind (%s); further files are not named "
            "here. `medm data check --decode` and `medm data cache` name and count all of them",
            MAX_NAMED,
            kind,
        )


@contextmanager
def collected() -> Iterator[list[Notice]]:
    """Collect the warnings about files that are given inside, one of a kind per file."""
    notices: list[Notice] = []
    token = _collector.set(notices)
    try:
        yield notices
    finally:
        _collector.reset(token)
        notices[:] = {(notice.kind, notice.file): notice for notice in notices}.values()
