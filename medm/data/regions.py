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
from medm.data.mask_entries import mask_entry
from medm.errors import DataError
from medm.imaging.images import check_image
from medm.imaging.marks import Mark, MarkedImage, box_around
from medm.imaging.mask_files import read_mask
from medm.imaging.placement import Placement
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

_SHAPES = ("box", "point", "contour", "mask")
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
        _region(entry, number, kinds, shown)
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


def _region(entry: object, number: int, kinds: Sequence[str], shown: int) -> RegionSource:
    """Return one region.

    Args:
        entry: as the record has it.
        number: its position among the regions.
        kinds: kinds of the record's media in order.
        shown: number of media before its `<region>`.
    """
    field = f"{REGION_FIELD}.{number}"
    expected = f"an object with one of {', '.join(_SHAPES)}, and perhaps 'image'"
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
    name, place = given[0], f"{field}.{given[0]}"
    region = RegionSource(media=media, field=field)
    if name == "box":
        return replace(region, box=_numbers(entry[name], name, place))
    if name == "point":
        return replace(region, point=_numbers(entry[name], name, place))
    mask = mask_entry(entry[name], place)
    if mask.kind is not None:
        raise DataError("name the image beside the mask: {'mask': ..., 'image': 0}", field=place)
    source = mask.source(token=number, media=media, phrase=None)
    if source.absent:
        raise DataError("an absent target is no region", field=place)
    return replace(region, contour=source) if name == "contour" else replace(region, mask=source)


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
    sample: Sample, way: RegionWay | None, size_of: Callable[[int], tuple[int, int]], root: Path
) -> Sample:
    """Return a sample whose regions are text: `<region>` beside a mark, or coordinates.

    Coordinates are boxes in the codec `CODEC`: around a contour or mask, and for a point a box
    whose corners are the same.

    Args:
        sample: the record.
        way: how its model reads regions; None where it does not.
        size_of: height and width of the upright image at a position of `Sample.media`.
        root: folder that paths of masks are relative to.

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
        if way == "draw":
            return REGION_MARK
        region = sample.regions[part.number]
        return _coordinates(
            region, size_of(region.media), str(sample.media[region.media].path), root
        )

    return replace(
        sample,
        turns=tuple(Turn(turn.role, tuple(map(text, turn.content))) for turn in sample.turns),
    )


def _coordinates(region: RegionSource, size: tuple[int, int], name: str, root: Path) -> str:
    """Return the text of a region. Raises `MediaError` where it does not lie in its image."""
    mark = _mark(region, size, root)
    mark.require_inside(size, name)
    mask = mark.outline if mark.outline is not None else mark.area
    if mask is not None:
        box = box_around(mask)
    else:
        box = mark.box if mark.box is not None else (mark.point or ()) * 2
    height, width = size
    return CODECS[CODEC].encode(box, (width, height))


def marked_image(
    source: Path | BinaryIO, sample: Sample, media: int, root: Path
) -> Path | BinaryIO | MarkedImage:
    """Return an image with the regions that lie in it, for `medm.imaging.prepare`.

    Args:
        source: the image.
        sample: the record.
        media: position of the image in `Sample.media`.
        root: folder that paths of masks are relative to.

    Raises:
        MediaError: the image or a mask cannot be read, or they differ in size.
    """
    regions = [region for region in sample.regions if region.media == media]
    if not regions:
        return source
    size = check_image(source)
    return MarkedImage(source, tuple(_mark(region, size, root) for region in regions))


def is_drawn_on(view: str) -> bool:
    """Return whether marks are drawn for a view: that of the language model, not a mask head's."""
    return view == "image"


def _mark(region: RegionSource, size: tuple[int, int], root: Path) -> Mark:
    """Return a region in pixels of its image. Raises `MediaError` for a mask that is not read."""
    placement = Placement.of_source(size)
    contour, mask = (
        None if source is None else read_mask(source, root, placement)
        for source in (region.contour, region.mask)
    )
    return Mark(region.field, box=region.box, point=region.point, outline=contour, area=mask)
