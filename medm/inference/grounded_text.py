"""Text of replies with masks: the words without marks, and the phrase that each mask belongs to.

A reply marks the words of a mask by `<p> left lung </p>[SEG]`, or holds a bare `[SEG]` in a
sentence. Models write the marks as control tokens, or `<p>` and `</p>` as letters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medm.types import MASK_TOKEN, PHRASE_TOKENS

if TYPE_CHECKING:
    from medm.models.lvlm.processing import LocatedToken, Reply

_OPEN, _CLOSE = PHRASE_TOKENS
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|\n+")
_CLOSING = ".,;:!?)"
"""Characters before which no blank stands."""
_BLANKS = " \t"


@dataclass(frozen=True, slots=True)
class Phrase:
    """Words of a reply that a mask belongs to."""

    start: int
    end: int
    """Position in `GroundedText.text`: from `start` up to, but without, `end`."""
    text: str
    """Those letters; empty for a reply of `[SEG]` alone."""


@dataclass(frozen=True, slots=True)
class GroundedText:
    """A reply with masks as text."""

    text: str
    """The words, without marks."""
    raw: str
    """The reply as it was generated, with its marks in letters."""
    phrases: tuple[Phrase, ...]
    """Of each `[SEG]`, in order. Several may share one."""
    unmasked: int
    """Marked phrases (`<p> ... </p>`) that no `[SEG]` follows."""


def grounded_text(reply: Reply, *, phrase_tokens: bool) -> GroundedText:
    """Return the words of a decoded reply, and the phrase of each `[SEG]`.

    The phrase is the marked one directly before the `[SEG]`, otherwise the sentence that holds it.
    A `[SEG]` between two sentences of a line belongs to the first of them. Letters that look like
    `[SEG]`, without being the token, stay letters.

    Args:
        reply: see `LVLMProcessor.decode_with_control_tokens`.
        phrase_tokens: `<p>` and `</p>` are control tokens of the model, so that the same letters
            are words.
    """
    text, place = "", 0
    opened: int | None = None
    marked: list[list[int]] = []
    """Start and end of each marked phrase, and how many `[SEG]` follow it."""
    tokens: list[tuple[int, list[int] | None]] = []
    """Of each `[SEG]` its position in the text, and the marked phrase before it."""
    for mark, start, end in _marks(reply, phrase_tokens):
        text = _joined(text, reply.text[place:start], after_mark=place > 0)
        place = end
        if mark == _OPEN:
            opened = len(text)
        elif mark == _CLOSE and opened is not None:
            words = text[opened:]
            first = opened + len(words) - len(words.lstrip())
            marked.append([first, max(first, len(text.rstrip())), 0])
            opened = None
        elif mark == MASK_TOKEN:
            phrase = marked[-1] if marked and not text[marked[-1][1] :].strip() else None
            if phrase is not None:
                phrase[2] += 1
            tokens.append((len(text), phrase))
    text = _joined(text, reply.text[place:], after_mark=place > 0).rstrip()
    spans = [
        _sentence(text, min(at, len(text))) if phrase is None else (phrase[0], phrase[1])
        for at, phrase in tokens
    ]
    return GroundedText(
        text,
        reply.text,
        tuple(Phrase(start, end, text[start:end]) for start, end in spans),
        unmasked=sum(not phrase[2] for phrase in marked),
    )


def _marks(reply: Reply, phrase_tokens: bool) -> Iterator[tuple[str, int, int]]:
    """Yield the marks of a reply in order: what it is, where it starts and ends."""
    found = [_place(token) for token in reply.tokens]
    if not phrase_tokens:
        for pair in re.finditer(r"(<p>)((?:(?!<p>).)*?)(</p>)", reply.text, re.DOTALL):
            found += [(pair[1], pair.start(1), pair.end(1)), (pair[3], pair.start(3), pair.end(3))]
    yield from sorted(found, key=lambda mark: mark[1])


def _place(token: LocatedToken) -> tuple[str, int, int]:
    return token.token, token.start, token.start + len(token.token)


def _joined(text: str, piece: str, *, after_mark: bool) -> str:
    """Append a piece; where a mark stood between the two, no second blank stays."""
    if not after_mark:
        return text + piece
    words = piece.lstrip(_BLANKS)
    if words[:1] == "\n" or (words and words[0] in _CLOSING):
        return text.rstrip(_BLANKS) + words
    if not text or text[-1].isspace():
        return text + (words if text else words.lstrip())
    return text + piece


def _sentence(text: str, at: int) -> tuple[int, int]:
    """Return start and end of the sentence that holds a position."""
    before = text[:at].rstrip(_BLANKS)
    if before and before[-1] in ".!?":
        at = len(before) - 1
    start, end = 0, len(text)
    for boundary in _SENTENCE_END.finditer(text):
        if boundary.end() > at:
            end = boundary.end()
            break
        start = boundary.end()
    words = text[start:end]
    start += len(words) - len(words.lstrip())
    return start, max(start, start + len(words.strip()))
