"""The quickstart's records as this demonstration uses them: fewer to train on, and the held-out
ones one file a task.

    python examples/uni_med_demo/split.py [folder, by default work_dirs/quickstart/data]

Reads tasks_train.json, tasks_test.json and pictures.json; writes demo_train.json and
test_<task>.json, which lie beside the images, so that one folder holds all that a benchmark needs.
Sides are the quickstart's: whole volumes, fixed before any training. Volumes that are fetched, and
not part of the repository, are left out, so that the table is always the same. `medm eval --task
custom` scores one file with its metrics; `source_volume` says which records belong together, and
`box` is the exact box (fractions of the picture), which the reference text only holds in steps of a
hundredth.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "work_dirs" / "quickstart" / "data"
SEED = 0
TRAINED_ON = {"rec": 200, "vqa": 200, "reg": 80, "cls": 80, "caption": 80}
"""Records a task: what two CPU cores learn from in minutes. Boxes and five kinds of questions need
the most."""
SIDE = 224
"""Pixels of a picture (examples/quickstart/prepare.py); boxes in pictures.json are in pixels."""


def main(arguments: list[str]) -> int:
    """Write the files. Returns the exit status."""
    folder = Path(arguments[0]) if arguments else DATA
    boxes = {picture["file"]: picture["boxes"] for picture in read(folder / "pictures.json")}
    training = fewer(read(folder / "tasks_train.json"), TRAINED_ON)
    write(folder / "demo_train.json", training)
    print(
        f"  {len(training)} records to train on: "
        f"{', '.join(f'{task} {n}' for task, n in TRAINED_ON.items())}"
    )
    by_task: dict[str, list[dict[str, Any]]] = {}
    for record in read(folder / "tasks_test.json"):
        if record["split"] == "test":
            by_task.setdefault(record["task"], []).append(held_out(record, boxes))
    for task, records in by_task.items():
        write(folder / f"test_{task}.json", records)
        volumes = len({record["source_volume"] for record in records})
        print(f"  {task:<8} {len(records)} questions about {volumes} volumes that were held out")
    return 0


def fewer(records: Sequence[dict[str, Any]], counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """So many of each task at random (all where there are not as many), the same ones at
    every run.
    """
    chosen = []
    for task, count in counts.items():
        all_ = [record for record in records if record["task"] == task]
        chosen += random.Random(f"{SEED} {task}").sample(all_, min(count, len(all_)))
    return chosen


def held_out(
    record: Mapping[str, Any], boxes: Mapping[str, Mapping[str, Sequence[float]]]
) -> dict[str, Any]:
    """A question as the benchmark asks it."""
    images = [f"images/{name}" for name in record["image"]]
    changed: dict[str, Any] = {**record, "image": images}
    if record["task"] == "rec":
        pixels = boxes[record["image"][0]][record["question_type"]]
        changed["box"] = [coordinate / SIDE for coordinate in pixels]
    return changed


def read(file: Path) -> list[dict[str, Any]]:
    """A list of records."""
    records: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return records


def write(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Readable JSON. A file that says the same already is left alone: a training may be
    reading it.
    """
    text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
