"""Tokens of the COCO caption toolkit.

An imitation of Stanford's PTBTokenizer, written from the output of the program.

Expected values are in `tests/metrics/ptb_tokens.tsv`: texts and what the program (corenlp 3.4.1,
`-preserveLines -lowerCase`) and the toolkit's list of marks make of them.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

from medm.metrics.words import characters

PTB_SIGNATURE = "tok:ptb-like:2"

_ABBREVIATIONS = """
a.m adj adm adv al apr ariz assn asst atty aug ave bancorp bhd bldg blvd brig bros calif capt cf
cie cmdr co col colo conn corp cos cpl dec dept det dr elec ens esq est etc ext feb fla fri ft
ga gen gov hon inc ind insp intl jan jr jul jun kan ky lieut lt ltd maj mar md messrs mfg mich
minn mlle mme mo mon mont mr mrs ms mt natl neb nev nov oct okla p.m penn ph plc pres prof pty
pvt rd rep rev rt sen sep sept sgt spc sq sr st ste supt tel tenn thu thurs treas tue tues univ
va vs vt wed wis wyo
"""
"""Words that keep their full stop in any case."""
_CAPITALIZED = "ark del ill la mass miss ore pa tex wash"
"""Words that keep it only with a capital: in "NO FOCAL MASS." it is Massachusetts, in "no focal
mass." not."""
_BEFORE_NUMBERS = "art ca fig figs no nos op pp prop"
"""Words that keep it only before a number ("fig. 3")."""
_SENTENCE_STARTS = """
The A An In At There This That These It He She They We You But If As So Then When While What
Some Other Such More Many One Her Their Our After Since However Now Here Once Yet According
About Last
"""
"""Words before which the full stop of a single letter ends a sentence ("segment V. There is")."""
_CONTRACTIONS = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me",
    "gimme": "gim me", "'tis": "'t is", "'twas": "'t was",
}  # fmt: skip
_WRITTEN_AS = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
    "¢": "cents", "£": "#", "¤": "$", "₠": "$", "€": "$",
    "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "", "&apos;": "", "&nbsp;": "",
}  # fmt: skip
"""Tokens that the program prints otherwise than they are written. Brackets stay: the toolkit's list
of marks holds them in capitals only."""
_DROPPED = frozenset([*".?!,:;'`\"", "''", "``", "-", "--", "---", "----", "..."])
_KEPT_SYMBOLS = """
a1-a9 ac-b9 bc-3f6 55a-589 5be-60c 61b 61e-66a 66d-7f8 964-965 e3f-e4f 1fbd 2016-2017 201a
201e-2023 2030-2038 203b 203e-2042 2044 2070-20a0 20a4 20ac 2100-2152 2153-215e 2190-2bff
3001-3002 3012 30fb ff01-ffe1 ffe5-ffe6
"""
"""Code points (hexadecimal) of symbols and marks outside ASCII that the program prints; it drops
all others."""
_SOFT_HYPHEN = "\u00ad"


def ptb_tokens(text: str) -> list[str]:
    """Lower-case words as the COCO caption toolkit sees them, without punctuation.

    Equal to the original on report prose, also with accents, Cyrillic and Greek letters, units,
    subscripts and symbols. It differs in rare forms (names of files, elisions) and in scripts whose
    vowel signs the original drops. Scripts without spaces between words stay one token for each
    run, as in the original.
    """
    tokens: list[str] = []
    for found in _pattern().findall(text.replace(_SOFT_HYPHEN, "")):
        token = found.lower()
        written = _WRITTEN_AS.get(token, _CONTRACTIONS.get(token.replace("’", "'"), token))
        if token[0] in "'’":
            written = written.replace("’", "'")
        elif token[:3].casefold() == "n’t":
            written = "n't"
        tokens += [word for word in written.split() if word not in _DROPPED and _is_printed(word)]
    return tokens


