"""The quickstart of grounded models: masks lie on what they name, no volume is on both sides, medm
reads the records, and the table's numbers are those of the files."""

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

from medm.data.turns import parse_record
from tests.examples.scripts import scripts


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    with scripts("quickstart_seg", "quickstart"):
        yield importlib.import_module("masks"), importlib.import_module("report")


@pytest.fixture(scope="module")
def data(
    modules: tuple[ModuleType, ModuleType], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The records of a few pictures of each volume."""
    masks, _ = modules
    folder = tmp_path_factory.mktemp("seg") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "TRAIN_PICTURES", {"chest-ct-1": 6, "abdomen-ct-1": 4, "head-mr-2": 2})
        patch.setattr(masks, "TEST_SLICES", {"chest-ct-2": 3, "abdomen-ct-2": 2})
        assert masks.main([str(folder)]) == 0
    yield folder


def read(file: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return records


@pytest.mark.parametrize(
    ("volume", "target", "low", "high"),
    [
        # Hounsfield units of the organs, without and with contrast: labels that lay elsewhere in
        # the volume would have other ones.
        ("abdomen-ct-1", "liver", 35, 60),
        ("abdomen-ct-1", "spleen", 20, 60),
        ("abdomen-ct-2", "liver", 70, 120),
        ("abdomen-ct-2", "aorta", 140, 220),
        ("chest-ct-3", "aorta", 250, 450),
        ("chest-ct-1", "lungs", -950, -650),
    ],
)
def test_masks_lie_on_what_they_name(
    modules: tuple[ModuleType, ModuleType], volume: str, target: str, low: float, high: float
) -> None:
    marked = modules[0].load(volume)
    assert low < marked.scan.voxels[marked.masks[target]].mean() < high


def test_what_is_asked_is_known(modules: tuple[ModuleType, ModuleType]) -> None:
    masks, _ = modules
    abdomen = masks.load("abdomen-ct-1")
    assert abdomen.known(40) == {}  # no slice of which anything is marked
    assert abdomen.known(95)["liver"]
    head = masks.load("head-mr-colin27")
    assert head.known(50) == dict.fromkeys(("lungs", "liver", "spleen", "aorta"), False)
    chest = masks.load("chest-ct-1")
    assert "liver" not in chest.known(20)  # it may be there, unmarked


def test_no_volume_is_on_both_sides(data: Path) -> None:
    volumes = [
        {record["source_volume"] for record in read(data / f"{split}.json")}
        for split in ("train", "test")
    ]
    assert not volumes[0] & volumes[1]


def test_medm_reads_the_records(data: Path) -> None:
    for split in ("train", "test"):
        for record in read(data / f"{split}.json"):
            sample = parse_record(record, inference=split == "test")
            assert len(sample.masks) == len(record["targets"])
            for mask in sample.masks:
                assert mask.absent or (data / str(mask.path)).is_file()
    assert any(mask is None for record in read(data / "test.json") for mask in record["masks"])


def test_a_mask_has_the_place_of_its_picture(data: Path) -> None:
    record = next(
        r for r in read(data / "test.json") if r["targets"] == ["lungs"] and r["masks"][0]
    )
    image = np.asarray(Image.open(data / record["image"]))
    mask = np.asarray(Image.open(data / record["masks"][0]["file"])) > 0
    assert image.shape == mask.shape == (224, 224)
    body = image > 120  # soft tissue in a lung window
    assert image[mask].mean() < 100
    assert not (mask & body).sum() > 0.1 * mask.sum()


def test_the_constant_mask_and_the_range_that_fit_best(
    modules: tuple[ModuleType, ModuleType],
) -> None:
    image = np.zeros((8, 8), np.uint8)
    image[2:6, 2:6] = 100
    mask = image > 50
    other = mask.copy()
    other[0, 0] = True  # in one of three slices
    constant, (low, high) = modules[1].fitted([(image, mask), (image, mask), (image, other)])
    assert (constant == mask).all()
    assert low > 0 and low <= 100 <= high


def test_the_table_counts_what_was_answered(
    modules: tuple[ModuleType, ModuleType], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that draws the truth, and a mask where there is no target."""
    _, report = modules
    folder = data.parent
    lines = []
    for index, record in enumerate(read(data / "test.json")):
        truth = record["masks"][0]
        file = (
            "data/images/" + Path(record["image"]).name
            if truth is None
            else f"data/{truth['file']}"
        )
        spans = [{"mask": file, "presence": 0.9 if index % 2 else 0.1}]
        lines.append(json.dumps({"index": index, "spans": spans}))
    (folder / "replies.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.setattr(report, "TARGETS", ("lungs", "liver"))
    lungs, liver = report.rows(folder)
    assert (lungs.model, liver.model) == (1.0, 1.0)
    assert lungs.constant < 1
    asked = [
        (index % 2, record["masks"][0] is not None)
        for index, record in enumerate(read(data / "test.json"))
        if record["targets"] == ["lungs"]
    ]
    assert lungs.drawn == 1.0
    assert lungs.without == sum(not present for _, present in asked)
    assert lungs.seen == np.mean([said for said, present in asked if present])
    assert lungs.claimed == np.mean([said for said, present in asked if not present])


def test_a_reply_without_a_mask_is_an_empty_one(modules: tuple[ModuleType, ModuleType]) -> None:
    assert not modules[1].predicted_mask(Path(), {"spans": [{"mask": None}]}, (4, 4)).any()


def test_the_picture_shows_the_middle_slice_of_each_target(
    modules: tuple[ModuleType, ModuleType], data: Path
) -> None:
    picture = importlib.import_module("picture")
    records = read(data / "test.json")
    lungs = [i for i, one in enumerate(records) if one["targets"] == ["lungs"] and one["masks"][0]]
    assert picture.middle(records, "lungs") == lungs[len(lungs) // 2]
    shown = [
        name
        for name in picture.ORDER
        if any(r["targets"] == [name] and r["masks"][0] for r in records)
    ]
    # Masks are filled with more red than blue, which neither slices nor outlines have.
    filled = {}
    for with_masks in (True, False):
        lines = [
            {"index": i, "reply": one["targets"][0],
             "spans": [{"mask": f"data/{one['masks'][0]['file']}"}] if one["masks"][0] and with_masks else []}
            for i, one in enumerate(records)
        ]  # fmt: skip
        (data.parent / "replies.jsonl").write_text(
            "".join(f"{json.dumps(line)}\n" for line in lines)
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(picture, "ORDER", tuple(shown))
            assert picture.main([str(data.parent)]) == 0
        drawn = np.asarray(Image.open(data.parent / "result.png").convert("RGB")).astype(int)
        filled[with_masks] = (drawn[..., 0] - drawn[..., 2] > 60).mean()
    assert filled[True] > 0.005
    assert filled[False] == 0
