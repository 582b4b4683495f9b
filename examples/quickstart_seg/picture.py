"""One picture of the replies: of each target the middle one of the held-out slices that show it.

    python examples/quickstart_seg/picture.py [folder [file]]

By default work_dirs/quickstart_seg, and result.png in it.

No slice is chosen by its score. Reads what `run.sh` left: data/test.json and replies.jsonl.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import numpy as np
from masks import OUT
from matplotlib import pyplot as plt
from PIL import Image
from report import predicted_mask, read, read_lines

from medm.metrics.masks import dice_of

COLUMNS = 3
ORDER = ("lungs", "liver", "vertebrae", "aorta", "spleen", "lesion")
"""Of the targets: those that are learned first."""
MASK, REFERENCE = (1.0, 0.75, 0.1, 0.45), "#19d3f3"


def main(arguments: list[str]) -> int:
    """Draw the picture. Returns the exit status."""
    folder = Path(arguments[0]) if arguments else OUT.parent
    file = Path(arguments[1]) if len(arguments) > 1 else folder / "result.png"
    lines = {line["index"]: line for line in read_lines(folder / "replies.jsonl")}
    records = read(folder / "data" / "test.json")
    rows = -(-len(ORDER) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(9, 3.55 * rows), facecolor="black")
    for axis in axes.flat[len(ORDER) :]:
        axis.set_visible(False)
    for target, axis in zip(ORDER, axes.flat, strict=False):
        index = middle(records, target)
        show(axis, folder, records[index], lines[index])
    figure.text(
        0.5, 0.012,
        "filled: mask of the model    line: reference    middle slice of each target, held-out "
        "volumes    Not for clinical use.",
        color="white", ha="center", fontsize=8,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(file, dpi=100, facecolor="black")
    plt.close(figure)
    print(f"  picture                  {file}")
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
    data = folder / "data"
    image = np.asarray(Image.open(data / record["image"]))
    truth = np.asarray(Image.open(data / record["masks"][0]["file"])) > 0
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