@cache
def _pattern() -> re.Pattern[str]:
    """One alternative per kind of token, longer kinds first."""
    # The original knows the basic plane only: it drops emoji, and so are letters beyond.
    letter, word = f"[{characters('L', 'M')}]", f"[{characters('L', 'M', 'Nd')}]"
    joined = f"{word}+(?:(?:[-‐‑]|_(?!_)){word}+)*"
    ascii_word = "[A-Za-z0-9]+"
    abbreviations = "|".join(
        re.escape(item) for item in sorted(_ABBREVIATIONS.split(), key=len, reverse=True)
    )
    capitalized = "|".join(f"{item.capitalize()}|{item.upper()}" for item in _CAPITALIZED.split())
    before_numbers = "|".join(_BEFORE_NUMBERS.split())
    starts = "|".join(f"{item}|{item.upper()}" for item in _SENTENCE_STARTS.split())
    clitic = r"(?i:['’](?:s|m|d|re|ve|ll))"
    end = f"(?!{word})"
    return re.compile(
        "|".join(
            (
                r"</?[A-Za-z!?][^<>\n]*>",  # markup
                r"&(?:amp|lt|gt|quot|apos|nbsp);|&\#\d+;",
                r"(?i:https?://[^\s\"<>|]+)",
                r"[\w.+-]+@[\w.-]*[A-Za-z0-9]",
                r"(?i:-[lr][rsc]b-)",
                rf"(?:[A-Za-z]\.){{2,}}{end}",  # e.g.  p.m.  U.S.
                rf"(?i:ph\.d\.?){end}",
                # clear.Heart  L5.S1
                rf"{letter}{word}*(?:[.!?]{word}+)*[.!?]{letter}{word}*(?:-{word}+)*",
                rf"(?:(?i:{abbreviations})|{capitalized})\.{end}",
                rf"(?i:{before_numbers})\.(?=\s?\d)",
                rf"{joined}\.(?=[,;:])",  # normal.,
                rf"[A-Za-z]\.(?!\s+(?:{starts})(?:\s|$))(?!{letter})",  # B. Liver
                rf"\d+-\d+/\d+{end}",
                # mg/dl  1/2/2019
                rf"(?:{ascii_word}(?:-[A-Za-z]+)*/)+{ascii_word}(?:-[A-Za-z][A-Za-z0-9]*)*{end}",
                rf"\d+[.,]\d+{word}*(?:-{word}+)+",  # 1.5-cm
                r"[+-]?\d*(?:[.,:]\d+)+|[+-]\d+",  # 1,234  3.5  .2  12:30  -5
                rf"(?i:cannot|gonna|gotta|wanna|lemme|gimme|['’]tis|['’]twas){end}",
                rf"(?i:{letter}+(?=n['’]t{end})|n['’]t{end})",
                rf"['’]\d\ds{end}|'n'",
                f"{clitic}{end}",
                rf"(?i:c['’]est|qu['’](?:il|un)|(?:ma['’]am)){end}",
                rf"(?:[dlno]|[A-IK-XZ])(?!{clitic}{end})['’]{letter}{{2,}}",  # l'aorte  O'Brien
                rf"[dljyDLJY](?!{clitic}{end})['’](?={letter})",
                r"[A-Z]+&[A-Z]+",  # H&E
                joined,
                rf"\#{letter}+|@{word}+",
                r"[!?]{2,}|\*{2,}|_{2,}|\#{2,}|-{5,}|-{2,4}",
                r"[¹²³⁰-⁻₀-₋]+",
                r"\S",
            )
        )
    )


@cache
def _kept() -> frozenset[int]:
    """Code points of `_KEPT_SYMBOLS`."""
    kept: set[int] = set()
    for item in _KEPT_SYMBOLS.split():
        first, _, last = item.partition("-")
        kept.update(range(int(first, 16), int(last or first, 16) + 1))
    return frozenset(kept)


def _is_printed(token: str) -> bool:
    """Return False for a single symbol that the original cannot tokenize and drops."""
    if len(token) > 1 or token.isascii():
        return True
    category = unicodedata.category(token)
    return ord(token) < 0x10000 and (
        category[0] in "LM"
        or category == "Nd"
        or (category[0] not in "CZ" and ord(token) in _kept())
    )
