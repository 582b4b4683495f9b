"""Stop sequences in a reply that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Text of a reply up to the first stop sequence, in pieces that are never taken back.

    Args:
        stops: texts that end the reply and are not part of it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        """The end of the text so far, with which a stop sequence may begin."""
        self.found = False
        """True once a stop sequence has come."""

    def add(self, piece: str) -> str:
        """Return what of the text is settled by one more piece, perhaps nothing."""
        if self.found:
            return ""
        text = self._held + piece
        starts = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        held = next(
            (
                length
                for length in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[-length:]) for stop in self._stops)
            ),
            0,
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """Return the rest, once no more pieces come."""
        held, self._held = self._held, ""
        return held
