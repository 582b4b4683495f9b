"""RadGenome chest CT slices in UniBiomed's layout: grounded reports and grounded questions.

`train_parse.json` maps a number to an image, a mask, the abnormality, the anatomy and the report.
One mask covers all that is abnormal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medm.data.left_out import LeftOut
from medm.tasks.benchmark_files import field_of, read_json_map, require
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
from medm.tasks.mask_sources.biomedparse import NO_FINDING
from medm.types import JsonObject


@dataclass(frozen=True, kw_only=True)
class ParsedReports(MaskSet):
    """The entries of `train_parse.json` or `test_parse.json`."""

    wording: Literal["grounded-report", "grounded-vqa"]

    def rows(
        self, folder: Path, split: str, *, draw: Draw, left_out: LeftOut
    ) -> Iterator[JsonObject]:
        places = [f"{place}{split}_parse.json" for place in ("", "RadGenome/")]
        file = require(folder, *places, layout=self.layout)
        top = "" if file.parent == folder else f"{file.parent.name}/"
        images, masks = f"{top}{split}", f"{top}{split}_mask"
        named: set[str] = set()
        for index, (key, row) in enumerate(read_json_map(file).items()):
            with noting(left_out, file, index):
                texts = {
                    name: field_of(row, name, str, file=file, index=index)
                    for name in ("image_file", "mask_file", "abnormality", "report", "anatomy")
                }
                named |= {f"{images}/{texts['image_file']}", f"{masks}/{texts['mask_file']}"}
                image = find_file(folder, texts["image_file"], (images, top.rstrip("/")))
                is_absent = NO_FINDING in texts["abnormality"].lower()
                mask = None
                if not is_absent:
                    mask = find_file(folder, texts["mask_file"], (masks, top.rstrip("/")))
                yield {
                    **conversation(
                        f"{split}:{key}", "image", [image], [self.turn(texts, draw)], self.wording
                    ),
                    "masks": [mask],
                }
        note_unnamed(left_out, folder, images, named, file=file, what="image files")
        note_unnamed(left_out, folder, masks, named, file=file, what="mask files")

    def turn(self, texts: dict[str, str], draw: Draw) -> tuple[str, str]:
        """Return question and answer of an entry, in lower case as published.

        Raises:
            DataError: a text that is empty, or holds one that has a meaning in records.
        """
        needed = "report" if self.wording == "grounded-report" else "anatomy"
        words = {
            name: require_plain(texts[name], name).lower().rstrip(".")
            for name in ("abnormality", needed)
        }
        pool = wordings(self.wording)
        return (
            draw.pick(pool.questions).format(**words),
            draw.pick(pool.answers).format(**words),
        )


_LAYOUT = (
    "train_parse.json (or test_parse.json) with image_file, mask_file, abnormality, report and "
    "anatomy, beside train/ and train_mask/"
)
REPORT = ParsedReports(source="radgenome-report", layout=_LAYOUT, wording="grounded-report")
VQA = ParsedReports(source="radgenome-vqa", layout=_LAYOUT, wording="grounded-vqa")
