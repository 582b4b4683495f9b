"""Sets and lists that cost bytes an entry, for checks of millions of records."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator

_SMALLEST = 1024


class SeenTexts:
    """Set of texts, held as hashes of 64 bits: at most 32 bytes an entry.

    Two texts of ten million share a hash with a probability of 3e-6.
    """

    def __init__(self) -> None:
        self._table, self._count = array("Q", bytes(8 * _SMALLEST)), 0

    def __len__(self) -> int:
        return self._count

    def add(self, text: str) -> bool:
        """Add a text. Returns whether it is new."""
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        key = int.from_bytes(digest, "big") or 1  # 0 is an empty place
        place = self._place(key)
        if self._table[place] == key:
            return False
        self._table[place] = key
        self._count += 1
        if self._count * 2 > len(self._table):
            self._grow()
        return True

    def _place(self, key: int) -> int:
        """Return where a number is, or belongs."""
        table, mask = self._table, len(self._table) - 1
        place = key & mask
        while table[place] not in (0, key):
            place = (place + 1) & mask
        return place

    def _grow(self) -> None:
        old, self._table = self._table, array("Q", bytes(16 * len(self._table)))
        for key in old:
            if key:
                self._table[self._place(key)] = key


class PlacedTexts:
    """List of (position, text), 16 bytes an entry and those of the text. It can be pickled."""

    def __init__(self) -> None:
        self._positions, self._ends, self._text = array("q"), array("q"), bytearray()

    def __len__(self) -> int:
        return len(self._positions)

    def append(self, position: int, text: str) -> None:
        """Add a text at a position."""
        self._text += text.encode("utf-8", "surrogatepass")
        self._positions.append(position)
        self._ends.append(len(self._text))

    def __iter__(self) -> Iterator[tuple[int, str]]:
        start = 0
        for position, end in zip(self._positions, self._ends, strict=True):
            yield position, self._text[start:end].decode("utf-8", "surrogatepass")
            start = end
