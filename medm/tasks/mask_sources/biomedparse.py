"""Sets in the layout of BiomedParse, which UniBiomed's 2-D folders share.

A set has `train/` and `train_mask/` (PNG) beside `train.json`, and the same for `test`. The JSON is
COCO-like: an annotation is one target. Images and annotations are joined by `file_name`: the ids of
published files are not consistent. Masks are named NAME_MODALITY_SITE_TARGET.png after their image
NAME_MODALITY_SITE.png, with + for the spaces of the target.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from medm.data.left_out import LeftOut
from medm.errors import DataError
from medm.imaging.images import check_image
from medm.imaging.mask_files import read_mask
from medm.imaging.placement import Placement
from medm.tasks.benchmark_files import field_of, read_json_map
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
from medm.tasks.unibiomed_files import LAYOUT, annotation_rows, sets_of
from medm.types import JsonObject, MaskSource

MIN_BOX_AREA = 400
"""Square pixels that the box of a marked part exceeds, as published; smaller parts are marked only
where no part is that large."""

NO_FINDING = "no finding"
"""Words of a phrase whose target is absent."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """One target of one image, with the files that were found."""

    image: str
    mask: str | None
    """Paths relative to the folder; no mask where the source needs none."""
    phrases: tuple[str, ...]
    """Different wordings of the target, in order."""
    name: str
    """Name of the record, without the number of the wording."""


@dataclass(frozen=True, kw_only=True)
class CocoSet(MaskSet):
    """One set, or a folder of them."""

    top: str = ""
    """Folder of these sets, where the given one holds sets of other kinds as well."""
    skip: tuple[str, ...] = ()
    """Folders that hold sets of other kinds."""
    needs_masks: ClassVar[bool] = True

    def rows(
        self, folder: Path, split: str, *, draw: Draw, left_out: LeftOut
    ) -> Iterator[JsonObject]:
        top = folder / self.top
        found = sets_of(
            top if top.is_dir() else folder, f"{split}.json", self.layout, skip=self.skip
        )
        for file, _ in found.values():
            yield from self._rows_of(folder, file, split, draw, left_out)

    def _rows_of(
        self,
        folder: Path,
        file: Path,
        split: str,
        draw: Draw,
        left_out: LeftOut,
    ) -> Iterator[JsonObject]:
        rows = annotation_rows(file)
        images, masks = (f"{self._place(folder, file)}{name}" for name in (split, f"{split}_mask"))
        named: set[str] = set()
        for index, row in enumerate(rows):
            with noting(left_out, file, index):
                try:
                    found = self.annotation(folder, file, split, row, index)
                finally:
                    # A file of a row that cannot be used is named all the same.
                    named |= _named(row, images, masks)
                if found.mask is not None:
                    named.add(found.mask)
                yield from self.make(folder, found, draw)
        listed = read_json_map(file).get("images")
        for index, entry in enumerate(listed if isinstance(listed, list) else []):
            name = entry.get("file_name") if isinstance(entry, dict) else None
            if isinstance(name, str) and f"{images}/{name}" not in named:
                named.add(f"{images}/{name}")
                left_out.add(
                    "images without an annotation",
                    DataError(f"{name} has none", file=file, index=index, field="images"),
                )
        note_unnamed(left_out, folder, images, named, file=file, what="image files")
        if self.needs_masks:
            note_unnamed(left_out, folder, masks, named, file=file, what="mask files")

    @staticmethod
    def _place(folder: Path, file: Path) -> str:
        """Return the folder of a set relative to the given one, with a slash at its end."""
        relative = file.parent.relative_to(folder).as_posix()
        return "" if relative == "." else f"{relative}/"

    def annotation(
        self, folder: Path, file: Path, split: str, row: object, index: int
    ) -> Annotation:
        """Return an annotation and its files.

        Raises:
            DataError: a field has another type, or a file is missing.
        """
        place = self._place(folder, file)
        name = field_of(row, "file_name", str, file=file, index=index)
        assert isinstance(row, dict)  # field_of refuses anything else
        image = find_file(folder, name, (f"{place}{split}",))
        written = row.get("mask_file")
        phrases = _sentences(row)
        if not isinstance(written, str) or not written.strip():
            target = phrases[0].partition(" in ")[0] if phrases else ""
            if not target:
                raise DataError("expected a file name, and there is no sentence", field="mask_file")
            written = f"{Path(name).stem}_{target.replace(' ', '+')}.png"
        mask = find_file(folder, written, (f"{place}{split}_mask",))
        phrases = phrases or [_phrase_of_names(name, written)]
        return Annotation(
            image,
            mask,
            tuple(require_plain(phrase, "sentences") for phrase in phrases),
            f"{place}{split}:{index}",
        )

    def make(self, folder: Path, found: Annotation, draw: Draw) -> Iterator[JsonObject]:
        """Yield the records of an annotation: one for each wording of its target."""
        for number, phrase in enumerate(found.phrases):
            yield self.record(folder, found, phrase, f"{found.name}:{number}", draw)

    def record(
        self, folder: Path, found: Annotation, phrase: str, name: str, draw: Draw
    ) -> JsonObject:
        """Return one record: a phrase to its mask."""
        pool = wordings("segmentation")
        turn = (draw.pick(pool.questions).format(phrase=phrase), draw.pick(pool.answers))
        return {
            **conversation(name, "image", [found.image], [turn], "segmentation"),
            "masks": [_mask(found, phrase)],
        }


@dataclass(frozen=True, kw_only=True)
class DiseaseSet(CocoSet):
    """An image to the mask and the name of what is abnormal; the question names no class."""

    def record(
        self, folder: Path, found: Annotation, phrase: str, name: str, draw: Draw
    ) -> JsonObject:
        pool = wordings("disease")
        phrase = phrase.lower().rstrip(".")
        turn = (draw.pick(pool.questions), draw.pick(pool.answers).format(phrase=phrase))
        return {
            **conversation(name, "image", [found.image], [turn], "disease"),
            "masks": [_mask(found, phrase)],
        }


@dataclass(frozen=True, kw_only=True)
class RegionSet(CocoSet):
    """A box around a part of a mask to the phrase of the mask."""

    def record(
        self, folder: Path, found: Annotation, phrase: str, name: str, draw: Draw
    ) -> JsonObject:
        assert found.mask is not None  # the set needs masks
        box = part_box(folder, found.image, found.mask, draw.of(found.mask))
        pool = wordings("region")
        turn = (draw.pick(pool.questions), draw.pick(pool.answers).format(phrase=phrase))
        return {
            **conversation(name, "image", [found.image], [turn], "region"),
            "regions": [{"box": [*box]}],
        }


@dataclass(frozen=True, kw_only=True)
class CaptionSet(CocoSet):
    """An image to its caption."""

    needs_masks: ClassVar[bool] = False

    def annotation(
        self, folder: Path, file: Path, split: str, row: object, index: int
    ) -> Annotation:
        place = self._place(folder, file)
        name = field_of(row, "file_name", str, file=file, index=index)
        caption = require_plain(field_of(row, "caption", str, file=file, index=index), "caption")
        image = find_file(folder, name, (place.rstrip("/"), f"{place}{split}", f"{place}images"))
        return Annotation(image, None, (caption,), f"{place}{split}:{index}")

    def record(
        self, folder: Path, found: Annotation, phrase: str, name: str, draw: Draw
    ) -> JsonObject:
        pool = wordings("description")
        turn = (draw.pick(pool.questions), draw.pick(pool.answers).format(caption=phrase))
        return conversation(name, "image", [found.image], [turn], "description")


def part_box(folder: Path, image: str, mask: str, rng: random.Random) -> tuple[int, ...]:
    """Return the box x1, y1, x2, y2 around one connected part of a mask.

    The part is drawn among those whose box exceeds `MIN_BOX_AREA`, or among all where none does.

    Raises:
        MediaError: image or mask cannot be read or differ in size.
        DataError: the mask is empty.
    """
    from scipy.ndimage import find_objects, label

    source = MaskSource(token=0, media=0, field="mask_file", path=mask)
    pixels = read_mask(source, folder, Placement.of_source(check_image(folder / image)))
    # Parts that touch at a corner are one, as the contours of the published code are.
    parts, count = label(pixels, structure=np.ones((3, 3), bool))
    if not count:
        raise DataError(f"{mask}: the mask is empty, so there is no region", field="mask_file")
    boxes = [(c.start, r.start, c.stop, r.stop) for r, c in find_objects(parts)]
    large = [box for box in boxes if (box[2] - box[0]) * (box[3] - box[1]) > MIN_BOX_AREA]
    return rng.choice(large or boxes)


def _mask(found: Annotation, phrase: str) -> JsonObject:
    """Return the mask of a phrase; of one that says that nothing was found, an absent target."""
    absent = NO_FINDING in phrase.lower()
    return {"file": None if absent else found.mask, "phrase": phrase}


def _sentences(row: dict[str, Any]) -> list[str]:
    """Return the different wordings of an annotation; none where it has no `sentences`."""
    entries = row.get("sentences")
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise DataError("expected a list of objects", field="sentences")
    texts = []
    for number, entry in enumerate(entries):
        text = entry.get("sent") or entry.get("raw") if isinstance(entry, dict) else None
        if not isinstance(text, str):
            raise DataError("expected a text in 'sent' or 'raw'", field=f"sentences.{number}")
        texts.append(text.strip())
    return list(dict.fromkeys(filter(None, texts)))


def _phrase_of_names(image: str, mask: str) -> str:
    """Return the phrase that the names of image and mask say: TARGET in SITE MODALITY."""
    stem, target = Path(image).stem, Path(mask).stem
    parts = stem.split("_")
    if not target.startswith(f"{stem}_") or len(parts) < 3:
        raise DataError(
            f"no sentences, and {Path(mask).name} is not named NAME_MODALITY_SITE_TARGET after its "
            "image",
            field="sentences",
        )
    words = target[len(stem) + 1 :].replace("+", " ")
    return f"{words} in {parts[-1].replace('+', ' ')} {parts[-2]}"


def _named(row: object, images: str, masks: str) -> set[str]:
    """Return the files that a row names, whether they exist or not."""
    if not isinstance(row, dict):
        return set()
    places = {"file_name": images, "mask_file": masks}
    return {f"{place}/{row[key]}" for key, place in places.items() if isinstance(row.get(key), str)}


_OTHERS = ("Disease", "MedTrinity")

BIOMEDPARSE = CocoSet(source="biomedparse", layout=LAYOUT)
SEGMENTATION_2D = CocoSet(source="unibiomed-2d", layout=LAYOUT, skip=_OTHERS)
DISEASE = DiseaseSet(source="unibiomed-disease", layout=LAYOUT, top="Disease")
REGION = RegionSet(source="unibiomed-region", layout=LAYOUT, skip=_OTHERS)
MEDTRINITY = CaptionSet(
    source="medtrinity",
    layout="<split>.json with file_name and caption in 'annotations', beside the images",
    top="MedTrinity",
)
