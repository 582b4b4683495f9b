"""One table of masks on held-out volumes: the model beside a constant mask and a threshold.

    python examples/quickstart_seg/report.py [folder, by default work_dirs/quickstart_seg]

Reads data/*.json, the *.jsonl of `medm infer` and the loss log; writes results.json and results.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from masks import OUT, STRUCTURES, TARGETS, WHOLE
from PIL import Image
from volumes import DATA, read_voxels

from medm.metrics.base import Clusters, MetricResult, Resampling, mean_result
from medm.metrics.masks import dice_of, hd95_of

NOTES = (
    "Not for clinical use. This shows that the software learns and measures, and nothing about "
    "medicine: a handful of volumes, most masks of which are the output of another program.",
    "Dice over the slices that show the target; the interval draws whole volumes where there are "
    "several. Where there is one, it draws slices, which resemble each other: it is too narrow.",
    "'Constant' is the mask that fits the training slices best, the same for every slice; "
    "'threshold' keeps the range of gray values that fits them best. Neither knows absent targets.",
    "'Seen' is the share of slices with the target whose presence score is 0.5 or more; 'claimed' "
    "the same of slices without it, 'drawn' the share of those in which a mask is drawn at all. "
    "`medm infer --presence-threshold 0.5` would draw the claimed ones alone.",
    "Lesions: training holds a nodule on three slices and one small brain lesion, too little to "
    "learn from; the row is there so that nobody has to wonder.",
)
"""Limits of the table; printed under it."""

PRESENT = 0.5
"""Presence score from which on a target is taken to be in the slice."""


@dataclass(frozen=True)
class Row:
    """A target."""

    target: str
    model: float
    low: float | None
    high: float | None
    constant: float
    threshold: float
    slices: int
    volumes: int
    seen: float
    """Share of the slices with the target that the presence score says are such."""
    claimed: float | None
    """Share of the slices without the target that the presence score says have it."""
    drawn: float | None
    """Share of the slices without the target in which the model draws a mask."""
    without: int
    """Slices without the target."""


@dataclass(frozen=True)
class Whole:
    """A target in a volume that was segmented slice by slice."""

    volume: str
    target: str
    dice: float
    hd95: float
    """In mm."""


def main(arguments: list[str]) -> int:
    """Write both files and print the tables. Returns the exit status."""
    folder = Path(arguments[0]) if arguments else OUT.parent
    table = rows(folder)
    volumes = whole(folder)
    logs = [folder / stage / "loss.jsonl" for stage in ("answers", "model")]
    notes = [*NOTES, f"Training: {trained(logs[0])}; then {trained(logs[1])}, the mask head alone."]
    content = {
        "targets": [asdict(row) for row in table],
        "volumes": [asdict(one) for one in volumes],
        "notes": notes,
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(
        [
            "# Masks on held-out volumes",
            "",
            *markdown(*slices_table(table)),
            "",
            *markdown(*volumes_table(volumes)),
            "",
            *(f"- {note}" for note in notes),
            "",
        ]
    )
    (folder / "results.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def rows(folder: Path) -> list[Row]:
    """Return the scores of each target on held-out slices."""
    data = folder / "data"
    train = masks_by_target(data, read(data / "train.json"))
    lines = {line["index"]: line for line in read_lines(folder / "replies.jsonl")}
    table = []
    for target in TARGETS:
        constant, limits = fitted(train[target])
        scores: dict[str, list[float]] = {"model": [], "constant": [], "threshold": []}
        volumes: list[str] = []
        seen: list[bool] = []
        claimed: list[bool] = []
        drawn: list[bool] = []
        for index, record in enumerate(read(data / "test.json")):
            if record["targets"] != [target]:
                continue
            image = np.asarray(Image.open(data / record["image"]))
            predicted = predicted_mask(folder, lines[index], image.shape)
            is_there = any(span["presence"] >= PRESENT for span in lines[index].get("spans", []))
            if record["masks"][0] is None:
                claimed.append(is_there)
                drawn.append(bool(predicted.any()))
                continue
            seen.append(is_there)
            truth = np.asarray(Image.open(data / record["masks"][0]["file"])) > 0
            volumes.append(record["source_volume"])
            low, high = limits
            scores["model"].append(dice_of(predicted, truth))
            scores["constant"].append(dice_of(constant, truth))
            scores["threshold"].append(dice_of((image >= low) & (image <= high), truth))
        mean = mean_dice(scores["model"], volumes)
        table.append(
            Row(
                target, mean.value, mean.low, mean.high,
                float(np.mean(scores["constant"])), float(np.mean(scores["threshold"])),
                len(volumes), len(set(volumes)), float(np.mean(seen)),
                float(np.mean(claimed)) if claimed else None,
                float(np.mean(drawn)) if drawn else None, len(drawn),
            )
        )  # fmt: skip
    return table


def mean_dice(scores: Sequence[float], volumes: Sequence[str]) -> MetricResult:
    """Return the mean and its interval, over whole volumes where there are several."""
    clusters = Clusters("source_volume", tuple(volumes)) if len(set(volumes)) > 1 else None
    return mean_result("dice", scores, "hard|mean", Resampling(clusters=clusters))


def masks_by_target(
    data: Path, records: Sequence[Mapping[str, Any]]
) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Return image and mask of each training slice that shows a target."""
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {target: [] for target in TARGETS}
    for record in records:
        image = np.asarray(Image.open(data / record["image"]))
        for target, mask in zip(record["targets"], record["masks"], strict=True):
            if mask is not None and target in found:
                found[target].append((image, np.asarray(Image.open(data / mask["file"])) > 0))
    return found


