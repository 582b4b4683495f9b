"""One table of retrieval and labels on volumes that were held out: without knowledge, with a graph
and a memory, and with a graph whose names have changed places.

    python examples/motor_demo/report.py [folder, by default work_dirs/motor_demo]
                                         [folder of the data]

Reads <model>-<seed>/scores/*/predictions.jsonl of `medm eval` and studies_test.jsonl of studies.py;
writes results.json and results.md. A value is the mean over the seeds. Intervals (95 %) draw whole
volumes, the same for all models, and seeds. What the page claims follows from them.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from studies import DATA, ORGANS, REPOSITORY

from medm.metrics.base import Resampling
from medm.metrics.classification import auroc
from medm.tasks.retrieval import rank_places

OUT = REPOSITORY / "work_dirs" / "motor_demo"
MODELS = ("plain", "knowledge", "shuffled")
SEEDS = (1, 2, 3)
COMPARED = (("knowledge", "plain"), ("knowledge", "shuffled"))
ROUNDS = 1000
NOTES = (
    "Not for clinical use. This shows that the software learns and measures, and nothing about "
    "medicine: a handful of volumes.",
    "`knowledge` and `shuffled` have more weights than `plain`: their image tokens attend to the "
    "graph and to retrieved triplets. Only the difference to `shuffled`, which has the same "
    "weights and the same memory, is one of what the graph says.",
    "Intervals draw volumes and seeds. Six volumes and three seeds make them rough. Aorta, liver "
    "and spleen are present in slices of a single held-out volume; a draw without it leaves them "
    "out of the mean.",
    "A report is right for every image of which the same is known. `chance` ranks at random.",
    "Spine CT and abdominal MR are never trained on.",
)
"""Limits of the table; printed under it."""


@dataclass(frozen=True)
class Run:
    """What one trained model gave for N held-out studies."""

    image_ranks: np.ndarray
    """(N,) rank from 1 of the best right report of each image."""
    text_ranks: np.ndarray
    """(N,) rank of the best right image of each report."""
    scores: np.ndarray
    """(N, organs)."""


@dataclass(frozen=True)
class Value:
    """A mean over seeds and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Row:
    """A measure of all models."""

    measure: str
    values: dict[str, Value]
    seeds: dict[str, list[float]]
    chance: float
    differences: dict[str, Value]
    """"knowledge - plain" and so on."""


@dataclass(frozen=True)
class Truth:
    """What is known of the held-out studies."""

    volumes: list[str]
    relevant: list[list[int]]
    """Studies with the report of each."""
    organs: np.ndarray
    """(N, organs) 1, 0 or nan."""

    @classmethod
    def read(cls, file: Path) -> Truth:
        """Read the records of studies.py."""
        records = lines_of(file)
        places: dict[str, list[int]] = {}
        for place, record in enumerate(records):
            places.setdefault(record["report"], []).append(place)
        return cls(
            [record["patient"] for record in records],
            [places[record["report"]] for record in records],
            np.array([[record["labels"][organ] for organ in ORGANS] for record in records], float),
        )


Measure = Callable[[Run, Truth, np.ndarray], float]
"""A score of a run on some rows, which may come several times."""


def recall(side: str, k: int) -> Measure:
    """Recall at k of images or texts as queries."""
    return lambda run, _, rows: float((getattr(run, f"{side}_ranks")[rows] <= k).mean())


def label_auroc(run: Run, truth: Truth, rows: np.ndarray) -> float:
    """Mean AUROC of the organs that are present and absent among the rows; nan without any."""
    return auroc(run.scores[rows], truth.organs[rows], resampling=Resampling(rounds=0))[0].value


MEASURES: dict[str, Measure] = {
    "image to report, R@1": recall("image", 1),
    "image to report, R@5": recall("image", 5),
    "report to image, R@1": recall("text", 1),
    "report to image, R@5": recall("text", 5),
    "organs, AUROC": label_auroc,
}


