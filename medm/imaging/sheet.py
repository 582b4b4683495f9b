"""Sheets of labeled tiles, for people who look at data and results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medm.imaging.mask_colors import Color

_TEXT, _MARK, _GROUND = 200, 255, 24
_CAPTION = 16
"""Height of a line of text, in pixels."""
_OPPOSITE = dict(zip("LRPASI", "RLAPIS", strict=True))

Marks: TypeAlias = tuple[str, str, str, str]
"""Side of the patient at the left, right, top and bottom of a tile."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One image of a sheet."""

    pixels: np.ndarray
    """(H, W) or (H, W, 3), 0..1."""
    caption: str
    marks: Marks | None = None
    """None where the sides are not known."""
    depth: float = 0.0
    """Place of a slice along the first axis, 0..1."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of text above the tiles."""

    text: str
    color: Color | None = None
    """Of a square before the text, in a legend."""


def marks_of(across: str, down: str) -> Marks:
    """Return the marks of a tile from the sides at its right and at its bottom ("L", "P")."""
    return _OPPOSITE[across], across, _OPPOSITE[down], down


def draw_sheet(
    lines: Sequence[str | Line], tiles: Sequence[Tile], width: int, *, columns: int | None = None
) -> Image.Image:
    """Return an image of tiles in rows under lines of text.

    Args:
        lines: text above the tiles.
        tiles: at least one.
        width: of one tile, in pixels.
        columns: tiles in a row; None chooses about three columns for two rows.
    """
    font = ImageFont.load_default(size=_CAPTION - 4)
    thumbnails = [_thumbnail(tile, width, font) for tile in tiles]
    columns = min(len(tiles), columns or math.ceil(math.sqrt(len(tiles) * 1.5)))
    cell = max(thumbnail.height for thumbnail in thumbnails)
    written = [line if isinstance(line, Line) else Line(line) for line in lines]
    wide = max(
        columns * (width + 4) + 4,
        *(
            int(font.getlength(line.text)) + 8 + (0 if line.color is None else _CAPTION)
            for line in written
        ),
    )
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new(
        "RGB", (wide, len(written) * _CAPTION + rows * (cell + 4) + 8), (_GROUND,) * 3
    )
    draw = ImageDraw.Draw(sheet)
    for row, line in enumerate(written):
        left, top = 4, row * _CAPTION + 2
        if line.color is not None:
            draw.rectangle(
                (left, top + 1, left + _CAPTION - 6, top + _CAPTION - 5), fill=line.color
            )
            left += _CAPTION
        draw.text((left, top), line.text, fill=(_TEXT,) * 3, font=font)
    for index, thumbnail in enumerate(thumbnails):
        row, column = divmod(index, columns)
        sheet.paste(
            thumbnail, (4 + column * (width + 4), len(written) * _CAPTION + 4 + row * (cell + 4))
        )
    return sheet


def _thumbnail(
    tile: Tile, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> Image.Image:
    pixels = np.round(np.clip(tile.pixels, 0, 1) * 255).astype(np.uint8)
    height = max(1, round(width * pixels.shape[0] / pixels.shape[1]))
    caption = _CAPTION if tile.caption else 0
    thumbnail = Image.new("RGB", (width, height + caption), (_GROUND,) * 3)
    thumbnail.paste(
        Image.fromarray(pixels).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    )
    draw = ImageDraw.Draw(thumbnail)
    if tile.caption:
        draw.text((2, height + 1), tile.caption, fill=(_TEXT,) * 3, font=font)
    if tile.marks:
        left, right, top, bottom = tile.marks
        places = (
            ((3, height // 2), left, "lm"),
            ((width - 3, height // 2), right, "rm"),
            ((width // 2, 2), top, "ma"),
            ((width // 2, height - 2), bottom, "md"),
        )
        for place, letter, anchor in places:
            draw.text(
                place,
                letter,
                fill=(_MARK, _MARK, 0),
                font=font,
                anchor=anchor,
                stroke_width=2,
                stroke_fill=(0, 0, 0),
            )
    return thumbnail
