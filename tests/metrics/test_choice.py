"""Closed questions are parsed, and never answered by a substring."""

from __future__ import annotations

import pytest

from medm.metrics.base import Resampling
from medm.metrics.choice import choice_accuracy, closed_accuracy, parse_choice, parse_yes_no

FAST = Resampling(rounds=20)
ORGANS = {"A": "Liver", "B": "left lung", "C": "lung", "D": "None of the above"}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", True),
        ("yes, there is", True),
        ("No.", False),
        ("no effusion is seen", False),
        ("The answer is no.", False),
        ("Looking at the image, the heart is big. Yes.", True),
        ("Answer: Yes", True),
        ("**No**", False),
        ("abnormal", None),
        ("normal", None),
        ("unknown", None),
        ("The lung is abnormal", None),
        ("There is no effusion", None),
        ("nodule", None),
        ("yes or no", None),
        ("", None),
        ("Yesterday", None),
    ],
)
def test_yes_and_no_are_read_and_not_guessed(text: str, answer: bool | None) -> None:
    assert parse_yes_no(text) is answer


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("(b) left lung", "B"),
        ("B. Liver", "B"),
        ("B) something", "B"),
        ("B: left lung", "B"),
        ("**A**", "A"),
        ("Liver", "A"),
        ("the liver", "A"),
        ("The answer is B.", "B"),
        ("The correct option is (c), because of the air", "C"),
        ("It is the left lung that is seen", "B"),
        ("The lung", "C"),
        ("I think (A)", "A"),
        ("A large mass in the aorta. A.", None),
        ("A mass", None),
        ("Aorta. A", None),
        ("e.g. the spleen", None),
        ("(A) or (B)? unclear", "A"),
        ("either the liver or the lung", None),
        ("E.", None),
        ("", None),
    ],
)
def test_the_choice_is_read_and_not_guessed(text: str, letter: str | None) -> None:
    assert parse_choice(text, ORGANS) == letter


def test_letters_may_be_lower_case_and_options_may_repeat() -> None:
    assert parse_choice("(a)", {"a": "yes", "b": "no"}) == "A"
    assert parse_choice("yes", {"A": "yes", "B": "Yes"}) is None


def test_closed_accuracy_by_hand() -> None:
    predictions = ["yes", "abnormal", "No, none", "Left", "left side", "maybe"]
    references = ["Yes", "No", "no", "left", "left", "yes"]
    accuracy, unparsed = closed_accuracy(predictions, references, resampling=FAST)
    assert accuracy.per_item == [1, 0, 1, 1, 0, 0]
    assert unparsed.value == pytest.approx(2 / 4)  # "abnormal" and "maybe", of the four yes/no questions


def test_an_empty_answer_to_an_empty_reference_is_no_hit() -> None:
    assert closed_accuracy([""], [""], resampling=FAST)[0].value == 0


def test_choice_accuracy_by_hand() -> None:
    predictions = ["B. left lung", "liver", "the spleen", "C"]
    references = ["B", "A. Liver", "A", "B"]
    accuracy, unparsed = choice_accuracy(predictions, references, options=[ORGANS] * 4, resampling=FAST)
    assert accuracy.per_item == [1, 1, 0, 0]
    assert unparsed.per_item == [0, 0, 1, 0]


def test_without_wordings_only_letters_are_read() -> None:
    accuracy, unparsed = choice_accuracy(["(b)", "Answer: c", "liver"], ["b", "(c) x", "a."], resampling=FAST)
    assert accuracy.per_item == [1, 1, 0]
    assert unparsed.per_item == [0, 0, 1]


def test_an_unreadable_reference_is_an_error() -> None:
    with pytest.raises(ValueError, match="item 0: no choice can be read"):
        choice_accuracy(["A"], ["the spleen"], options=[ORGANS])
