"""One table of zero-shot scores and retrieval on held-out volumes, before and after training.

    python examples/quickstart_clip/report.py [folder, by default work_dirs/quickstart_clip]
                                              [folder of the data]

Reads <model>/scores/*/results.json of `medm eval`, <model>/captions.jsonl of `medm infer`, and the
files of pairs.py; writes results.json and results.md. Intervals draw whole volumes.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path
from typing import Any

from pairs import ATTRIBUTES, DATA, REPOSITORY

from medm.metrics.base import Clusters, Resampling
from medm.metrics.match import normalized_match

OUT = REPOSITORY / "work_dirs" / "quickstart_clip"
MODELS = ("untrained", "trained")
VALUES = {
    "modality": ("CT", "MR"),
    "region": ("head", "chest", "abdomen", "spine"),
    "plane": ("axial", "coronal", "sagittal"),
    "level": ("lower", "middle", "upper"),
    "side": ("left", "right"),
}
NOTES = (
    "Not for clinical use. This shows that the software learns and measures, and nothing about "
    "medicine: a handful of volumes.",
    "Intervals draw whole volumes, since slices of one volume resemble each other. With six "
    "volumes they are rough; one volume has none. One seed.",
    "'Constant' always gives the value that is most frequent in training.",
    "Spine CT and abdominal MR are never trained on; side is known of few images, most of them of "
    "one volume.",
    "Captions: a vision-language model whose connector was trained behind the tower for a few "
    "steps, encoder and LLM frozen. A caption counts for an attribute when it names the right "
    "value and no other.",
)
"""Limits of the table; printed under it."""


@dataclass(frozen=True)
class Value:
    """A score and its 95 % interval; None where one volume gives none."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" ({self.low:.2f} to {self.high:.2f})"
        return f"{self.value:.2f}{interval}"


@dataclass(frozen=True)
class Row:
    """A measure of both models on the same items."""

    job: str
    measure: str
    untrained: Value
    trained: Value
    chance: float
    constant: float | None
    n: int
    volumes: int


