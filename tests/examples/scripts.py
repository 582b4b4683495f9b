"""Imports the scripts of an example, which are no package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


@contextmanager
def scripts(*folders: str) -> Iterator[None]:
    """The scripts of these folders import each other, as they do when one is run; afterwards they
    are forgotten."""
    places = [str(EXAMPLES / folder) for folder in folders]
    sys.path[:0] = places
    try:
        yield
    finally:
        # A script may have put its neighbours' folder there too.
        sys.path[:] = [place for place in sys.path if place not in places]
        for name, module in list(sys.modules.items()):
            if str(Path(getattr(module, "__file__", None) or "").parent) in places:
                del sys.modules[name]
