"""Mutated annotation files and recipes: records, bad records by name, or a message."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from campaign.harness import Part, WrongResultError
from campaign.mutate import Target, mutation_cases, prepare
from medm.data.base import AnyPipeline
from medm.data.check import check
from medm.data.conversations import Conversations
from medm.data.options import SourceOptions
from medm.data.pairs import Pairs
from medm.data.studies import Studies
from medm.errors import MedmError
from medm.training.recipe import load_recipe
from tests import tiny
from tests.data.tiny import write_image

CONVERSATIONS: list[dict[str, Any]] = [
    {
        "id": f"r{number}",
        "image": ["a.png"],
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is seen, \u00b5?"},
            {"from": "gpt", "value": "No mass."},
        ],
        "task": "vqa",
        "masks": None,
    }
    for number in range(4)
]
PAIRS = [{"image": "a.png", "captions": ["normal", "a mass"], "label": 3} for _ in range(4)]
STUDIES = [
    {"images": ["a.png"], "report": "No mass.", "triplets": [["mass", "of", "lung"]],
     "labels": {"mass": 0, "effusion": None}}
] * 4  # fmt: skip


def records(name: str, content: list[dict[str, Any]]) -> Callable[[Path], Path]:
    """Return a maker of an annotation file and of its image."""

    def make(folder: Path) -> Path:
        write_image(folder / "a.png")
        file = folder / name
        if name.endswith(".csv"):
            with file.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.writer(stream)
                writer.writerow(["image", "caption", "id"])
                writer.writerows(["a.png", "a mass, \u00b5", number] for number in range(4))
        elif name.endswith(".jsonl"):
            file.write_text("".join(f"{json.dumps(one)}\n" for one in content))
        else:
            file.write_text(json.dumps(content, indent=1))
        return file

    return make


def read(file: Path, pipeline: Callable[[], AnyPipeline]) -> None:
    """Check an annotation file as `medm data check` does."""
    source = SourceOptions(path=str(file), root=str(file.parent))
    report = check([source], pipeline())
    for error in report.bad:
        if file.name not in str(error):
            raise WrongResultError(f"a bad record without its file: {error}")
    if report.num_bad:
        raise MedmError(str(report.bad[0]))


RECIPE: dict[str, Any] = {
    "model": tiny.lvlm_section(Path("llm")),
    "data": {"train": [{"path": "train.json", "root": "."}], "packing": True, "max_length": 256},
    "parts": {
        "llm": {"tune": "lora", "r": 4, "lr": 1e-3},
        "image.connector": {"tune": "full", "lr": 1e-2},
    },
    "train": {"max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 2},
    "output_dir": "out",
}


def recipe(folder: Path) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder / "recipe.yaml"


def recipe_with_anchors(folder: Path) -> Path:
    """Anchors, merges, dates, numbers of other bases, and texts over several lines."""
    text = yaml.safe_dump(RECIPE)
    text = text.replace("r: 4", "r: 0x4").replace("save_steps: 2", "save_steps: &two 2")
    (folder / "recipe.yaml").write_text("# a comment\n" + text + "notes: >\n  two\n  lines\n")
    return folder / "recipe.yaml"


def read_recipe(file: Path) -> None:
    load_recipe(file)


def read_any_recipe(file: Path) -> None:
    """`notes` is no key of a recipe: a message is what the whole file gives, too."""
    try:
        load_recipe(file)
    except MedmError as error:
        if file.name not in str(error):
            raise WrongResultError(f"the message does not name the file: {error}") from None


TARGETS = [
    Target("conversations JSON", records("a.json", CONVERSATIONS), partial(read, pipeline=Conversations), text=True),
    Target("conversations JSONL", records("a.jsonl", CONVERSATIONS), partial(read, pipeline=Conversations), text=True),
    Target("pairs JSON", records("a.json", PAIRS), partial(read, pipeline=Pairs), text=True),
    Target("pairs CSV", records("a.csv", PAIRS), partial(read, pipeline=Pairs)),
    Target("studies JSONL", records("a.jsonl", STUDIES), partial(read, pipeline=Studies), text=True),
    Target("recipe YAML", recipe, read_recipe),
    Target("recipe YAML with anchors", recipe_with_anchors, read_any_recipe),
]  # fmt: skip
PART = Part(
    "records",
    "Mutated annotation files and recipes",
    partial(prepare, TARGETS),
    partial(mutation_cases, TARGETS),
    2000,
)
