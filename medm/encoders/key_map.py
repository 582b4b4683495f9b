"""Names of published tensors under rules. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable


def map_key(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """Return a name as the first rule that matches rewrites it, once; other names stay.

    Args:
        name: published.
        rules: (regular expression, replacement).
    """
    for pattern, replacement in rules:
        new, count = re.subn(pattern, replacement, name, count=1)
        if count:
            return new
    return name