def main(arguments: list[str]) -> int:
    """Write both files and print the table. Returns the exit status."""
    out = Path(arguments[0]) if arguments else OUT
    data = Path(arguments[1]) if len(arguments) > 1 else DATA
    table = [*zero_shot(out, data), *retrieval(out, data), *captions(out, data)]
    setting = f"Contrastive training: {trained(out / 'trained' / 'loss.jsonl')}."
    notes = [*NOTES, setting]
    content = {"rows": [asdict(row) for row in table], "notes": notes}
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    title = "# Contrastive quickstart, on held-out volumes"
    lines = [title, "", *markdown(table), "", *(f"- {note}" for note in notes), ""]
    (out / "results.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    return 0


def zero_shot(out: Path, data: Path) -> list[Row]:
    """Return the accuracy of each attribute."""
    rows = []
    for name in ATTRIBUTES:
        scores = {model: metrics(out / model / "scores" / f"zero-shot-{name}") for model in MODELS}
        before, after = (scores[model]["accuracy"] for model in MODELS)
        lines = (data / f"classes_{name}.csv").read_text(encoding="utf-8").splitlines()[1:]
        truths = [line.split(",")[1] for line in lines]
        volumes = {line.split(",")[2] for line in lines}
        constant = truths.count(most_frequent(data, name)) / len(truths)
        chance = 1 / len(VALUES[name])
        rows.append(
            Row(
                "zero-shot", name, value(before), value(after), chance, constant,
                len(truths), len(volumes),
            )
        )  # fmt: skip
    return rows


def most_frequent(data: Path, attribute: str) -> str:
    """Return the value of an attribute that is most frequent in training."""
    labels = [pair["label"].split() for pair in records(data / "pairs_train.jsonl")]
    known = [dict(word.split("=") for word in words) for words in labels]
    values = Counter(one[attribute] for one in known if attribute in one)
    return values.most_common(1)[0][0]


def retrieval(out: Path, data: Path) -> list[Row]:
    """Return recall in both directions."""
    scores = {model: metrics(out / model / "scores" / "retrieval") for model in MODELS}
    pairs = records(data / "pairs_test.jsonl")
    labels = Counter(pair["label"] for pair in pairs)
    captions = sum(len(pair["captions"]) for pair in pairs)
    rows = []
    for direction, candidates, per_label in (
        ("image-to-text", captions, len(pairs[0]["captions"])),
        ("text-to-image", len(pairs), 1),
    ):
        for k in (1, 5):
            chances = [hit(labels[pair["label"]] * per_label, candidates, k) for pair in pairs]
            before, after = (scores[model][f"{direction}-R@{k}"] for model in MODELS)
            rows.append(
                Row(
                    direction, f"R@{k}", value(before), value(after),
                    sum(chances) / len(chances), None, after["n"],
                    len({pair["source_volume"] for pair in pairs}),
                )
            )  # fmt: skip
    return rows


def hit(right: int, candidates: int, k: int) -> float:
    """Return the chance that one of `k` random candidates is right."""
    return 1 - comb(candidates - right, k) / comb(candidates, k)


def captions(out: Path, data: Path) -> list[Row]:
    """Return how often a generated caption names the right value of an attribute."""
    asked = json.loads((data / "captions_test.json").read_text(encoding="utf-8"))
    rows = []
    for name in ("modality", "region", "plane", "level"):
        kept = [
            index for index, record in enumerate(asked) if len(named(record["answer"], name)) == 1
        ]
        truths = [next(iter(named(asked[index]["answer"], name))) for index in kept]
        volumes = tuple(asked[index]["source_volume"] for index in kept)
        resampling = Resampling(clusters=Clusters("source_volume", volumes))
        found = {}
        for model in MODELS:
            replies = {line["index"]: line.get("reply", "") for line in records_of(out, model)}
            given = [" ".join(sorted(named(replies[index], name))) for index in kept]
            found[model] = normalized_match(given, truths, resampling=resampling)[0]
        pairs = {
            model: Value(score.value, *_bounds(score.low, score.high))
            for model, score in found.items()
        }
        rows.append(
            Row(
                "caption", name, pairs["untrained"], pairs["trained"], 1 / len(VALUES[name]),
                truths.count(most_frequent(data, name)) / len(truths), len(kept),
                len(set(volumes)),
            )
        )  # fmt: skip
    return rows


def named(text: str, attribute: str) -> set[str]:
    """Return the values of an attribute that a text names."""
    words = {word.strip(".,:;").lower() for word in text.split()}
    return {value for value in VALUES[attribute] if value.lower() in words}


def records_of(out: Path, model: str) -> list[dict[str, Any]]:
    """Return the lines of the generated captions."""
    return records(out / model / "captions.jsonl")


def records(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file."""
    if not file.is_file():
        raise SystemExit(f"{file}: not there; run examples/quickstart_clip/run.sh")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def metrics(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """Return the metrics of a results.json by name."""
    file = folder / "results.json"
    if not file.is_file():
        raise SystemExit(f"{file}: not there; run examples/quickstart_clip/run.sh")
    return {one["name"]: one for one in json.loads(file.read_text(encoding="utf-8"))["scores"]}


def value(metric: Mapping[str, Any]) -> Value:
    """Return the value of a metric of results.json."""
    return Value(metric["value"], *_bounds(metric.get("low"), metric.get("high")))


def _bounds(low: float | None, high: float | None) -> tuple[float | None, float | None]:
    """Return the bounds; None for an interval that is undefined."""
    return (None, None) if low is None or low != low else (low, high)


def trained(log: Path) -> str:
    """Return steps, and the first and last loss."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    losses = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    return f"{losses[-1][0]} steps, loss {losses[0][1]:.2f} to {losses[-1][1]:.2f}"


def markdown(table: Sequence[Row]) -> list[str]:
    """Return the lines of the table."""
    head = ["", "measure", "untrained", "trained", "chance", "constant", "n", "volumes"]
    body = [
        [
            row.job, row.measure, str(row.untrained), str(row.trained), f"{row.chance:.2f}",
            "-" if row.constant is None else f"{row.constant:.2f}", str(row.n), str(row.volumes),
        ]
        for row in table
    ]  # fmt: skip
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    return [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in [head, ["-" * width for width in widths], *body]
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
