"""From text to the words that are compared: tokenisers and answer normalisation."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_PTB_TOKEN = re.compile(
    r"""
    </?[a-z][^<>\s]*>                                         # markup stays one token
    | (?:[a-z]\.){2,}                                         # e.g.  p.m.  u.s.
    | (?:dr|mr|mrs|ms|prof|st|vs|fig|etc|jr|sr)\.(?=\s|$|,)   # abbreviations keep their full stop
    | no\.(?=\s*\d)
    | can(?=not\b)                                            # "cannot" is two words
    | [a-z]+(?=n't\b) | n't\b | '(?:s|m|d|ll|re|ve)\b         # clitics
    | \d+(?:,\d{3})+(?:\.\d+)? | \d*\.\d+                     # 1,234  3.5  .2
    | [\#@][a-z]\w*
    | \w+(?:[-/]\w+)*                                         # x-ray  and/or  1/2/2019  10mm
    | \.\.\. | -- | \S
    """,
    re.VERBOSE,
)
_PTB_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PTB_DROPPED = frozenset([*".?!,:;'`\"", "''", "``", "-", "--", "..."])
_PLAIN_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "--", "—": "--", "…": "..."})

PTB_SIGNATURE = "tok:ptb-like"


def ptb_tokens(text: str) -> list[str]:
    """Lower-case words as the COCO caption toolkit sees them, without punctuation.

    An imitation of Stanford's PTBTokenizer (corenlp 3.4.1, `-preserveLines -lowerCase`) and the list of marks that the
    toolkit removes afterwards; brackets stay as `-lrb-`, since the toolkit's list holds them in capitals only. Equal to
    the original on report prose; it differs on sentence boundaries within unusual abbreviations.
    """
    words = _PTB_TOKEN.findall(text.translate(_PLAIN_QUOTES).lower())
    return [_PTB_BRACKETS.get(word, word) for word in words if word not in _PTB_DROPPED]


_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = dict(
    zip(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
        map(str, range(11)),
        strict=True,
    )
)
_GROUPED_DIGITS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_NOT_A_WORD = re.compile(r"(?<!\d)\.|\.(?!\d)|[^\w.%+<>=-]|(?<!\w)[-=]+|[-=]+(?!\w)")

ANSWER_SIGNATURE = "norm:medm-answer"


def normalise_answer(text: str) -> str:
    """The form in which short answers are compared.

    Lower case, Unicode compatibility form, no punctuation, no articles, number words as digits, single blanks. Kept:
    decimal points and signs of comparison, percent, and hyphens within words (`t2-weighted`); "none" stays "none".
    """
    text = _GROUPED_DIGITS.sub("", unicodedata.normalize("NFKC", text).translate(_PLAIN_QUOTES).lower())
    text = _NOT_A_WORD.sub(" ", text.replace("'", ""))
    words = [_NUMBERS.get(word, word) for word in text.split() if word not in _ARTICLES]
    return " ".join(words)


def ngrams(words: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    """How often each run of `size` words occurs."""
    return Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def tokens_of(text: str | Sequence[str]) -> list[str]:
    """PTB-like tokens of a text; a list of tokens passes through."""
    return ptb_tokens(text) if isinstance(text, str) else list(text)
