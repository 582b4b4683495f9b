"""One picture of the replies: of each target the middle one of the held-out slices that show it.

    python examples/quickstart_seg/picture.py [FILE, by default work_dirs/quickstart_seg/result.png]

No slice is chosen by its score. Read after `run.sh`: data/test.json and replies.jsonl.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import numpy as np
from masks import OUT, TARGETS
from matplotlib import pyplot as plt
from PIL import Image
from report import predicted_mask, read, read_lines

from medm.metrics.masks import dice_of

COLUMNS = 3
MASK, REFERENCE = (1.0, 0.75, 0.1, 0.45), "#19d3f3"


def main(arguments: list[str]) -> int:
    """Draw the picture. Returns the exit status."""
    folder = OUT.parent
    target_file = Path(arguments[0]) if arguments else folder / "result.png"
    lines = {line["index"]: line for line in read_lines(folder / "replies.jsonl")}
    records = read(OUT / "test.json")
    rows = -(-len(TARGETS) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(9, 3.55 * rows), facecolor="black")
    for target, axis in zip(TARGETS, axes.flat, strict=True):
        index = middle(records, target)
        show(axis, folder, records[index], lines[index])
    figure.text(
        0.5, 0.012,
        "filled: mask of the model    line: reference    middle slice of each target, held-out "
        "volumes    Not for clinical use.",
        color="white", ha="center", fontsize=8,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(target_file, dpi=100, facecolor="black")
    print(f"  picture                  {target_file}")
    return 0


def middle(records: Sequence[Mapping[str, Any]], target: str) -> int:
    """Return the index of the middle one of the questions whose slice shows a target."""
    shown = [
        index
        for index, record in enumerate(records)
        if record["targets"] == [target] and record["masks"][0] is not None
    ]
    return shown[len(shown) // 2]


def show(axis: Any, folder: Path, record: Mapping[str, Any], line: Mapping[str, Any]) -> None:
    """Draw a slice, the mask of the reply over it, and the outline of the reference."""
    image = np.asarray(Image.open(OUT / record["image"]))
    truth = np.asarray(Image.open(OUT / record["masks"][0]["file"])) > 0
    predicted = predicted_mask(folder, line, image.shape)
    axis.imshow(image, cmap="gray")
    over = np.zeros((*image.shape, 4))
    over[predicted] = MASK
    axis.imshow(over)
    axis.contour(truth, levels=[0.5], colors=REFERENCE, linewidths=1.2)
    question = record["conversations"][0]["value"].replace("<image>", "").strip()
    axis.set_title(f"Q: {question}", color="white", fontsize=10, loc="left")
    axis.set_xlabel(
        f"A: {line['reply']}    Dice {dice_of(predicted, truth):.2f}",
        color="white", fontsize=10, loc="left",
    )  # fmt: skip
    axis.set_xticks([])
    axis.set_yticks([])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
