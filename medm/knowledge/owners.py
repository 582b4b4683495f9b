"""Owners of memory entries: one number for each report text."""

from __future__ import annotations

import hashlib

NO_OWNER = -1
"""Owner of a query without a report: no entry is left out for it."""


def owner_of(text: str) -> int:
    """Return the owner number of a report, 0 or more, below 2**63.

    Reports that differ in case or blanks alone have one owner, so that a duplicate of a report is
    recognized.
    """
    normal = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.sha256(normal.encode("utf-8")).digest()[:8], "big") >> 1
