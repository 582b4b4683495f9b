"""Text-only questions: MedQA and PubMedQA."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from medm.errors import DataError
from medm.metrics.base import MetricResult
from medm.metrics.classification import accuracy
from medm.tasks import prompts, scoring
from medm.tasks.base import Record, Task, make_sample, pick_template, scoped
from medm.tasks.benchmark_files import field_of, read_json_map, read_jsonl, require
from medm.types import Sample


class MedQA(Task):
    """USMLE questions with their options (Uni-Med leaves the options out, and never scores)."""

    tag = "qa"
    splits = ("train", "dev", "test")
    layout = "questions/US/{train,dev,test}.jsonl with question, options and answer"

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        file = require(folder, f"questions/US/{split}.jsonl", f"{split}.jsonl", layout=self.layout)
        for index, row in enumerate(read_jsonl(file)):
            question = field_of(row, "question", str, file=file, index=index)
            answer = field_of(row, "answer", str, file=file, index=index)
            options = {
                str(key): str(value) for key, value in self._options(row, file, index).items()
            }
            letter = row.get("answer_idx") or next(
                (key for key, value in options.items() if value == answer), None
            )
            if letter not in options:
                raise DataError(
                    "the answer is none of the options", file=file, index=index, field="answer"
                )
            yield make_sample(
                pick_template(prompts.CHOICE, rng).format(
                    question=question, options=prompts.lettered(options)
                ),
                id=f"medqa:{split}:{index}",
                tag=self.tag,
                answer=f"{letter}. {options[letter]}",
                options=options,
                answer_choice=letter,
            )

    def _options(self, row: dict[str, object], file: Path, index: int) -> dict[str, str]:
        """A map, or a list of {key, value} (the Chinese part and some copies)."""
        options = field_of(row, "options", (dict, list), file=file, index=index)
        return (
            options
            if isinstance(options, dict)
            else {item["key"]: item["value"] for item in options}
        )

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        return scoring.choices(records, self.resampling_of(records))


class PubMedQA(Task):
    """Questions of paper titles, with the abstract (Uni-Med leaves it out)."""

    tag = "qa"
    splits = ("train", "test")
    layout = (
        "train_set.json and test_set.json (or ori_pqal.json with test_ground_truth.json): id -> "
        "QUESTION, CONTEXTS, final_decision"
    )
    decisions = ("yes", "no", "maybe")

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        file = require(folder, f"{split}_set.json", "ori_pqal.json", layout=self.layout)
        rows = read_json_map(file)
        if file.name == "ori_pqal.json":
            held_out = read_json_map(require(folder, "test_ground_truth.json", layout=self.layout))
            rows = {key: row for key, row in rows.items() if (key in held_out) == (split == "test")}
        for index, (key, row) in enumerate(rows.items()):
            question = field_of(row, "QUESTION", str, file=file, index=index)
            context = field_of(row, "CONTEXTS", list, file=file, index=index)
            decision = field_of(row, "final_decision", str, file=file, index=index).strip().lower()
            if decision not in self.decisions:
                raise DataError(
                    f"expected {self.decisions}", file=file, index=index, field="final_decision"
                )
            yield make_sample(
                pick_template(prompts.CONTEXT_QA, rng).format(
                    question=question, context="\n".join(map(str, context))
                ),
                id=str(key),
                tag=self.tag,
                answer=decision,
            )

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        """Score the decision that an answer states, if it states only one.

        The accuracy of the first word is reported beside it.
        """
        results = scoring.classes(records, self.decisions, self.resampling_of(records))
        first_words = [
            record["prediction"].strip().lower().split(" ")[0].strip(".,:;!") for record in records
        ]
        answers = [str(record["answer"]) for record in records]
        leading = accuracy(first_words, answers, resampling=self.resampling_of(records))
        return [*results, *(scoped("first-word", leading))]
