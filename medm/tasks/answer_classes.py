"""Answers that are published as classes, and the maps from classes to texts.

Conditional reasoning (Zhan et al., ACM MM 2020) and MOTOR give the answer of a question as
`{"labels": [3], "scores": [1.0]}` or as a number, in the list of its type: `close_label2ans` and
`open_label2ans` (.json or .pkl, in the folder or its `cache/`), or `trainval_label2ans` for both.
The published lists may hold answers of test questions too.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from medm.errors import DataError
from medm.tasks.benchmark_files import read_json
from medm.tasks.plain_pickle import read_plain_pickle
from medm.types import ANSWER_BRANCHES, JsonObject

UNLISTED = "[in no published list of answers]"
"""Answer of a question whose class is not published: its text is not in the files."""

_MAPS = {"closed": "close_label2ans", "open": "open_label2ans"}
_JOINT = "trainval_label2ans"
_PLACES = ("{}.json", "{}.pkl", "cache/{}.json", "cache/{}.pkl")


class AnswerMaps:
    """The maps of a folder, read when the first class is decoded.

    Args:
        folder: of the benchmark.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def lists(self) -> dict[str, list[str]]:
        """Answers of each branch in the order of their labels.

        Raises:
            DataError: a map is missing, or is no list of texts.
        """
        files = {name: self._find(stem) for name, stem in _MAPS.items()}
        joint = self._find(_JOINT)
        found: dict[str, list[str]] = {}
        for name in ANSWER_BRANCHES:
            file = files[name] or joint
            if file is None:
                raise DataError(
                    f"answers are numbers of classes, and {_MAPS[name]} (.json or .pkl, here or in "
                    f"cache/) is missing in {self.folder}; expected it, or {_JOINT}",
                    file=self.folder / f"{_MAPS[name]}.json",
                )
            found[name] = _read(file)
        return found

    def decoded(self, answer: object, answer_type: str, *, file: Path, index: int) -> JsonObject:
        """Return `answer`, the text of the best class, and `answer_scores`, all of them by text.

        A question without a class has `UNLISTED` as answer, and `unlisted` in place of scores.

        Args:
            answer: a number, or labels and their scores.
            answer_type: closed or open.
            file: of the question, for messages.
            index: of the question in it.

        Raises:
            DataError: as `lists`, or labels that the map does not have.
        """
        if answer_type not in ANSWER_BRANCHES:
            raise DataError(
                f"expected {' or '.join(ANSWER_BRANCHES)}, found {answer_type!r:.30}",
                file=file, index=index, field="answer_type",
            )  # fmt: skip
        given = answer if isinstance(answer, dict) else {"labels": [answer], "scores": [1.0]}
        labels, scores = (given.get(name) or [] for name in ("labels", "scores"))
        answers = self.lists[answer_type]
        if (
            not isinstance(labels, list)
            or not isinstance(scores, list)
            or len(labels) != len(scores)
            or not all(type(label) is int and 0 <= label < len(answers) for label in labels)
            or not all(type(score) in (int, float) and 0 <= score <= 1 for score in scores)
        ):
            raise DataError(
                f"expected labels from 0 to {len(answers) - 1} ({answer_type} answers) and as many "
                f"scores from 0 to 1, found {str(answer)[:60]}",
                file=file, index=index, field="answer",
            )  # fmt: skip
        by_text: dict[str, float] = {}
        for label, score in zip(labels, scores, strict=True):
            if score:
                by_text[answers[label]] = max(score, by_text.get(answers[label], 0.0))
        if not by_text:
            return {"answer": UNLISTED, "unlisted": True}
        return {"answer": max(by_text, key=by_text.__getitem__), "answer_scores": by_text}

    def _find(self, stem: str) -> Path | None:
        paths = (self.folder / place.format(stem) for place in _PLACES)
        return next((path for path in paths if path.is_file()), None)


def _read(file: Path) -> list[str]:
    """Return the answers of a map: a list, or an object of numbers and answers."""
    value = read_plain_pickle(file) if file.suffix == ".pkl" else read_json(file)
    if isinstance(value, dict):
        by_number = {str(key): answer for key, answer in value.items()}
        numbers = [str(number) for number in range(len(by_number))]
        value = [by_number[key] for key in numbers] if by_number.keys() == {*numbers} else None
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise DataError("expected a list of answers in the order of their labels", file=file)
    return [" ".join(answer.split()) for answer in value]
