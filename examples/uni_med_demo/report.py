"""One table of what both models answered about volumes that were held out, beside what a constant
answer gets.

    python examples/uni_med_demo/report.py [folder, by default work_dirs/uni_med_demo] [folder with
    the records]

Reads scores/<model>/<task>/custom/predictions.jsonl of `medm eval`, test_<task>.json and
demo_train.json; writes results.json and results.md. Intervals and tests draw whole volumes. Boxes
are scored against the exact box.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from split import DATA, REPOSITORY, read

from medm.metrics.base import Clusters, MetricResult, Resampling
from medm.metrics.bleu import bleu
from medm.metrics.boxes import CODECS, Box, box_accuracy, box_iou, iou
from medm.metrics.classification import macro_f1
from medm.metrics.compare import Comparison, compare
from medm.metrics.match import normalized_match
from medm.metrics.rouge import rouge
from medm.metrics.words import normalize_answer

OUT = REPOSITORY / "work_dirs" / "uni_med_demo"
MODELS = ("dense", "experts")
CODEC = "uni-med"

Record: TypeAlias = Mapping[str, Any]
Score: TypeAlias = Callable[[Sequence[str], Sequence[Record], Resampling], MetricResult]
"""Replies and their records to one number."""

NOTES = (
    "Not for clinical use. This shows that the machinery learns and measures, and nothing about "
    "medicine.",
    "Slices of one volume resemble each other: intervals draw whole volumes, and tests exchange "
    "the replies about whole volumes (for macro-F1 and BLEU, p is how often the sign changes "
    "over the draws). Exchanging v volumes can give no p below 2 / 2^v: 0.03 for six, 0.5 for "
    "two. An interval of two volumes is no more than the values of the two, and a single volume "
    "has neither interval nor test.",
    "'Constant' always gives the reply that was most frequent in training for that question; for "
    "boxes the training box of that structure that fits all the others best. A model below it "
    "has not learned to look.",
    "The boxes are those of two held-out volumes, of lungs of one. No other division of the "
    "volumes is better: five of thirteen have boxes at all, and three of them are needed to "
    "learn from.",
    "One seed; as many p values as rows, not corrected for their number.",
)
"""What the table does not show; printed under it."""


@dataclass(frozen=True)
class Row:
    """One number of both models on the same questions."""

    task: str
    measure: str
    dense: MetricResult
    experts: MetricResult
    comparison: Comparison
    """Experts against dense."""
    constant: float
    volumes: int

    def as_json(self) -> dict[str, Any]:
        """Values without the scores of single items."""
        both = {"dense": self.dense.as_dict(), "experts": self.experts.as_dict()}
        for one in both.values():
            one.pop("per_item", None)
        constant = None if math.isnan(self.constant) else self.constant
        about = {"constant": constant, "n": self.dense.n, "volumes": self.volumes}
        return {
            "task": self.task,
            "measure": self.measure,
            **both,
            "difference": self.comparison.as_dict(),
            **about,
        }


def main(arguments: list[str]) -> int:
    """Write both files and print the table. Returns the exit status."""
    out = Path(arguments[0]) if arguments else OUT
    data = Path(arguments[1]) if len(arguments) > 1 else DATA
    training = read(data / "demo_train.json")
    table = rows(out, data, constants(training))
    setting = [f"{model}: {trained(out / model / 'loss.jsonl')}" for model in MODELS]
    notes = [*NOTES, *setting, *unreadable(out, data)]
    results = {"rows": [row.as_json() for row in table], "notes": notes}
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")
    page = "\n".join(
        [
            "# Experts against the dense baseline, on volumes that were held out",
            "",
            *markdown(table),
            "",
        ]
    )
    page += "\n".join(["", *(f"- {note}" for note in notes), ""])
    (out / "results.md").write_text(page, encoding="utf-8")
    print(page)
    return 0


# What is scored


def of_texts(metric: Callable[..., list[MetricResult]], which: int = 0) -> Score:
    """A metric of replies and answers; `which` of the numbers that it gives."""
    return lambda replies, records, resampling: metric(
        replies, [str(record["answer"]) for record in records], resampling=resampling
    )[which]


def of_boxes(metric: Callable[..., list[MetricResult]]) -> Score:
    """A metric of boxes against the exact ones."""
    return lambda replies, records, resampling: metric(
        replies, [tuple(record["box"]) for record in records], codec=CODEC, resampling=resampling
    )[0]


def class_f1(
    replies: Sequence[str], records: Sequence[Record], resampling: Resampling
) -> MetricResult:
    """Macro-F1 over the classes that occur; a reply that names none of them is a miss."""
    answers = [normalize_answer(str(record["answer"])) for record in records]
    return macro_f1([normalize_answer(reply) for reply in replies], answers, resampling=resampling)[
        0
    ]


def kind_is(*kinds: str) -> Callable[[Record], bool]:
    """Records of these question types; of all without any."""
    return lambda record: not kinds or record["question_type"] in kinds


LUNGS = ("left lung", "right lung")
SCORED: tuple[tuple[str, tuple[str, ...], str, Score], ...] = (
    ("vqa", (), "accuracy", of_texts(normalized_match)),
    ("cls", (), "accuracy", of_texts(normalized_match)),
    ("cls", (), "macro-F1", class_f1),
    ("rec", ("lesion",), "IoU", of_boxes(box_iou)),
    ("rec", ("lesion",), "IoU >= 0.5", of_boxes(box_accuracy)),
    ("rec", LUNGS, "IoU", of_boxes(box_iou)),
    ("rec", LUNGS, "IoU >= 0.5", of_boxes(box_accuracy)),
    ("reg", (), "accuracy", of_texts(normalized_match)),
    ("caption", (), "ROUGE-L", of_texts(rouge, 2)),
    ("caption", (), "BLEU-4", of_texts(bleu, 3)),
)
"""Task, its question types (all without any), how the number is called, and how it is computed."""


def rows(out: Path, data: Path, constant: Mapping[tuple[str, str], str]) -> list[Row]:
    """Every number for both models."""
    table = []
    for task, kinds, measure, score in SCORED:
        asked = read(data / f"test_{task}.json")
        kept = [index for index, record in enumerate(asked) if kind_is(*kinds)(record)]
        records = [asked[index] for index in kept]
        volumes = tuple(str(record["source_volume"]) for record in records)
        resampling = Resampling(clusters=Clusters("source_volume", volumes))
        dense, experts = (
            score([said[index] for index in kept], records, resampling)
            for said in (replies(out, model, task, len(asked)) for model in MODELS)
        )
        always = score(
            [constant[asked_for(record)] for record in records], records, Resampling(rounds=0)
        )
        name = f"{task} {'lungs' if kinds == LUNGS else kinds[0] + 's'}" if kinds else task
        against = compare(experts, dense, resampling)
        table.append(Row(name, measure, dense, experts, against, always.value, len(set(volumes))))
    return table


def replies(out: Path, model: str, task: str, expected: int) -> list[str]:
    """What a model said, in the order of the questions. A question that was refused counts as an
    empty reply.
    """
    file = out / "scores" / model / task / "custom" / "predictions.jsonl"
    if not file.is_file():
        raise SystemExit(f"{file}: not there; run medm eval with the {model} model")
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    said = {line["index"]: line.get("reply") or "" for line in lines}
    if sorted(said) != list(range(expected)):
        raise SystemExit(f"{file} answers {len(said)} of {expected} questions; run medm eval again")
    return [said[index] for index in range(expected)]


def asked_for(record: Record) -> tuple[str, str]:
    """What a constant answer may depend on: task and question type, but not where the type is the
    answer.
    """
    task = record["task"]
    return task, "" if task == "reg" else record["question_type"]


def constants(training: Iterable[Record]) -> dict[tuple[str, str], str]:
    """What was asked for -> the reply that was most frequent in training; for boxes the one that
    fits best.
    """
    answers: dict[tuple[str, str], list[str]] = {}
    for record in training:
        reply = record["conversations"][-1]["value"]
        answers.setdefault(asked_for(record), []).append(reply)
    return {
        key: best_box(texts) if key[0] == "rec" else Counter(texts).most_common(1)[0][0]
        for key, texts in answers.items()
    }


def best_box(texts: Sequence[str]) -> str:
    """The box with the largest mean IoU with all of them."""
    boxes = [_box(text) for text in texts]
    return max(texts, key=lambda text: sum(iou(_box(text), box) for box in boxes))


def _box(text: str) -> Box:
    box = CODECS[CODEC].parse(text).first
    if box is None:
        raise SystemExit(
            f"no box can be read from the training answer {text!r}; run prepare.py and split.py "
            "again"
        )
    return box


# What is said about it


def trained(log: Path) -> str:
    """Steps and last loss."""
    if not log.is_file():
        return "no loss.jsonl beside the model"
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    losses = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    return (
        f"{losses[-1][0]} steps, loss {losses[0][1]:.2f} at the first and {losses[-1][1]:.2f} at "
        "the last"
    )


def unreadable(out: Path, data: Path) -> list[str]:
    """How many replies held no box that could be read."""
    asked = read(data / "test_rec.json")
    missing = {
        model: sum(
            CODECS[CODEC].parse(reply).first is None
            for reply in replies(out, model, "rec", len(asked))
        )
        for model in MODELS
    }
    counts = ", ".join(f"{model} {count}" for model, count in missing.items())
    return [f"Replies without a readable box, which count as IoU 0: {counts} of {len(asked)}."]


def markdown(table: Sequence[Row]) -> list[str]:
    """The table's lines."""
    head = [
        "task",
        "measure",
        "dense",
        "experts",
        "experts - dense",
        "p",
        "constant",
        "n",
        "volumes",
    ]
    body = [
        [
            row.task,
            row.measure,
            _with_interval(row.dense),
            _with_interval(row.experts),
            _difference(row),
            "-" if row.volumes < 2 else _number(row.comparison.p_value),
            _number(row.constant),
            str(row.dense.n),
            str(row.volumes),
        ]
        for row in table
    ]
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    lines = [head, ["-" * width for width in widths], *body]
    return [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]


def _with_interval(result: MetricResult) -> str:
    interval = "-" if result.low != result.low else f"{result.low:.2f} to {result.high:.2f}"
    return f"{_number(result.value)} ({interval})"


def _number(value: float) -> str:
    """Two decimals; a dash where the measure is undefined for these answers."""
    return "-" if math.isnan(value) else f"{value:.2f}"


def _difference(row: Row) -> str:
    c = row.comparison
    interval = "-" if c.low != c.low else f"{c.low:+.2f} to {c.high:+.2f}"
    return f"{c.difference:+.2f} ({interval})" if c.difference == c.difference else "-"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
