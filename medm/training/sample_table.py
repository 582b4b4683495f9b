"""Questions, replies and references of a few items after each evaluation: files, and tables of
trackers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback

from medm.files import atomic_write_text

logger = logging.getLogger(__name__)

FOLDER = "samples"
_COLUMNS = ("id", "question", "reply", "answer")


class SampleTable:
    """Table of items by step.

    `samples/LABEL-STEP.jsonl` in the output folder has a line for each item: `id`, `question`,
    `reply`, `answer`, and `inference_error` where a file could not be read. A resumed run writes
    the files of its steps anew.

    Args:
        label: of the task.
        folder: output folder of the run.
        trackers: callbacks of the trainer; those of TensorBoard and Weights & Biases show it.
    """

    def __init__(self, label: str, folder: Path, trackers: Sequence[TrainerCallback]) -> None:
        self.label, self.folder, self.trackers = label, folder, trackers

    def write(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Write the rows of one evaluation. A full disk is a warning, and training continues."""
        file = self.folder / FOLDER / f"{self.label}-{step}.jsonl"
        try:
            file.parent.mkdir(exist_ok=True)
            atomic_write_text(
                file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            )
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s); training continues", file, error.strerror or error
            )
        for tracker in self.trackers:
            if isinstance(tracker, TensorBoardCallback) and tracker.tb_writer is not None:
                tracker.tb_writer.add_text(f"{FOLDER}/{self.label}", _markdown(rows), step)
            if isinstance(tracker, WandbCallback):
                _show_in_wandb(f"{FOLDER}/{self.label}", rows)


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [str(row.get(name, "")) for name in _COLUMNS]


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of Markdown; what a cell holds cannot end it."""
    lines = [list(_COLUMNS), ["---"] * len(_COLUMNS), *map(_cells, rows)]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) + " |"
        for line in lines
    )


def _show_in_wandb(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    import wandb

    if wandb.run is not None:
        table = wandb.Table(columns=list(_COLUMNS), data=[_cells(row) for row in rows])
        # Not committed: the next log line of the trainer has the step.
        wandb.run.log({name: table}, commit=False)
