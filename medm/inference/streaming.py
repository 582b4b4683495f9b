"""The text of a reply while it is generated, in pieces that are never taken back."""

from __future__ import annotations

from collections.abc import Callable

_INCOMPLETE = "\ufffd"
"""Text of the first bytes of a character, until the tokens of its last ones have come."""


class ReplyText:
    """Text of a reply in pieces; all pieces together are the decoded reply.

    The text of a token depends on its neighbors: a character may be spread over several
    tokens, a leading space may belong to the first word, and a tokenizer may close the space before
    a full stop. So the whole reply is decoded at each token, and a piece is given once the next
    token has left it as it was.

    Args:
        decode: makes text of token ids, without control tokens.
        end: text that ends a reply, which `decode` leaves out once it is complete; its beginning is
            held back.
    """

    def __init__(self, decode: Callable[[list[int]], str], *, end: str = "") -> None:
        self._decode = decode
        self._end = end
        self._tokens: list[int] = []
        self._latest = ""
        self._given = ""

    def add(self, token: int) -> str:
        """Return the piece, perhaps empty, that is settled by one more token."""
        self._tokens.append(token)
        before, self._latest = self._latest, self._decode(self._tokens)
        settled = _shared_prefix(before, self._latest).rstrip(_INCOMPLETE)
        held = next((n for n in range(len(self._end), 0, -1) if settled.endswith(self._end[:n])), 0)
        return self._give(settled[: len(settled) - held])

    def end(self) -> str:
        """Return the rest of the reply."""
        return self._give(self._latest)

    def _give(self, settled: str) -> str:
        if len(settled) <= len(self._given) or not settled.startswith(self._given):
            return ""
        piece = settled[len(self._given) :]
        self._given = settled
        return piece


def _shared_prefix(one: str, other: str) -> str:
    """Return the longest text with which both texts begin."""
    if other.startswith(one):
        return one
    length = next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other)
    )
    return one[:length]
