"""The contrastive quickstart: captions say what is known, cards read the tables, medm reads the
pairs, and the table's numbers are those of the files."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medm.config import read_yaml
from medm.data.options import SourceOptions
from medm.data.pairs import Pairs
from medm.data.records import Records
from medm.tasks.class_cards import read_card
from medm.training.recipe import load_recipe
from tests.examples.scripts import scripts

ROOT = Path(__file__).parents[2]
CARDS = ROOT / "examples" / "quickstart_clip" / "cards"


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    with scripts("quickstart_clip"):
        yield importlib.import_module("pairs"), importlib.import_module("report")


def picture(plane: str, boxes: dict[str, Any], **answers: str) -> dict[str, Any]:
    name = f"{answers['region']}-{plane}-{len(boxes)}"
    known = {"plane": plane, **answers}
    return {
        "file": f"{name}.png", "volume": f"{answers['region']}-1", "split": "test", "plane": plane,
        "answers": known, "boxes": boxes,
    }  # fmt: skip


LUNG = picture("sagittal", {"left lung": [0, 0, 9, 9]}, modality="CT", region="chest")
LESION = picture(
    "axial", {"lesion": [40, 90, 60, 110]}, modality="MR", region="head", level="upper"
)
MIDDLE = picture("axial", {"lesion": [100, 90, 124, 110]}, modality="MR", region="head")


def test_captions_say_what_is_known(modules: tuple[ModuleType, ModuleType]) -> None:
    pairs, _ = modules
    assert pairs.side(LUNG) == "left"
    assert pairs.side(LESION) == "right"  # the patient's right is on the left of the image
    assert pairs.side(MIDDLE) is None
    record = pairs.pair(LESION)
    assert record["captions"] == [
        "axial MR of the head, upper third of the brain, right lesion",
        "head, MR, axial plane: upper third of the brain, right lesion",
        "a slice of the head in the axial plane, from MR, through the upper third of the brain, "
        "right lesion",
    ]
    assert record["label"] == "modality=MR region=head plane=axial level=upper side=right"
    assert pairs.captions(pairs.attributes(MIDDLE))[0] == "axial MR of the head"


def test_medm_reads_what_is_written(modules: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    pairs, _ = modules
    pictures = [LUNG, LESION, MIDDLE]
    (tmp_path / "images").mkdir()
    for one in pictures:
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "images" / one["file"])
    (tmp_path / "pictures.json").write_text(
        json.dumps([*pictures, {**LUNG, "split": "train"}, {**LUNG, "split": "extra"}])
    )
    asked = [{"task": "caption", "split": split, "answer": "CT."} for split in ("test", "extra")]
    (tmp_path / "tasks_test.json").write_text(json.dumps(asked))
    assert pairs.main([str(tmp_path)]) == 0
    for name, count in (("train", 1), ("test", 3)):
        records = Records([SourceOptions(path=str(tmp_path / f"pairs_{name}.jsonl"))], Pairs())
        assert len(records) == count
        for index in range(count):
            assert records.media_path(index, records[index].media[0]).is_file()
    assert json.loads((tmp_path / "captions_test.json").read_text()) == asked[:1]
    sides = (tmp_path / "classes_side.csv").read_text().splitlines()
    assert sides == [
        "image,label,source_volume",
        "images/chest-sagittal-1.png,left,chest-1",
        "images/head-axial-1.png,right,head-1",
    ]


def test_cards_have_the_classes_and_files_of_the_tables(
    modules: tuple[ModuleType, ModuleType],
) -> None:
    pairs, report = modules
    assert {file.stem for file in CARDS.glob("*.yaml")} == set(pairs.ATTRIBUTES)
    for name in pairs.ATTRIBUTES:
        card = read_card(str(CARDS / f"{name}.yaml"))
        assert set(card.classes) == set(report.VALUES[name])
        assert card.patient == "source_volume"


def test_the_recipes_read_what_the_scripts_write(modules: tuple[ModuleType, ModuleType]) -> None:
    _, report = modules
    folder = ROOT / "recipes" / "quickstart-clip"
    (source,) = load_recipe(folder / "pretrain.yaml").data.train
    assert (source.path, source.root) == (
        "work_dirs/quickstart/data/pairs_train.jsonl",
        "work_dirs/quickstart/data",
    )
    scores = read_yaml(ROOT / "examples" / "quickstart_clip" / "scores.yaml")
    assert [
        Path(task["task"].get("card", task["task"].get("path"))).name for task in scores["tasks"]
    ] == [*(f"{name}.yaml" for name in report.VALUES), "pairs_test.jsonl"]


def test_chance_and_named_values(modules: tuple[ModuleType, ModuleType]) -> None:
    _, report = modules
    assert report.hit(right=1, candidates=10, k=1) == pytest.approx(0.1)
    assert report.hit(right=2, candidates=4, k=2) == pytest.approx(1 - 1 / 6)
    assert report.named("Axial CT of the head.", "plane") == {"axial"}
    assert report.named("CT or MR", "modality") == {"CT", "MR"}
    assert str(report.Value(0.5, None, None)) == "0.50"
    assert str(report.Value(0.5, 0.25, 0.75)) == "0.50 (0.25 to 0.75)"
