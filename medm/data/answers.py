"""Answers as classes: lists of them from training records, and the targets of a question."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from medm.errors import DataError
from medm.files import atomic_write_text
from medm.metrics.words import normalize_answer
from medm.types import ANSWER_BRANCHES, IGNORE_INDEX


class AnswerTarget(NamedTuple):
    """Target of one question."""

    branch: int
    """Type of the question as a place in `ANSWER_BRANCHES`; `IGNORE_INDEX` where it is unknown."""
    scores: list[float]
    """For the answers of all lists in turn, 0 for those that are not right. An answer in no list
    leaves 0 everywhere: none of the classes is right."""
    listed: bool
    """Whether an answer is in the list of its branch."""


def branch_of(answer_type: str) -> int:
    """Return the branch of an `answer_type`, CLOSED or OPEN in any case.

    Raises:
        DataError: another type.
    """
    name = answer_type.strip().casefold()
    if name not in ANSWER_BRANCHES:
        raise DataError(
            f"expected {' or '.join(ANSWER_BRANCHES)}, found {answer_type!r:.30}",
            field="answer_type",
        )
    return ANSWER_BRANCHES.index(name)


def answer_target(
    scores: Mapping[str, float], answer_type: str | None, lists: Mapping[str, Sequence[str]]
) -> AnswerTarget:
    """Return what a question teaches.

    An answer is the class of the same text, or else the first one that is equal after
    `medm.metrics.words.normalize_answer` ("Yes" and "yes").

    Args:
        scores: right answers and their scores; empty where none is known.
        answer_type: of the question.
        lists: answers of the model by branch.

    Raises:
        DataError: an unknown type.
    """
    empty = [[0.0] * len(lists[name]) for name in ANSWER_BRANCHES]
    if answer_type is None:
        return AnswerTarget(IGNORE_INDEX, [*empty[0], *empty[1]], False)
    branch = branch_of(answer_type)
    exact, alike = _places(tuple(lists[ANSWER_BRANCHES[branch]]))
    listed = False
    for answer, score in scores.items():
        place = exact.get(answer.strip(), alike.get(normalize_answer(answer)))
        if place is not None:
            empty[branch][place] = max(empty[branch][place], score)
            listed = True
    return AnswerTarget(branch, [*empty[0], *empty[1]], listed)


@lru_cache(maxsize=4)
def _places(answers: tuple[str, ...]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the place of each answer by its text, and by its normalized text."""
    exact: dict[str, int] = {}
    alike: dict[str, int] = {}
    for place, answer in enumerate(answers):
        exact.setdefault(answer.strip(), place)
        if key := normalize_answer(answer):
            alike.setdefault(key, place)
    return exact, alike


def collect_answers(answers: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the answers of each branch, the most frequent first.

    Answers that are equal after `normalize_answer` are one class, in its most frequent spelling.

    Args:
        answers: `answer_type` and text of each record to train on.

    Raises:
        DataError: an unknown type, or a branch without answers.
    """
    spellings: dict[str, dict[str, Counter[str]]] = {name: {} for name in ANSWER_BRANCHES}
    for answer_type, text in answers:
        text = " ".join(text.split())
        known = spellings[ANSWER_BRANCHES[branch_of(answer_type)]]
        known.setdefault(normalize_answer(text) or text, Counter())[text] += 1
    for name, known in spellings.items():
        if not known:
            raise DataError(f"no record has the answer_type {name!r} and an answer")
    return {
        name: [
            counts.most_common(1)[0][0]
            for counts in sorted(known.values(), key=lambda counts: -counts.total())
        ]
        for name, known in spellings.items()
    }


def write_answers(path: Path, lists: Mapping[str, Sequence[str]]) -> None:
    """Write the lists as `model.answers.file` takes them."""
    content = {name: list(lists[name]) for name in ANSWER_BRANCHES}
    atomic_write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
