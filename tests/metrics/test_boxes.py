"""Box codecs and IoU: error bounds proven, malformed text counted, overlaps by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medm.metrics.base import Resampling
from medm.metrics.boxes import (
    CODECS,
    BinnedBoxes,
    Box,
    FractionBoxes,
    ParsedBoxes,
    box_accuracy,
    box_iou,
    enclosing_iou,
    iou,
    scale,
)

FAST = Resampling(rounds=20)


@st.composite
def boxes(draw: st.DrawFn, axes: int) -> tuple[Box, tuple[int, ...]]:
    extent = tuple(draw(st.integers(1, 4000)) for _ in range(axes))
    corners = [
        sorted(draw(st.tuples(*[st.floats(0, size, allow_nan=False)] * 2))) for size in extent
    ]
    return (*(low for low, _ in corners), *(high for _, high in corners)), extent


@settings(max_examples=300, deadline=None)
@given(
    boxes(2),
    st.sampled_from([50, 100, 1000]),
    st.sampled_from(["floor", "round"]),
    st.sampled_from(["xy", "yx"]),
)
def test_a_binned_box_comes_back_within_its_bound(
    case: tuple[Box, tuple[int, ...]], bins: int, rounding: str, order: str
) -> None:
    box, extent = case
    codec = BinnedBoxes(bins=bins, rounding=rounding, order=order)  # type: ignore[arg-type]
    parsed = codec.parse(f"It is at {codec.encode(box, extent)}.")
    assert (parsed.malformed, parsed.repaired, len(parsed.boxes)) == (0, 0, 1)
    for coordinate, back, size in zip(
        box, scale(parsed.boxes[0], extent), [*extent, *extent], strict=True
    ):
        bound = size / bins if rounding == "floor" else size / bins / 2
        assert abs(back - coordinate) <= bound * (1 + 1e-9) + 1e-9
        if rounding == "floor":
            assert back <= coordinate + 1e-9  # floors towards the origin


@settings(max_examples=200, deadline=None)
@given(boxes(3), st.integers(1, 4), st.booleans())
def test_a_volume_box_comes_back_within_its_bound(
    case: tuple[Box, tuple[int, ...]], decimals: int, marked: bool
) -> None:
    box, extent = case
    codec = FractionBoxes(decimals=decimals, marked=marked)
    parsed = codec.parse(codec.encode(box, extent))
    assert (parsed.malformed, parsed.repaired) == (0, 0)
    for coordinate, back, size in zip(
        box, scale(parsed.boxes[0], extent), [*extent, *extent], strict=True
    ):
        assert abs(back - coordinate) <= size * 0.5 * 10**-decimals * (1 + 1e-9) + 1e-9


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="{}<>[],.0123456789 -+abx_start", max_size=60), st.sampled_from(sorted(CODECS))
)
def test_no_text_breaks_the_parser(text: str, codec: str) -> None:
    parsed = CODECS[codec].parse(text)
    for box in parsed.boxes:
        axes = len(box) // 2
        assert all(0 <= value <= 1 for value in box)
        assert all(box[k] <= box[axes + k] for k in range(axes))


@pytest.mark.parametrize(
    ("codec", "text", "expected"),
    [
        ("uni-med", "{<10><20><30><40>}", ParsedBoxes(((0.1, 0.2, 0.3, 0.4),))),
        ("uni-med", "{ <10> <20> <30> <40> } {<0><0><100><100>}", ParsedBoxes(((0.1, 0.2, 0.3, 0.4), (0, 0, 1, 1)))),
        ("uni-med", "{<30><40><10><20>}", ParsedBoxes(((0.1, 0.2, 0.3, 0.4),), repaired=1)),
        ("uni-med", "{<10><20><30><400>}", ParsedBoxes(((0.1, 0.2, 0.3, 1.0),), repaired=1)),
        ("uni-med", "{<-5><20><30><40>}", ParsedBoxes(((0.0, 0.2, 0.3, 0.4),), repaired=1)),
        ("uni-med", "{<10><20><30>}", ParsedBoxes(malformed=1)),
        ("uni-med", "{<10><20><30><40", ParsedBoxes(malformed=1)),
        ("uni-med", "{<a><b><c><d>}", ParsedBoxes(malformed=1)),
        ("uni-med", "{<1.5><2><3><4>}", ParsedBoxes(malformed=1)),
        ("uni-med", "the left lung", ParsedBoxes()),
        ("thousand", "{<10><20><30><40>}", ParsedBoxes(((0.01, 0.02, 0.03, 0.04),))),
        ("m3d", "[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]", ParsedBoxes(((0.1, 0.2, 0.3, 0.4, 0.5, 0.6),))),
        ("m3d", "<bx_start>[0.1,0.2,0.3,0.4,0.5,0.6]<bx_end>", ParsedBoxes(((0.1, 0.2, 0.3, 0.4, 0.5, 0.6),))),
        ("m3d", "<bx_start>[.1, 0, 0, 1, 1, 1]<bx_end>", ParsedBoxes(((0.1, 0, 0, 1, 1, 1),))),
        ("m3d", "<bx_start>[0.1, 0.2]<bx_end>", ParsedBoxes(malformed=1)),
        ("m3d", "<bx_start>the liver<bx_end>", ParsedBoxes(malformed=1)),
        ("m3d", "[0.1, 0.2, 0.3, 0.4, nan, 0.6]", ParsedBoxes(malformed=1)),
        ("m3d", "as in [1, 2]", ParsedBoxes()),
    ],
)  # fmt: skip
def test_what_a_text_says(codec: str, text: str, expected: ParsedBoxes) -> None:
    parsed = CODECS[codec].parse(text)
    assert (parsed.malformed, parsed.repaired) == (expected.malformed, expected.repaired)
    assert [pytest.approx(box) for box in expected.boxes] == list(parsed.boxes)


def test_the_published_text_of_a_box() -> None:
    # 51.9 and 77.7 % floor to 51 and 77; 3 decimals of a 32 x 256 x 256 volume.
    assert CODECS["uni-med"].encode((51.9, 0, 77.7, 100), (100, 100)) == "{<51><0><77><100>}"
    assert CODECS["thousand"].encode((51.96, 0, 77.7, 100), (100, 100)) == "{<520><0><777><1000>}"
    assert CODECS["m3d"].encode((4, 64, 32, 16, 128, 255), (32, 256, 256)) == (
        "<bx_start>[0.125, 0.25, 0.125, 0.5, 0.5, 0.996]<bx_end>"
    )
    assert BinnedBoxes(order="yx").encode((10, 20, 30, 40), (100, 100)) == "{<20><10><40><30>}"


def test_a_box_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a box of 4 coordinates"):
        BinnedBoxes().encode((0, 0, 0, 1, 1, 1), (10, 10, 10))
    with pytest.raises(ValueError, match="cannot write the box"):
        BinnedBoxes().encode((0, 0, math.nan, 1), (10, 10))


@pytest.mark.parametrize(
    ("first", "second", "true", "inclusive", "enclosing"),
    [
        # 2-D; two 10 x 10 boxes, 5 apart on one axis: 50 / 150; (6 * 11) / (2 * 121 - 66); 50 / 150
        ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3, 66 / 176, 1 / 3),
        # corner overlap: 25 / 175 against 25 / 225 of the enclosing box
        ((0, 0, 10, 10), (5, 5, 15, 15), 1 / 7, 36 / 206, 1 / 9),
        ((0, 0, 10, 10), (0, 0, 10, 10), 1, 1, 1),
        ((0, 0, 10, 10), (20, 20, 30, 30), 0, 0, 0),
        # 3-D: two unit-ish boxes of volume 8 share 1: 1 / 15 against 1 / 27
        ((0, 0, 0, 2, 2, 2), (1, 1, 1, 3, 3, 3), 1 / 15, 8 / 46, 1 / 27),
        # boxes without extent
        ((5, 5, 5, 5), (5, 5, 5, 5), 1, 1, 0),
        ((5, 5, 5, 5), (6, 5, 6, 5), 0, 0, 0),
    ],
)
def test_overlaps_by_hand(
    first: Box, second: Box, true: float, inclusive: float, enclosing: float
) -> None:
    assert iou(first, second) == pytest.approx(true)
    assert iou(first, second, inclusive=1) == pytest.approx(inclusive)
    assert enclosing_iou(first, second) == pytest.approx(enclosing, abs=1e-5)


@settings(max_examples=100, deadline=None)
@given(boxes(3), boxes(3))
def test_iou_is_symmetric_bounded_and_never_below_the_enclosing_one(
    one: tuple[Box, tuple[int, ...]], two: tuple[Box, tuple[int, ...]]
) -> None:
    a, b = one[0], two[0]
    assert iou(a, b) == iou(b, a)
    assert 0 <= iou(a, b) <= 1
    assert iou(a, a) == 1
    assert enclosing_iou(a, b) <= iou(a, b) + 1e-9


def test_boxes_of_different_dimension_are_refused() -> None:
    with pytest.raises(ValueError, match="same number of axes"):
        iou((0, 0, 1, 1), (0, 0, 0, 1, 1, 1))


def test_scores_count_an_unreadable_box_as_zero() -> None:
    truth = ["{<0><0><10><10>}"] * 3
    guess = ["{<0><0><10><10>}", "the left lung", "{<5><0><15><10>}"]
    mean, unreadable = box_iou(guess, truth, resampling=FAST)
    assert mean.per_item == pytest.approx([1, 0, 1 / 3])
    assert unreadable.value == pytest.approx(1 / 3)
    assert box_accuracy(guess, truth, threshold=0.3, resampling=FAST)[0].value == pytest.approx(
        2 / 3
    )
    assert box_accuracy(guess, truth, resampling=FAST)[0].name == "box-accuracy@0.5"
    assert box_iou([None, (0, 0, 1, 1)], [(0, 0, 1, 1)] * 2, resampling=FAST)[0].value == 0.5
    with pytest.raises(ValueError, match="item 0: no box can be read"):
        box_iou(["x"], ["y"])


def test_an_iou_of_exactly_one_half_is_a_hit() -> None:
    assert box_accuracy([(0, 0, 1, 1)], [(0, 0, 1, 2)], resampling=FAST)[0].value == 1