def fitted(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the constant mask and the range of gray values with the best Dice on these slices."""
    masks = np.stack([mask for _, mask in pairs])
    share = masks.mean(axis=0)
    levels = np.unique(np.quantile(share[share > 0], np.linspace(0, 1, 20)))
    constant = max(
        (share >= level for level in levels),
        key=lambda guess: np.mean([dice_of(guess, mask) for mask in masks]),
    )
    values = np.concatenate([image[mask] for image, mask in pairs])
    ends = [
        (int(np.quantile(values, low)), int(np.quantile(values, high)))
        for low in (0.0, 0.02, 0.05, 0.1, 0.2)
        for high in (0.8, 0.9, 0.95, 0.98, 1.0)
    ]
    some = pairs[:: max(1, len(pairs) // 40)]
    limits = max(
        ends,
        key=lambda end: np.mean(
            [dice_of((image >= end[0]) & (image <= end[1]), mask) for image, mask in some]
        ),
    )
    return constant, limits


def predicted_mask(folder: Path, line: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """Return the union of the masks of a reply; an empty one where it has none."""
    found = np.zeros(shape, dtype=bool)
    for span in line.get("spans", []):
        if span.get("mask"):
            found |= np.asarray(Image.open(folder / span["mask"])) > 0
    return found


def whole(folder: Path) -> list[Whole]:
    """Return the scores of the volumes that were segmented whole, in their own geometry."""
    found = []
    for volume in WHOLE:
        lines = {line["index"]: line for line in read_lines(folder / f"{volume}.jsonl")}
        for index, record in enumerate(read(folder / "data" / f"{volume}.json")):
            found.append(score_whole(folder, record, lines[index]))
    return found


def score_whole(folder: Path, record: Mapping[str, Any], line: Mapping[str, Any]) -> Whole:
    """Return the score of one target of a volume."""
    name, (target,) = record["source_volume"], record["targets"]
    if target in STRUCTURES and target != "lungs":
        marked = read_voxels(DATA / f"{name}.labels.nii.gz")[0]
        truth = marked == 1 + STRUCTURES.index(target)
    else:
        truth = read_voxels(DATA / f"{name}.{target}.nii.gz")[0] > 0
    spacing = read_voxels(DATA / f"{name}.nii.gz")[1]
    predicted = np.zeros(truth.shape, dtype=bool)
    for span in line.get("spans", []):
        if span.get("mask"):
            predicted |= read_voxels(folder / span["mask"])[0] > 0
    distance = hd95_of(predicted, truth, spacing.tolist())
    return Whole(name, target, dice_of(predicted, truth), distance)


def read(file: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON file."""
    records: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return records


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file."""
    if not file.is_file():
        raise SystemExit(f"{file}: not there; run examples/quickstart_seg/run.sh")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def trained(log: Path) -> str:
    """Return steps, and the first and last loss."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    losses = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    return f"{losses[-1][0]} steps, loss {losses[0][1]:.2f} to {losses[-1][1]:.2f}"


def slices_table(table: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return head and lines of the table of slices."""
    head = [
        "target", "Dice", "95 %", "constant", "threshold", "n", "volumes",
        "seen", "claimed", "drawn", "without",
    ]  # fmt: skip
    lines = [
        [
            row.target, f"{row.model:.2f}",
            "-" if row.low is None else f"{row.low:.2f} to {row.high:.2f}",
            f"{row.constant:.2f}", f"{row.threshold:.2f}", str(row.slices), str(row.volumes),
            f"{row.seen:.2f}", share(row.claimed), share(row.drawn), str(row.without),
        ]
        for row in table
    ]  # fmt: skip
    return head, lines


def share(value: float | None) -> str:
    """Return a share for the table; a dash where there is nothing to count."""
    return "-" if value is None else f"{value:.2f}"


def volumes_table(volumes: Sequence[Whole]) -> tuple[list[str], list[list[str]]]:
    """Return head and lines of the table of whole volumes."""
    lines = [[one.volume, one.target, f"{one.dice:.2f}", f"{one.hd95:.0f}"] for one in volumes]
    return ["whole volume", "target", "Dice", "HD95 in mm"], lines


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    return [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in [head, ["-" * width for width in widths], *body]
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
