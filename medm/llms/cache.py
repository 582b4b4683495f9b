"""Name of the KV cache argument of transformers' language models, which release 5.24 renamed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""Newest first: from 5.24 on, and before."""


def cache_argument(forward: Callable[..., Any]) -> str:
    """Return the keyword under which a language model's `forward` takes its KV cache.

    Raises:
        TypeError: it takes none of `CACHE_ARGUMENTS`.
    """
    taken = inspect.signature(forward).parameters
    for name in CACHE_ARGUMENTS:
        if name in taken:
            return name
    raise TypeError(
        f"{forward.__qualname__} takes no KV cache: expected an argument named one of "
        f"{', '.join(CACHE_ARGUMENTS)}, found {', '.join(taken)}"
    )
