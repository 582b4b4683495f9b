"""Deterministic chat templates: a prompt is the same on every day and in every run."""

from __future__ import annotations

import re

from medm.errors import RecipeError

DATE = "26 Jul 2024"
"""Day that a template's clock shows: the one that Llama 3's published template falls back to."""

_FIELDS = {
    "a": "Fri", "A": "Friday", "w": "5", "u": "5", "d": "26", "b": "Jul", "h": "Jul", "B": "July",
        "m": "07",
    "y": "24", "Y": "2024", "G": "2024", "C": "20", "H": "00", "I": "12", "M": "00", "S": "00",
        "f": "000000",
    "p": "AM", "j": "208", "U": "29", "W": "30", "V": "30", "z": "", "Z": "", "s": "1721952000",
    "c": "Fri Jul 26 00:00:00 2024", "x": "07/26/24", "X": "00:00:00", "D": "07/26/24",
        "F": "2024-07-26",
    "T": "00:00:00", "R": "00:00", "e": "26", "n": "\\n", "t": "\\t",
}  # fmt: skip
"""Fields of strftime at midnight of `DATE`, in the C locale (POSIX strftime; Python's documentation
of datetime)."""

_UNPADDED = {
    "d": "26",
    "m": "7",
    "H": "0",
    "I": "12",
    "M": "0",
    "S": "0",
    "j": "208",
    "y": "24",
    "e": "26",
}
"""The same without leading zeros (`%-d`)."""

_RANDOM = re.compile(r"\|\s*random\b|\blipsum\s*\(")


def fix_clock(template: str) -> str:
    """Return a chat template whose `strftime_now` shows `DATE`; any other template unchanged.

    A macro of that name takes the place of the function that transformers offers, so that the saved
    template gives the same prompt in transformers, too.

    Raises:
        RecipeError: the template draws random numbers.
    """
    if found := _RANDOM.search(template):
        raise RecipeError(
            f"the chat template draws at random ({found.group().strip()!r}), so that no prompt is "
            "the same twice; set model.llm.chat_template to a template that does not"
        )
    if "strftime_now" not in template or template.startswith(_CLOCK):
        return template
    return _CLOCK + template


def _clock() -> str:
    fields = [(f"%-{key}", value) for key, value in _UNPADDED.items()]
    fields += [(f"%{key}", value) for key, value in _FIELDS.items()]
    # Characters of Unicode's private use area protect the per cent sign that %% stands for.
    steps = [("%%", "\\ue002"), *fields, ("\\ue002", "%")]
    filters = "".join(f"|replace('{old}', '{new}')" for old, new in steps)
    # An expression at its end, since Jinja drops the line break that follows a block.
    return "{%- macro strftime_now(format) %}{{ format" + filters + " }}{% endmacro %}{{ '' }}"


_CLOCK = _clock()
