"""Closed questions are parsed, and never answered by a substring."""

from __future__ import annotations

import pytest

from medm.metrics.base import Resampling
from medm.metrics.choice import (
    choice_accuracy,
    closed_accuracy,
    parse_choice,
    parse_decision,
    parse_wording,
    parse_yes_no,
)

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
        ("There is no doubt that it helps", None),
        ("No doubt it is", None),
        ("maybe", None),
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
        ("not the liver", None),
        ("It is not the left lung", None),
        ("It is not the liver but the left lung", "B"),
        ("This is the liver, not the left lung.", "A"),
        ("the lung rather than the liver", "C"),
        ("E.", None),
        ("", None),
    ],
)
def test_the_choice_is_read_and_not_guessed(text: str, letter: str | None) -> None:
    assert parse_choice(text, ORGANS) == letter


def test_letters_may_be_lower_case_and_options_may_repeat() -> None:
    assert parse_choice("(a)", {"a": "yes", "b": "no"}) == "A"
    assert parse_choice("yes", {"A": "yes", "B": "Yes"}) is None


@pytest.mark.parametrize(
    ("text", "decision"),
    [
        ("There is no doubt that it helps", None),
        ("No, it does not.", "no"),
        ("Maybe. More trials are needed, and there is no agreement.", "maybe"),
        ("The answer is maybe", "maybe"),
        ("There is no clear effect. Yes.", "yes"),
        ("yes, no or maybe", None),
        ("It may be that there is no effect", None),
    ],
)
def test_a_decision_is_leading_stated_or_last(text: str, decision: str | None) -> None:
    assert parse_decision(text) == decision
    assert parse_wording(text, {word: word for word in ("yes", "no", "maybe")}) == decision


def test_closed_accuracy_by_hand() -> None:
    predictions = ["yes", "abnormal", "No, none", "Left", "left side", "maybe"]
    references = ["Yes", "No", "no", "left", "left", "yes"]
    accuracy, unparsed = closed_accuracy(predictions, references, resampling=FAST)
    assert accuracy.per_item == [1, 0, 1, 1, 0, 0]
    assert unparsed.value == pytest.approx(
        2 / 4
    )  # "abnormal" and "maybe", of the four yes/no questions


def test_a_reference_that_only_begins_like_yes_or_no_is_text() -> None:
    references = ["true pelvis", "no contrast", "No.", "yes, on the left"]
    accuracy, unparsed = closed_accuracy(["true", "no", "no", "yes"], references, resampling=FAST)
    assert accuracy.per_item == [0, 0, 1, 1]
    assert unparsed.n == 2
    right = closed_accuracy(
        ["True pelvis.", "no contrast", "no", "Yes"], references, resampling=FAST
    )[0]
    assert right.value == 1


def test_an_empty_answer_to_an_empty_reference_is_no_hit() -> None:
    assert closed_accuracy([""], [""], resampling=FAST)[0].value == 0


def test_choice_accuracy_by_hand() -> None:
    predictions = ["B. left lung", "liver", "the spleen", "C"]
    references = ["B", "A. Liver", "A", "B"]
    accuracy, unparsed = choice_accuracy(
        predictions, references, options=[ORGANS] * 4, resampling=FAST
    )
    assert accuracy.per_item == [1, 1, 0, 0]
    assert unparsed.per_item == [0, 0, 1, 0]


def test_without_wordings_only_letters_are_read() -> None:
    accuracy, unparsed = choice_accuracy(
        ["(b)", "Answer: c", "liver"], ["b", "(c) x", "a."], resampling=FAST
    )
    assert accuracy.per_item == [1, 1, 0]
    assert unparsed.per_item == [0, 0, 1]


def test_an_unreadable_reference_is_an_error() -> None:
    with pytest.raises(ValueError, match="item 0: no choice can be read"):
        choice_accuracy(["A"], ["the spleen"], options=[ORGANS])
