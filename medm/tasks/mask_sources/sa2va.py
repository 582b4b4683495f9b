"""Sa2VA's format for one's own data: an image, a text and a mask of each object.

`annotations.json` is a list of `{"image": name, "mask": [...], "text": [...]}`. A mask is a list of
outlines [x1, y1, x2, y2, ...] in pixels, a single outline, or COCO run lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from medm.data.left_out import LeftOut
from medm.errors import DataError
from medm.tasks.benchmark_files import field_of, read_json_list, require
from medm.tasks.mask_sources.base import (
    Draw,
    MaskSet,
    conversation,
    find_file,
    note_unnamed,
    noting,
    require_plain,
    wordings,
)
from medm.types import JsonObject


@dataclass(frozen=True, kw_only=True)
class OwnData(MaskSet):
    """A record for each image, with a turn for each text."""

    splits = ("train",)

    def rows(
        self, folder: Path, split: str, *, draw: Draw, left_out: LeftOut
    ) -> Iterator[JsonObject]:
        file = require(folder, "annotations.json", f"{split}.json", layout=self.layout)
        pool = wordings("segmentation")
        named: set[str] = set()
        for index, row in enumerate(read_json_list(file)):
            with noting(left_out, file, index):
                name = field_of(row, "image", str, file=file, index=index)
                named |= {f"images/{name}", name}
                image = find_file(folder, name, ("images", ""))
                texts = field_of(row, "text", list, file=file, index=index)
                shapes = field_of(row, "mask", list, file=file, index=index)
                if len(texts) != len(shapes) or not texts:
                    raise DataError(
                        f"{len(texts)} text(s) and {len(shapes)} mask(s); expected one mask for "
                        "each text",
                        field="mask",
                    )
                turns, masks = [], []
                for number, (text, shape) in enumerate(zip(texts, shapes, strict=True)):
                    if not isinstance(text, str):
                        raise DataError("expected a text", field=f"text.{number}")
                    phrase = require_plain(text, f"text.{number}").rstrip(".")
                    turns.append(
                        (draw.pick(pool.questions).format(phrase=phrase), draw.pick(pool.answers))
                    )
                    masks.append({**_mask(shape, f"mask.{number}"), "phrase": phrase})
                record = conversation(f"{split}:{index}", "image", [image], turns, "segmentation")
                yield {**record, "masks": masks}
        note_unnamed(left_out, folder, "images", named, file=file, what="image files")


def _mask(shape: object, field: str) -> JsonObject:
    """Return a mask as records write it. Raises `DataError` for another form."""
    if isinstance(shape, dict):
        return {"rle": shape}
    if isinstance(shape, list) and shape:
        return {"polygons": shape if isinstance(shape[0], list) else [shape]}
    raise DataError("expected outlines [[x1, y1, x2, y2, ...], ...] or run lengths", field=field)


SA2VA = OwnData(
    source="sa2va",
    layout="annotations.json, a list of {image, mask, text}, beside images/",
)