def main(arguments: list[str]) -> int:
    """Write both files and print the page. Returns the exit status."""
    out = Path(arguments[0]) if arguments else OUT
    data = Path(arguments[1]) if len(arguments) > 1 else DATA
    truth = Truth.read(data / "studies_test.jsonl")
    runs = {
        model: [read_run(out / f"{model}-{seed}" / "scores", truth) for seed in SEEDS]
        for model in MODELS
    }
    rows = table(runs, truth)
    trained = [f"{model}: {losses(out, model)}" for model in MODELS]
    claims = [sentence(row, name) for name in rows[0].differences for row in rows]
    content = {"rows": [asdict(row) for row in rows], "claims": claims, "notes": NOTES}
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Pretraining with and without knowledge, on held-out volumes", "",
        *markdown(rows, len(truth.volumes), len(set(truth.volumes))), "",
        *(f"- {claim}" for claim in claims), "",
        *(f"- {note}" for note in (*NOTES, *trained)), "",
    ]  # fmt: skip
    (out / "results.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    return 0


def read_run(folder: Path, truth: Truth) -> Run:
    """Return what a model gave, by the predictions of both tasks."""
    vectors = in_order(folder / "study-retrieval" / "predictions.jsonl", len(truth.volumes))
    images = np.array([line["embedding"] for line in vectors])
    texts = np.array([line["text_embeddings"][0] for line in vectors])
    labels = in_order(folder / "study-labels" / "predictions.jsonl", len(truth.volumes))
    return Run(
        rank_places(images, texts, truth.relevant),
        rank_places(texts, images, truth.relevant),
        np.array([[line["scores"][organ] for organ in ORGANS] for line in labels]),
    )


def table(runs: Mapping[str, Sequence[Run]], truth: Truth) -> list[Row]:
    """Return every measure of all models; one set of draws serves all."""
    random = np.random.default_rng(0)
    names = sorted(set(truth.volumes))
    of_volume = [np.flatnonzero(np.array(truth.volumes) == name) for name in names]
    everything = np.arange(len(truth.volumes))
    draws = [
        (
            np.concatenate([of_volume[v] for v in random.integers(len(names), size=len(names))]),
            {model: random.integers(len(SEEDS), size=len(SEEDS)) for model in MODELS},
        )
        for _ in range(ROUNDS)
    ]
    rows = []
    for measure, score in MEASURES.items():
        seeds = {model: [score(run, truth, everything) for run in runs[model]] for model in MODELS}
        drawn: dict[str, np.ndarray] = {}
        for model in MODELS:
            # One score of each seed on the volumes of a draw, then the mean of the drawn seeds.
            each = np.array(
                [[score(run, truth, rows_) for run in runs[model]] for rows_, _ in draws]
            )
            chosen = np.array([draw[model] for _, draw in draws])
            drawn[model] = np.take_along_axis(each, chosen, axis=1).mean(axis=1)
        means = {model: float(np.mean(seeds[model])) for model in MODELS}
        rows.append(
            Row(
                measure,
                {model: interval(means[model], drawn[model]) for model in MODELS},
                seeds,
                chance(measure, truth),
                {
                    f"{one} - {other}": interval(
                        means[one] - means[other], drawn[one] - drawn[other]
                    )
                    for one, other in COMPARED
                },
            )
        )
    return rows


def interval(value: float, drawn: np.ndarray) -> Value:
    """Return a value with the percentiles of its draws; undefined draws are left out."""
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Value(value, float(low), float(high))


def chance(measure: str, truth: Truth) -> float:
    """Return what a random ranking gets."""
    if "R@" not in measure:
        return 0.5
    total = len(truth.relevant)
    k = min(int(measure.rpartition("@")[2]), total)
    return float(np.mean([1 - comb(total - len(r), k) / comb(total, k) for r in truth.relevant]))


def sentence(row: Row, name: str) -> str:
    """Return what the interval of a difference allows to say."""
    difference = row.differences[name]
    one, _, other = name.partition(" - ")
    number = f"{difference.value:+.2f} ({difference.low:+.2f} to {difference.high:+.2f})"
    if difference.low > 0:
        claim = f"`{one}` scores higher than `{other}`"
    elif difference.high < 0:
        claim = f"`{one}` scores lower than `{other}`"
    else:
        claim = f"no difference between `{one}` and `{other}` is shown"
    return f"{row.measure}: {claim}, {number}."


def losses(out: Path, model: str) -> str:
    """Return steps, and the first and last loss of each seed."""
    found = []
    for seed in SEEDS:
        entries = [e for e in lines_of(out / f"{model}-{seed}" / "loss.jsonl") if "loss" in e]
        first, last = entries[0], entries[-1]
        found.append(f"{last['step']} steps, loss {first['loss']:.2f} to {last['loss']:.2f}")
    return "; ".join(found)


def in_order(file: Path, expected: int) -> list[dict[str, Any]]:
    """Return predictions in the order of the studies; one that is missing is an error."""
    lines = {line["index"]: line for line in lines_of(file)}
    bad = Counter(line["error"] for line in lines.values() if line.get("error"))
    if sorted(lines) != list(range(expected)) or bad:
        raise SystemExit(f"{file}: {len(lines)} of {expected} studies, errors: {dict(bad)}")
    return [lines[index] for index in range(expected)]


def lines_of(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file."""
    if not file.is_file():
        raise SystemExit(f"{file}: not there; run examples/motor_demo/run.sh")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def markdown(rows: Sequence[Row], studies: int, volumes: int) -> list[str]:
    """Return the lines of the table."""
    head = [f"{studies} images of {volumes} volumes", *MODELS, "chance"]
    body = [
        [row.measure, *(str(row.values[model]) for model in MODELS), f"{row.chance:.2f}"]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    return [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in [head, ["-" * width for width in widths], *body]
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
