"""Words and phrases of replies with masks, by hand."""

from __future__ import annotations

import re

import pytest

from medm.inference.grounded_text import GroundedText, grounded_text
from medm.models.lvlm.processing import LocatedToken, Reply


def read(text: str, *, phrase_tokens: bool = True, letters: str | None = None) -> GroundedText:
    """A reply in which each mark is a control token, except the letters of one of them."""
    names = ["[SEG]", *(["<p>", "</p>"] if phrase_tokens else [])]
    found = [
        LocatedToken(match[0], index=0, start=match.start())
        for match in re.finditer("|".join(map(re.escape, names)), text)
        if match[0] != letters
    ]
    return grounded_text(Reply(text, tuple(found)), phrase_tokens=phrase_tokens)


@pytest.mark.parametrize("phrase_tokens", [True, False])
@pytest.mark.parametrize(
    ("reply", "text", "phrases", "unmasked"),
    [
        # Marked phrases, each with its mask.
        (
            "<p> left lung </p> [SEG] and <p>heart</p>[SEG].",
            "left lung and heart.",
            ["left lung", "heart"],
            0,
        ),
        # A report as one phrase (UniBiomed's grounded reports).
        (
            "<p> nodule. a small nodule. </p> [SEG]",
            "nodule. a small nodule.",
            ["nodule. a small nodule."],
            0,
        ),
        # Several masks of one phrase; a phrase without a mask.
        (
            "<p>kidneys</p>[SEG][SEG] and <p>liver</p>.",
            "kidneys and liver.",
            ["kidneys", "kidneys"],
            1,
        ),
        # Bare tokens: the sentence that holds it, in the middle, at the end, after the full stop.
        ("No pain. It is [SEG]. Done.", "No pain. It is. Done.", ["It is."], 0),
        ("A 3.5 cm mass [SEG] is seen", "A 3.5 cm mass is seen", ["A 3.5 cm mass is seen"], 0),
        ("Liver is large. [SEG] Spleen?", "Liver is large. Spleen?", ["Liver is large."], 0),
        ("Findings:\n[SEG] lesion\n\nNo more", "Findings:\nlesion\n\nNo more", ["lesion"], 0),
        ("[SEG]", "", [""], 0),
        ("Nothing to see.", "Nothing to see.", [], 0),
        # A mark that is not directly before the token is not its phrase.
        ("<p>liver</p> is fine, mass [SEG]", "liver is fine, mass", ["liver is fine, mass"], 1),
    ],
)
def test_the_phrase_of_each_mask(
    reply: str, text: str, phrases: list[str], unmasked: int, phrase_tokens: bool
) -> None:
    found = read(reply, phrase_tokens=phrase_tokens)
    assert found.text == text
    assert [phrase.text for phrase in found.phrases] == phrases
    assert [text[phrase.start : phrase.end] for phrase in found.phrases] == phrases
    assert found.unmasked == unmasked
    assert found.raw == reply


def test_letters_that_look_like_marks_stay_letters() -> None:
    assert read("say [SEG] or <p>x</p>", letters="[SEG]").phrases == ()
    assert read("say [SEG]", letters="[SEG]").text == "say [SEG]"
    half = read("a <p> b [SEG]", phrase_tokens=False)  # never closed: no mark
    assert half.text == "a <p> b"
    assert read("a <p> b [SEG]").text == "a b"  # the token is none of the words
