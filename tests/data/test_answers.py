"""Answers as classes: lists from training records, targets of questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medm.data.answers import answer_target, collect_answers
from medm.data.studies import Studies
from medm.errors import DataError
from medm.types import IGNORE_INDEX
from tests.data.test_studies import example, processor, read
from tests.data.tiny import PAD

LISTS = {"closed": ["Yes", "no", "yes"], "open": ["left lung", "2"]}


@pytest.mark.parametrize(
    ("scores", "kind", "expected"),
    [
        ({"yes": 1.0}, "CLOSED", (0, [0, 0, 1, 0, 0], True)),  # the same letters come first
        ({"YES.": 1.0}, "closed", (0, [1, 0, 0, 0, 0], True)),
        ({"the left lung": 1.0, "two": 0.3}, " Open ", (1, [0, 0, 0, 1, 0.3], True)),
        ({"left": 1.0}, "open", (1, [0] * 5, False)),
        ({"left lung": 1.0}, "closed", (0, [0] * 5, False)),  # in the other list
        ({"yes": 0.2, "YES": 0.4, "Yes": 0.1}, "closed", (0, [0.4, 0, 0.2, 0, 0], True)),
        ({"yes": 1.0}, None, (IGNORE_INDEX, [0] * 5, False)),
    ],
)
def test_targets(scores: dict[str, float], kind: str | None, expected: Any) -> None:
    assert tuple(answer_target(scores, kind, LISTS)) == expected


def test_lists_hold_each_answer_once_the_frequent_first() -> None:
    answers = [
        ("CLOSED", "no"), ("closed", "Yes"), ("closed", "yes "), ("closed", "Yes"),
        ("open", "the  left lung"), ("OPEN", "?"), ("open", "Left lung."), ("open", "left lung"),
        ("open", "left lung"),
    ]  # fmt: skip
    assert collect_answers(answers) == {"closed": ["Yes", "no"], "open": ["left lung", "?"]}
    with pytest.raises(DataError, match="expected closed or open, found 'yes/no'"):
        collect_answers([("yes/no", "yes")])
    with pytest.raises(DataError, match="no record has the answer_type 'open'"):
        collect_answers([("closed", "yes")])


def test_a_record_has_several_right_answers() -> None:
    scores = {"a": 0.5, "b": 1}
    study = read({"image": "a", "question": "q", "answer_scores": scores, "answer_type": "open"})
    assert (study.answer, study.answer_scores) == ("b", {"a": 0.5, "b": 1.0})
    for wrong, reason in (([], "found list"), ({}, "found dict"), ({"a": 0}, "found 0"),
                          ({"a": True}, "found True")):  # fmt: skip
        with pytest.raises(DataError, match=reason):
            read({"image": "a", "question": "q", "answer": "a", "answer_scores": wrong})


def test_a_batch_of_questions_by_hand() -> None:
    changes: dict[str, Any] = {"answers": LISTS, "reads_text": False, "labels": ()}
    pipeline = Studies(processor(**changes))
    first = example({"question": "ab?", "answer": "NO", "answer_type": "closed"}, **changes)
    second = example({"question": "c", "answer": "new", "answer_type": "open"}, **changes)
    batch = pipeline.eval_collator()([first, None, second])
    assert batch["question_ids"].tolist() == [[1, 97, 98, 63, 2], [1, 99, 2, PAD, PAD]]
    assert batch["question_mask"].sum(dim=1).tolist() == [5, 3]
    assert batch["answer_branches"].tolist() == [0, 1]
    assert batch["answer_targets"].tolist() == [[0, 1, 0, 0, 0], [0] * 5]
    assert "input_ids" not in batch
    assert pipeline.length(first) == 5
    assert [one.text for one in pipeline.preview(second)] == ["\1c\2", "\nopen: none of the list"]
    empty = pipeline.eval_collator()([None])
    assert (empty["question_ids"].shape, empty["answer_targets"].shape) == ((0, 2), (0, 5))

    asked = Studies(processor(**changes), inference=True)
    sample = asked.read({"image": "a", "question": "ab?"}, file=Path("a"), index=0)
    made = asked.make_example(sample, {})
    assert "answer_targets" not in asked.eval_collator()([made])
    assert made.answer_branch == IGNORE_INDEX
    assert asked.counts(sample)["question"] == 1


def test_a_question_without_its_type_is_refused() -> None:
    changes: dict[str, Any] = {"answers": LISTS, "reads_text": False}
    for fields in ({"question": "q", "answer": "a"}, {"report": "r"}):
        with pytest.raises(DataError, match="closed or open") as caught:
            example(fields, **changes)
        assert caught.value.field == "answer_type"
    with pytest.raises(DataError, match="found 'yes/no'"):
        example({"question": "q", "answer": "a", "answer_type": "yes/no"}, **changes)
    json.dumps(example({"report": "r"}, answers=LISTS).answer_targets)  # texts beside questions
