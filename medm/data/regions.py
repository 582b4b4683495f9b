"""Region prompts: parts of an image that a user turn asks about.

A record lists them in `regions`, one for each `<region>` in the text of its user turns. A model
reads them in one of two ways (`model.regions`): `draw` marks them on the pixels and leaves the text
`<region>` as it is (published by UniBiomed); `text` writes their coordinates in place of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

from medm.data.field_types import json_type
from medm.errors import DataError
from medm.imaging.marks import Mark, MarkedImage
from medm.metrics.boxes import CODECS
from medm.types import (
    REGION_MARK,
    Media,
    RegionMark,
    RegionSource,
    Sample,
    Turn,
    TurnPart,
)

REGION_FIELD = "regions"
"""Record field that lists regions, one for each `<region>` in the user's turns."""

RegionWay: TypeAlias = Literal["draw", "text"]
"""How a model reads regions."""

CODEC = "uni-med"
"""Codec of the coordinates (`medm.metrics.boxes`): whole numbers on a grid of 100."""

_SHAPES = ("box", "point")
_LENGTHS = {"box": 4, "point": 2}
_COORDINATES = {"box": "[x1, y1, x2, y2]", "point": "[x, y]"}


def read_regions(
    record: Mapping[str, object], turns: Sequence[Turn]
) -> tuple[list[Turn], tuple[RegionSource, ...]]:
    """Read the regions of a record.

    Args:
        record: the record.
        turns: its turns, in whose user text `<region>` is letters so far.

    Returns:
        The turns, with a `RegionMark` for each `<region>` of a record that has regions, and the
        regions.

    Raises:
        DataError: regions and `<region>` that differ in number, or an entry that is no region.
    """
    value = record.get(REGION_FIELD)
    if value is None:
        return list(turns), ()
    if not isinstance(value, list):
        raise DataError(
            f"expected a list of regions, one for each {REGION_MARK}, found {json_type(value)}",
            field=REGION_FIELD,
        )
    marked, before = _split_marks(turns)
    if len(before) != len(value):
        raise DataError(
            f"{len(value)} region(s), but {len(before)} {REGION_MARK} in the user's turns; write "
            f"one {REGION_MARK} where each region is named, in order",
            field=REGION_FIELD,
        )
    kinds = [part.branch for turn in marked for part in turn.content if isinstance(part, Media)]
    regions = tuple(
        _region(entry, f"{REGION_FIELD}.{number}", kinds, shown)
        for number, (entry, shown) in enumerate(zip(value, before, strict=True))
    )
    return marked, regions


def _split_marks(turns: Sequence[Turn]) -> tuple[list[Turn], list[int]]:
    """Return turns with `RegionMark` parts, and of each mark the number of media before it."""
    before: list[int] = []
    media, result = 0, []
    for turn in turns:
        parts: list[TurnPart] = []
        for part in turn.content:
            media += isinstance(part, Media)
            is_text = isinstance(part, str) and turn.role == "user"
            pieces: list[TurnPart] = [*part.split(REGION_MARK)] if is_text else [part]  # type: ignore[union-attr]
            for position, piece in enumerate(pieces):
                if position:
                    parts.append(RegionMark(len(before)))
                    before.append(media)
                if piece:
                    parts.append(piece)
        result.append(Turn(turn.role, tuple(parts)))
    return result, before


def _region(entry: object, field: str, kinds: Sequence[str], shown: int) -> RegionSource:
    """Return one region.

    Args:
        entry: as the record has it.
        field: its place, for messages.
        kinds: kinds of the record's media in order.
        shown: number of media before its `<region>`.
    """
    expected = "an object with 'box' or 'point', and perhaps 'image'"
    if not isinstance(entry, dict):
        raise DataError(f"expected {expected}, found {json_type(entry)}", field=field)
    if unknown := sorted(entry.keys() - {"image", *_SHAPES}):
        raise DataError(f"unknown key {unknown[0]!r}; expected {expected}", field=field)
    given = [name for name in _SHAPES if entry.get(name) is not None]
    if len(given) != 1:
        raise DataError(
            f"expected one of {', '.join(_SHAPES)}, found {' and '.join(given) or 'none'}",
            field=field,
        )
    media = _image(entry.get("image"), f"{field}.image", kinds, shown)
    name = given[0]
    numbers = _numbers(entry[name], name, f"{field}.{name}")
    return RegionSource(
        media=media,
        field=field,
        box=numbers if name == "box" else None,
        point=numbers if name == "point" else None,
    )


