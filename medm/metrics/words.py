"""Splitting of texts into comparable words, and detection of texts where this is impossible.

The tokens of the COCO caption toolkit are in `medm.metrics.ptb`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

from medm.metrics.base import as_references

_PLAIN_MARKS = str.maketrans(
    {
        "’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "−": "-", "‐": "-", "…": "...",
        "≥": ">=", "≤": "<=", "⩾": ">=", "⩽": "<=", "±": "+-", "×": "x", "⁄": "/", "、": ",",
            "。": ".",
    }
)  # fmt: skip
"""Typographic and East Asian marks that Unicode's compatibility form keeps, as marks of ASCII."""
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = dict(
    zip(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
        map(str, range(11)),
        strict=True,
    )
)
_GROUPED_DIGITS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_BARE_DECIMALS = re.compile(r"(?<![\w.])\.(?=\d)")
_COMPARISON = re.compile(r"\s*([<>]=?|=|\+-)\s*(?=[-\d])")
_FULL_STOP = re.compile(r"(?<!\d)\.|\.(?!\d)")
_HYPHEN = re.compile(r"(?<![\w<>=])-+(?!\d)|(?<=\w)-+(?!\w)|-{2,}|[<>=]+(?!\S)")
"""Hyphens and signs that neither join two words nor stand before a number."""
_OTHER_DIGIT = re.compile(r"[^\D0-9]")

_NO_SPACES = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
"""Scripts without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana and Han."""
_CHARACTER = re.compile(f"([{_NO_SPACES}])")
_RUN = re.compile(f"[{_NO_SPACES}]{{5,}}")
"""More characters in a row than nearly all words of these scripts have."""

ANSWER_SIGNATURE = "norm:medm-answer:2"
UNSEGMENTED = (
    "the references are in a script without spaces between words ({fraction:.0%} of their "
    "letters), and this tokenizer takes a whole phrase for one word: {instead}"
)


def plain_marks(text: str) -> str:
    """Unicode's compatibility form, with ASCII digits, quotes, dashes and comparison signs."""
    text = unicodedata.normalize("NFKC", text).translate(_PLAIN_MARKS)
    return _OTHER_DIGIT.sub(lambda found: str(unicodedata.digit(found.group())), text)


def normalize_answer(text: str) -> str:
    """Return the form in which short answers are compared.

    Unicode's compatibility form, case folded, no punctuation, no articles, number words as digits,
    single blanks. Kept: decimal points, the sign of a number, signs of comparison and percent,
    hyphens within words (`t2-weighted`), and an article that is all there is ("A" of a blood
    group). "none" stays "none". Empty for a text of punctuation alone.
    """
    text = _GROUPED_DIGITS.sub("", plain_marks(text).casefold()).replace("'", "")
    text = _COMPARISON.sub(r" \1", _BARE_DECIMALS.sub("0.", text))
    text = _punctuation().sub(" ", _FULL_STOP.sub(" ", text))
    words = _HYPHEN.sub(" ", text).split()
    content = [_NUMBERS.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(content or words)


def same_answer(prediction: str, reference: str) -> bool:
    """Return whether two texts are equal after `normalize_answer`.

    A reference of punctuation alone has to be repeated exactly.

    A text without any word equals nothing else: "." is not "the", and no reply is no answer.
    """
    mine, theirs = normalize_answer(prediction), normalize_answer(reference)
    if mine or theirs:
        return mine == theirs
    return prediction.strip() == reference.strip() != ""


def answer_words(text: str) -> list[str]:
    """Return the words of a normalized answer.

    In scripts without spaces each character is a word (as in CMRC 2018).
    """
    return _CHARACTER.sub(r" \1 ", normalize_answer(text)).split()


def ngrams(words: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    """Count the runs of `size` words."""
    return Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def characters(*categories: str) -> str:
    """Return the characters of Unicode categories in the basic plane, for a class of `re`."""
    ranges: list[list[int]] = []
    for code in range(0x10000):
        if not unicodedata.category(chr(code)).startswith(categories):
            continue
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in ranges)


def unsegmented(references: Sequence[str | Sequence[str]], instead: str) -> str | None:
    """Return the reason why words of these references cannot be counted, or None.

    The reason is a script without spaces.

    Texts whose words were separated by blanks beforehand can be counted.

    Args:
        references: of each item, as metrics take them.
        instead: what the reader may use in place of the metric.
    """
    fraction = _fraction(references, lambda text: sum(map(len, _RUN.findall(text))))
    return UNSEGMENTED.format(fraction=fraction, instead=instead) if fraction > 0.1 else None


def fraction_outside_ascii(references: Sequence[str | Sequence[str]]) -> float:
    """Fraction of the letters of the references that are not a to z."""
    return _fraction(
        references, lambda text: sum(letter.isalpha() and not letter.isascii() for letter in text)
    )


def fraction_outside_latin(references: Sequence[str | Sequence[str]]) -> float:
    """Fraction of the letters of the references that are not Latin, with or without accents."""
    return _fraction(
        references,
        lambda text: sum(
            c.isalpha() and c > "\u024f" and not "\u1e00" <= c <= "\u1eff" for c in text
        ),
    )


def _fraction(references: Sequence[str | Sequence[str]], count: Callable[[str], int]) -> float:
    """Counted letters of all letters."""
    texts = [text for item in as_references(references) for text in item]
    letters = sum(letter.isalpha() for text in texts for letter in text)
    return sum(map(count, texts)) / letters if letters else 0.0


@cache
def _punctuation() -> re.Pattern[str]:
    """Return all characters but word characters, decimal points, percent, signs and hyphens.

    Word characters include their vowel signs and accents.
    """
    return re.compile(rf"[^\w{characters('M')}.%+<>=-]")
