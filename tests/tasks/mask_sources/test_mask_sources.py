"""Sources of grounded records: hand-checked records of each, and what is left out."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from medm.data.check import check
from medm.data.conversations import Conversations
from medm.data.left_out import LeftOut
from medm.data.options import SourceOptions
from medm.data.turns import parse_record
from medm.data.writing import write_records
from medm.errors import DataError
from medm.imaging import ImagePreprocess, VolumePreprocess, prepare
from medm.imaging.mask_files import read_mask
from medm.tasks.mask_sources import MASK_SOURCES
from medm.tasks.mask_sources.base import WORDINGS, wordings
from medm.tasks.mask_sources.slices import MAX_SLICES
from medm.types import MASK_TOKEN, Sample
from tests.cli.runner import medm
from tests.tasks.layouts import put_image, put_json
from tests.tasks.mask_sources.layouts import LAYOUTS, SIZE, Expected, coco, put_mask, sentences

NAMES = MASK_SOURCES.names()
PREPROCESS: Mapping[str, Any] = {
    "image": ImagePreprocess(size=[8, 8], window=[0, 255]),
    "volume": VolumePreprocess(size=[4, 8, 8], scale="minmax"),
}


def converted(name: str, root: Path, **options: Any) -> tuple[list[dict[str, Any]], LeftOut]:
    left_out = LeftOut(keep=5)
    return list(MASK_SOURCES.get(name).records(root, left_out=left_out, **options)), left_out


def linked(sample: Sample, root: Path) -> list[list[int | None]]:
    """Of each `[SEG]` the pixels of its masks, read on the grids of their files."""
    found: dict[int, list[int | None]] = {}
    for mask in sample.masks:
        media = sample.media[mask.media]
        placement = prepare(root / str(media.path), PREPROCESS[media.branch]).placement
        pixels = None if mask.absent else int(read_mask(mask, root, placement).sum())
        found.setdefault(mask.token, []).append(pixels)
    return [found[token] for token in sorted(found)]


def test_every_source_has_a_layout() -> None:
    assert set(NAMES) == set(LAYOUTS)


@pytest.mark.parametrize("name", NAMES)
def test_records_are_those_counted_by_hand(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    layout.build(tmp_path)
    records, left_out = converted(name, tmp_path)
    assert left_out.counts == layout.left_out
    found = []
    for record in records:
        sample = parse_record(record)
        phrases = {mask.token: mask.phrase for mask in sample.masks}
        found.append(
            Expected(
                [str(media.path) for media in sample.media],
                sample.turns[1].as_written,
                linked(sample, tmp_path),
                [phrases[token] for token in sorted(phrases)],
            )
        )
    assert found == layout.expected
    assert len({record["id"] for record in records}) == len(records)


@pytest.mark.parametrize("name", NAMES)
def test_the_check_of_data_accepts_the_records(name: str, tmp_path: Path) -> None:
    LAYOUTS[name].build(tmp_path)
    records, _ = converted(name, tmp_path)
    write_records(tmp_path / "out.json", records)
    report = check(
        [SourceOptions(path=str(tmp_path / "out.json"), root=str(tmp_path))], Conversations()
    )
    assert report.ok, report.lines()
    assert report.records == len(LAYOUTS[name].expected)
    masks = sum(len(group) for item in LAYOUTS[name].expected for group in item.masks)
    assert report.media["mask"] == masks


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_draws_wordings_and_keeps_the_links(name: str, tmp_path: Path) -> None:
    LAYOUTS[name].build(tmp_path)
    first, again, other = (converted(name, tmp_path, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again
    if name != "m3d-refseg":  # its questions are published
        assert [r["conversations"] for r in first] != [r["conversations"] for r in other]
    for record, expected in zip(first, LAYOUTS[name].expected, strict=True):
        assert linked(parse_record(record), tmp_path) == expected.masks


@pytest.mark.parametrize("name", NAMES)
def test_missing_annotations_are_named(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    layout.build(tmp_path)
    for file in tmp_path.rglob(Path(layout.annotations).name):
        file.unlink()
    with pytest.raises(DataError, match="is missing in"):
        converted(name, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_split_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no split 'dev'"):
        converted(name, tmp_path, split="dev")


@pytest.mark.parametrize("content", [[], {"annotations": {}}, {"images": []}])
def test_another_layout_of_the_annotations_is_refused(content: Any, tmp_path: Path) -> None:
    put_json(tmp_path / "train.json", content)
    with pytest.raises(DataError, match="expected"):
        converted("biomedparse", tmp_path)


def test_a_set_without_a_usable_row_says_why(tmp_path: Path) -> None:
    put_json(tmp_path / "train.json", {"annotations": [{"file_name": "a.png", "sentences": []}]})
    with pytest.raises(DataError, match=r"no row of biomedparse .* a file is missing"):
        converted("biomedparse", tmp_path)


def test_rows_and_files_that_are_left_out_are_listed_with_their_place(tmp_path: Path) -> None:
    coco(tmp_path)
    text = "\n".join(converted("biomedparse", tmp_path)[1].lines())
    assert "2 left out: a file is missing; the first: " in text
    assert "record 4" in text
    assert "train_mask/stray.png is not used" in text
    assert "away_CT_liver.png" in text


def test_boxes_are_around_one_part_that_is_large_enough(tmp_path: Path) -> None:
    LAYOUTS["unibiomed/region"].build(tmp_path)
    boxes = set()
    for seed in range(8):
        large, small = converted("unibiomed/region", tmp_path, seed=seed)[0]
        boxes.add(tuple(large["regions"][0]["box"]))
        assert small["regions"] == [{"box": [30, 10, 40, 20]}]
    # The part of 2 x 2 pixels is never drawn.
    assert boxes == {(5, 5, 25, 30), (50, 5, 75, 30)}


def test_the_box_of_a_mask_does_not_depend_on_the_other_rows(tmp_path: Path) -> None:
    LAYOUTS["unibiomed/region"].build(tmp_path)
    (before, *_), _ = converted("unibiomed/region", tmp_path, seed=3)
    content = json.loads((tmp_path / "train.json").read_text())
    put_json(tmp_path / "train.json", {"annotations": content["annotations"][::-1]})
    (*_, after), _ = converted("unibiomed/region", tmp_path, seed=3)
    assert before["regions"] == after["regions"]


@pytest.mark.parametrize("seed", [None, 4])
def test_a_volume_gives_at_most_ten_slices_in_order(seed: int | None, tmp_path: Path) -> None:
    names = [f"s{number:02}" for number in range(25)]
    for number, name in enumerate(names):
        put_image(tmp_path / f"train/{name}.png", SIZE)
        put_mask(tmp_path / f"train_mask/{name}_m.png", number + 1)
    entry = {
        "exp": "spleen in abdomen CT",
        "img_file": [f"{name}.png" for name in names],
        "mask_file": [f"{name}_m.png" for name in reversed(names)],
    }
    meta = {"volumes": {"v": {"slices": entry["img_file"], "expressions": {"0": entry}}}}
    put_json(tmp_path / "meta_train.json", meta)
    (record,), left_out = converted("unibiomed/segmentation-3d", tmp_path, seed=seed)
    assert not left_out.total
    assert len(record["image"]) == MAX_SLICES and record["image"] == sorted(record["image"])
    if seed is None:
        assert record["image"][0].endswith("s00.png") and record["image"][-1].endswith("s24.png")
    pixels = [int(Path(path).stem[1:]) + 1 for path in record["image"]]
    assert linked(parse_record(record), tmp_path) == [pixels]


def test_a_mask_of_slice_10_is_not_one_of_slice_1(tmp_path: Path) -> None:
    for name in ("v_1", "v_10"):
        put_image(tmp_path / f"train/{name}.png", SIZE)
        put_mask(tmp_path / f"train_mask/{name}_m.png", 2)
    masks = ["v_10_m.png", "v_1_m.png"]
    entry = {"exp": "x", "img_file": ["v_1.png"], "mask_file": masks}
    put_json(tmp_path / "meta_train.json", {"volumes": {"v": {"expressions": {"0": entry}}}})
    (record,), left_out = converted("unibiomed/segmentation-3d", tmp_path)
    assert [mask["file"] for mask in record["masks"][0]] == ["train_mask/v_1_m.png"]
    assert "v_10_m.png: it is named after no slice" in left_out.lines()[0]


def test_a_second_mask_of_a_slice_is_left_out(tmp_path: Path) -> None:
    put_image(tmp_path / "train/a.png", SIZE)
    put_mask(tmp_path / "train_mask/a_1.png", 2)
    put_mask(tmp_path / "train_mask/a_2.png", 3)
    entry = {"exp": "x", "img_file": ["a.png"], "mask_file": ["a_1.png", "a_2.png"]}
    put_json(tmp_path / "meta_train.json", {"volumes": {"v": {"expressions": {"0": entry}}}})
    (record,), left_out = converted("unibiomed/segmentation-3d", tmp_path)
    assert [mask["file"] for mask in record["masks"][0]] == ["train_mask/a_1.png"]
    assert "a second mask of the slice a.png" in left_out.lines()[0]


def test_a_test_split_has_files_of_its_own(tmp_path: Path) -> None:
    put_image(tmp_path / "test/a.png", SIZE)
    put_mask(tmp_path / "test_mask/a_m.png", 2)
    row = {"file_name": "a.png", "mask_file": "a_m.png", "sentences": sentences("x in y CT")}
    put_json(tmp_path / "test.json", {"annotations": [row]})
    (record,), _ = converted("unibiomed/segmentation-2d", tmp_path, split="test")
    assert record["image"] == "test/a.png" and record["id"] == "test:0:0"


@pytest.mark.parametrize("task", sorted(file.stem for file in WORDINGS.glob("*.yaml")))
def test_wordings_are_several_and_name_what_they_must(task: str) -> None:
    known = wordings(task)
    assert len(known.questions) == len(set(known.questions)) >= 4
    assert known.answers
    for pool in (known.questions, known.answers, known.absent):
        fields = [
            {name for _, name, _, _ in string.Formatter().parse(text) if name} for text in pool
        ]
        if pool is not known.answers or task != "m3d-seg":
            assert all(found == fields[0] for found in fields)
    assert not any(MASK_TOKEN in text for text in [*known.questions, *known.absent])
    if task not in ("region", "description", "decathlon"):
        assert all(text.count(MASK_TOKEN) == 1 for text in known.answers)


@pytest.mark.parametrize("name", ["biomedparse", "unibiomed/disease", "decathlon"])
def test_the_command_writes_records_and_lists_what_is_left_out(name: str, tmp_path: Path) -> None:
    LAYOUTS[name].build(tmp_path / "data")
    output = tmp_path / "out.json"
    arguments = ("--task", name, "--data", str(tmp_path / "data"))
    done = medm("data", "convert", str(output), *arguments)
    assert done.code == 0, done.err
    assert len(json.loads(output.read_text())) == len(LAYOUTS[name].expected)
    text = " ".join(done.out.split())
    for reason, count in LAYOUTS[name].left_out.items():
        assert f"{count} left out: {reason}; the first:" in text
    checked = medm("data", "check", str(output), "--root", str(tmp_path / "data"))
    assert checked.code == 0, checked.out
    one = tmp_path / "one.json"
    assert medm("data", "convert", str(one), *arguments, "--limit", "1", "--seed", "1").code == 0
    assert len(json.loads(one.read_text())) == 1


def test_the_command_suggests_the_name_of_a_source(tmp_path: Path) -> None:
    done = medm(
        "data", "convert", str(tmp_path / "o.json"), "--task", "unibiomed/diseases", "--data", "."
    )
    assert done.code != 0
    assert "did you mean 'unibiomed/disease'" in " ".join(done.err.split())