def _image(value: object, field: str, kinds: Sequence[str], shown: int) -> int:
    """Return the position among the media of the image that a region lies in.

    Without a number it is the last image before the `<region>`.
    """
    images = [position for position, kind in enumerate(kinds) if kind == "image"]
    if value is None:
        earlier = [position for position in images if position < shown]
        if not earlier:
            raise DataError(
                f"no image stands before this {REGION_MARK}; say which one with 'image': its "
                "number among the images of the record, from 0",
                field=field,
            )
        return earlier[-1]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(images):
        raise DataError(
            f"expected the number of an image of the record, from 0 to {len(images) - 1}"
            if images
            else "the record has no image; regions of volumes are not read",
            field=field,
        )
    return images[value]


def _numbers(value: object, name: str, field: str) -> tuple[float, ...]:
    """Return the coordinates of a box or point."""
    fits = (
        isinstance(value, list)
        and len(value) == _LENGTHS[name]
        and all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in value)
        and all(math.isfinite(n) for n in value)
    )
    if not isinstance(value, list) or not fits:
        raise DataError(f"expected {_COORDINATES[name]} in pixels of the file", field=field)
    numbers = tuple(float(number) for number in value)
    if name == "box" and not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
        raise DataError(f"expected x1 < x2 and y1 < y2, found {value}", field=field)
    return numbers


def prepare_regions(
    sample: Sample, way: RegionWay | None, size_of: Callable[[int], tuple[int, int]]
) -> Sample:
    """Return a sample whose regions are text: `<region>` beside a mark, or coordinates.

    Coordinates are boxes in the codec `CODEC`; a point is a box whose corners are the same.

    Args:
        sample: the record.
        way: how its model reads regions; None where it does not.
        size_of: height and width of the upright image at a position of `Sample.media`.

    Raises:
        DataError: the sample has regions, and the model reads none.
        MediaError: a region that does not lie in its image.
    """
    if not sample.regions:
        return sample
    if way is None:
        raise DataError(
            "the record has regions, and the model reads none; set model.regions: draw (marks on "
            "the image) or text (coordinates), or leave the record out",
            field=REGION_FIELD,
        )

    def text(part: TurnPart) -> TurnPart:
        if not isinstance(part, RegionMark):
            return part
        return REGION_MARK if way == "draw" else _coordinates(sample, part.number, size_of)

    return replace(
        sample,
        turns=tuple(Turn(turn.role, tuple(map(text, turn.content))) for turn in sample.turns),
    )


def _coordinates(sample: Sample, number: int, size_of: Callable[[int], tuple[int, int]]) -> str:
    """Return the text of a region. Raises `MediaError` where it does not lie in its image."""
    region = sample.regions[number]
    height, width = size = size_of(region.media)
    _mark(region).require_inside(size, str(sample.media[region.media].path))
    corners = region.box if region.box is not None else (region.point or ()) * 2
    return CODECS[CODEC].encode(corners, (width, height))


def marked_image(
    source: Path | BinaryIO, sample: Sample, media: int
) -> Path | BinaryIO | MarkedImage:
    """Return an image with the regions that lie in it, for `medm.imaging.prepare`.

    Args:
        source: the image.
        sample: the record.
        media: position of the image in `Sample.media`.
    """
    marks = tuple(_mark(region) for region in sample.regions if region.media == media)
    return MarkedImage(source, marks) if marks else source


def is_drawn_on(view: str) -> bool:
    """Return whether marks are drawn for a view: that of the language model, not a mask head's."""
    return view == "image"


def _mark(region: RegionSource) -> Mark:
    return Mark(region.field, box=region.box, point=region.point)
