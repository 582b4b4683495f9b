"""The import path of Python processes that medm starts.

`python -c` and `python -m` put the working folder first on the import path: a `json.py` that lies
there would run in place of Python's. Nothing that medm starts imports from the working folder,
unless medm itself lies there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HOME = Path(__file__).parents[1].resolve()
"""The folder that medm is imported from."""


def import_path() -> list[str]:
    """Return `sys.path` without the working folder."""
    entries = [entry for entry in sys.path if entry]
    try:
        here = Path.cwd().resolve()
    except FileNotFoundError:  # it was deleted, so nothing can be imported from it
        return entries
    return [entry for entry in entries if here == _HOME or Path(entry).resolve() != here]


def child_environment() -> dict[str, str]:
    """Return the environment of a Python process with the import path of this one."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(import_path()),
        "PYTHONSAFEPATH": "1",
    }


@contextmanager
def safe_path() -> Iterator[None]:
    """Start every Python process inside with a safe import path.

    This covers spawned processes and helpers of libraries.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PYTHONSAFEPATH", None)
        else:
            os.environ["PYTHONSAFEPATH"] = before
