"""Regions of records: read, drawn on the pixels or written as coordinates, and their errors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medm.data.check import check
from medm.data.conversations import Conversations
from medm.data.dataset import ExampleDataset
from medm.data.options import SourceOptions
from medm.data.records import Records
from medm.data.regions import CODEC, prepare_regions
from medm.data.turns import parse_record
from medm.errors import DataError
from medm.imaging import ImagePreprocess
from medm.metrics.boxes import CODECS
from medm.types import Media, RegionMark
from tests.data.tiny import conversations, gpt, human, to_text, write_json

BOX = [10, 5, 30, 15]
SIZE = (40, 50)
"""Height and width of the image of the records."""


def record(
    question: str = "<image>\nWhat is in <region>?",
    /,
    *,
    regions: Any = ({"box": BOX},),
    **fields: Any,
) -> dict[str, Any]:
    turns = [human(question), gpt("A cyst.")]
    regions = list(regions) if isinstance(regions, tuple) else regions
    return {"image": "a.png", "conversations": turns, "regions": regions, **fields}


def pipeline(way: str | None) -> Conversations:
    """The pipeline of a model that reads regions in one way."""
    result = conversations({"image": ImagePreprocess(size=[4, 4], mean=[0.0], std=[1.0])})
    result.processor.regions = way  # type: ignore[assignment]
    return result


def written(tmp_path: Path, *records: dict[str, Any]) -> list[SourceOptions]:
    Image.new("RGB", SIZE[::-1], (100, 100, 100)).save(tmp_path / "a.png")
    return [SourceOptions(path=str(write_json(tmp_path / "data.json", list(records))))]


def test_a_region_is_a_part_of_the_user_turn_and_belongs_to_the_last_image_before_it() -> None:
    sample = parse_record(
        record(
            "<image> <region> and <image> <region>, <region>",
            regions=({"box": BOX}, {"point": [3, 4.5]}, {"box": BOX, "image": 0}),
            image=["a.png", "b.png"],
        )
    )
    assert [(r.media, r.box, r.point, r.field) for r in sample.regions] == [
        (0, (10, 5, 30, 15), None, "regions.0"),
        (1, None, (3, 4.5), "regions.1"),
        (0, (10, 5, 30, 15), None, "regions.2"),
    ]
    parts = [part for part in sample.turns[0].content if isinstance(part, RegionMark)]
    assert parts == [RegionMark(0), RegionMark(1), RegionMark(2)]
    assert sample.turns[0].as_written == "<image> <region> and <image> <region>, <region>"
    assert "regions" not in sample.extra


def test_the_number_of_an_image_counts_images_alone() -> None:
    sample = parse_record(
        record("<volume> <image> <region>", volume="v.nii", regions=({"box": BOX, "image": 0},))
    )
    assert sample.regions[0].media == 1


@pytest.mark.parametrize("regions", [None, ()])
def test_without_regions_the_letters_are_text(regions: Any) -> None:
    found = record("<image> see <region>") if regions is None else record("<image> see")
    found["regions"] = None if regions is None else []
    sample = parse_record(found)
    assert sample.regions == ()
    assert sample.turns[0].content == (
        Media("image", "a.png"),
        " see <region>"[: 13 if regions is None else 4],
    )


def test_the_letters_are_text_in_a_reply_and_a_system_prompt() -> None:
    sample = parse_record(
        {
            "image": "a.png",
            "system": "Regions are written <region>.",
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": "<region>?"}],
                },
                {"role": "assistant", "content": "In <region> a cyst."},
            ],
            "regions": [{"point": [1, 2]}],
        }
    )
    assert sample.turns[0].text == "Regions are written <region>."
    assert sample.turns[2].text == "In <region> a cyst."
    assert sample.turns[1].content == (Media("image", "a.png"), RegionMark(0), "?")


@pytest.mark.parametrize(
    ("regions", "field", "words"),
    [
        ({"box": BOX}, "regions", "a list of regions"),
        ([], "regions", r"0 region\(s\), but 1 <region>"),
        ([{"box": BOX}] * 2, "regions", r"2 region\(s\), but 1 <region>"),
        ([BOX], "regions.0", "an object with"),
        ([{}], "regions.0", "found none"),
        ([{"box": BOX, "point": [1, 2]}], "regions.0", "found box and point"),
        ([{"bbox": BOX}], "regions.0", "unknown key 'bbox'"),
        ([{"box": BOX[:3]}], "regions.0.box", r"\[x1, y1, x2, y2\]"),
        ([{"box": [1, 2, 3, True]}], "regions.0.box", "in pixels"),
        ([{"box": [30, 5, 10, 15]}], "regions.0.box", "x1 < x2"),
        ([{"point": [1, "2"]}], "regions.0.point", r"\[x, y\]"),
        ([{"point": [1, float("nan")]}], "regions.0.point", r"\[x, y\]"),
        ([{"mask": None}], "regions.0", "found none"),
        ([{"mask": {"file": None}}], "regions.0.mask", "an absent target"),
        ([{"contour": {"file": "m.png", "image": 0}}], "regions.0.contour", "beside the mask"),
        ([{"contour": {"files": "m.png"}}], "regions.0.contour.files", "unknown key"),
        ([{"mask": 3}], "regions.0.mask", "found a number"),
        ([{"box": BOX, "image": 1}], "regions.0.image", "from 0 to 0"),
        ([{"box": BOX, "image": -1}], "regions.0.image", "from 0 to 0"),
    ],
)
def test_what_is_no_region_is_refused(regions: Any, field: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        parse_record(record(regions=regions))
    assert caught.value.field == field


def test_a_region_before_every_image_must_name_its_image() -> None:
    with pytest.raises(DataError, match="no image stands before"):
        parse_record(record("<region> <image>"))
    sample = parse_record(record("<region> <image>", regions=({"box": BOX, "image": 0},)))
    assert sample.regions[0].media == 0
    with pytest.raises(DataError, match="regions of volumes are not read"):
        parse_record(
            {
                **record("<volume> <region>", regions=({"box": BOX, "image": 0},), volume="v"),
                "image": None,
            }
        )


def test_a_model_without_a_way_refuses_regions() -> None:
    with pytest.raises(DataError, match=r"model\.regions: draw"):
        prepare_regions(parse_record(record()), None, lambda _: SIZE, Path())


def test_drawn_regions_leave_the_text_and_change_the_pixels(tmp_path: Path) -> None:
    plain = {key: value for key, value in record().items() if key != "regions"}
    records = Records(written(tmp_path, record(), plain), pipeline("draw"))
    marked, unmarked = (ExampleDataset(records)[index] for index in range(2))
    assert marked is not None and unmarked is not None
    assert marked.input_ids == unmarked.input_ids
    assert "What is in <region>?" in to_text(marked.input_ids)
    assert np.allclose(unmarked.pixels["image"][0], 100 / 255)
    red, green, _ = marked.pixels["image"][0]
    assert (green > red + 0.01).any()


def test_coordinates_stand_in_the_text_and_the_pixels_stay(tmp_path: Path) -> None:
    regions = ({"box": BOX}, {"point": [25, 20]})
    records = Records(
        written(tmp_path, record("<image> <region> or <region>?", regions=regions)),
        pipeline("text"),
    )
    example = ExampleDataset(records)[0]
    assert example is not None
    text = to_text(example.input_ids)
    # 10 / 50, 5 / 40, 30 / 50 and 15 / 40 of 100 steps, floored as Uni-Med does.
    assert "{<20><12><60><37>} or {<50><50><50><50>}?" in text
    assert CODECS[CODEC].parse(text).boxes[0] == (0.2, 0.12, 0.6, 0.37)
    assert np.allclose(example.pixels["image"][0], 100 / 255)


def put_mask(file: Path, size: tuple[int, int] = SIZE) -> None:
    """A label map with a 3 x 8 rectangle of 2, and a pixel of 1."""
    labels = np.zeros(size, np.uint8)
    labels[10:13, 20:28], labels[0, 0] = 2, 1
    Image.fromarray(labels).save(file)


POLYGON = {"polygons": [[20, 10, 27, 10, 27, 12, 20, 12]]}
"""Outline through the centers of the corner pixels of the same rectangle."""


@pytest.mark.parametrize("entry", [{"file": "m.png", "value": 2}, POLYGON])
@pytest.mark.parametrize("shape", ["contour", "mask"])
def test_masks_are_regions_by_their_box_in_text(
    shape: str, entry: dict[str, Any], tmp_path: Path
) -> None:
    put_mask(tmp_path / "m.png")
    example = ExampleDataset(
        Records(written(tmp_path, record(regions=({shape: entry},))), pipeline("text"))
    )[0]
    assert example is not None
    # 20 / 50, 10 / 40, 28 / 50 and 13 / 40 of 100 steps.
    assert "{<40><25><56><32>}" in to_text(example.input_ids)


@pytest.mark.parametrize("shape", ["contour", "mask"])
def test_masks_are_drawn_at_their_place(shape: str, tmp_path: Path) -> None:
    put_mask(tmp_path / "m.png")
    records = written(tmp_path, record(regions=({shape: {"file": "m.png", "value": 2}},)))
    large = conversations(
        {"image": ImagePreprocess(size=list(SIZE), mean=[0.0], std=[1.0], fit="squash")}
    )
    large.processor.regions = "draw"
    example = ExampleDataset(Records(records, large))[0]
    assert example is not None
    changed = np.abs(example.pixels["image"][0] - 100 / 255).max(axis=0) > 0.1
    expected = np.zeros(SIZE, bool)
    expected[10:13, 20:28] = True
    if shape == "contour":
        expected[9, 20:28] = expected[13, 20:28] = True
        expected[10:13, 19] = expected[10:13, 28] = True
        expected[11, 21:27] = False
    assert (changed == expected).all()


@pytest.mark.parametrize("way", ["draw", "text", None])
@pytest.mark.parametrize(
    ("entry", "size", "words"),
    [
        ("m.png", (50, 40), "expected"),
        ("away.png", SIZE, "away.png"),
        ({"file": "m.png", "value": 7}, SIZE, "an empty mask marks nothing"),
    ],
)
def test_a_check_names_the_mask_that_is_no_region_of_its_image(
    entry: Any, size: tuple[int, int], words: str, way: str | None, tmp_path: Path
) -> None:
    put_mask(tmp_path / "m.png", size)
    sources = written(tmp_path, record(regions=({"contour": entry},)))
    report = check(sources, pipeline(way) if way else Conversations())
    assert report.num_bad == 1
    assert str(report.bad[0].field).startswith("regions.0")
    assert words in str(report.bad[0])


@pytest.mark.parametrize("way", ["draw", "text", None])
def test_a_check_names_the_region_that_does_not_lie_in_its_image(
    way: str | None, tmp_path: Path
) -> None:
    sources = written(tmp_path, record(), record(regions=({"box": [0, 0, 51, 9]},)))
    report = check(sources, pipeline(way) if way else Conversations())
    assert report.num_bad == 1 and report.media["region"] == 1
    assert report.bad[0].index == 1 and report.bad[0].field == "regions.0"
    assert "50 x 40 pixels" in str(report.bad[0])


def test_marks_are_not_drawn_for_a_mask_head(tmp_path: Path) -> None:
    written(tmp_path)
    sample = parse_record(record())
    drawn = pipeline("draw")
    source = tmp_path / "a.png"
    assert drawn.with_marks(source, sample, 0, "image@masks", tmp_path) is source
    assert drawn.with_marks(source, sample, 0, "image", tmp_path) is not source


def test_cached_features_and_drawn_regions_are_refused(tmp_path: Path) -> None:
    features: Any = {"image": SimpleNamespace()}
    data = ExampleDataset(Records(written(tmp_path, record()), pipeline("draw")), features=features)
    with pytest.raises(DataError, match=r"data.cache_features: null"):
        data[0]
