"""UniBiomed's 3-D sets: PNG slices of volumes, and classes whose masks share one `[SEG]`.

`meta_train.json` lists the slices of each volume, and for each expression its mask files and the
slices that hold the target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medm.data.left_out import LeftOut
from medm.errors import DataError
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
from medm.tasks.unibiomed_files import sets_of, slice_of
from medm.types import JsonObject

MAX_SLICES = 10
"""Slices of a record, as published."""


@dataclass(frozen=True, kw_only=True)
class SliceSet(MaskSet):
    """One set, or a folder of them: a record for each expression of each volume."""

    def rows(
        self, folder: Path, split: str, *, draw: Draw, left_out: LeftOut
    ) -> Iterator[JsonObject]:
        for file, top in sets_of(folder, f"meta_{split}.json", self.layout).values():
            yield from self._rows_of(folder, file, top, split, draw, left_out)

    def _rows_of(
        self, folder: Path, file: Path, top: str, split: str, draw: Draw, left_out: LeftOut
    ) -> Iterator[JsonObject]:
        named: set[str] = set()
        volumes = field_of(read_json_map(file), "volumes", dict, file=file, index=0)
        index = -1
        for volume, content in volumes.items():
            expressions = field_of(content, "expressions", dict, file=file, index=index + 1)
            for key, entry in expressions.items():
                index += 1
                place = _Place(folder, top, split, volume, file, index, left_out, named)
                place.name(content.get("slices"), split)
                with noting(left_out, file, index):
                    phrase = require_plain(
                        field_of(entry, "exp", str, file=file, index=index), "exp"
                    )
                    pairs = _chosen(place.pairs(entry), draw, f"{top}{volume}:{key}")
                    pool = wordings("slices")
                    turn = (
                        draw.pick(pool.questions).format(phrase=phrase),
                        draw.pick(pool.answers),
                    )
                    images = [image for image, _ in pairs]
                    masks = [
                        {"file": mask, "image": number, "phrase": phrase}
                        for number, (_, mask) in enumerate(pairs)
                    ]
                    record = conversation(
                        f"{top}{split}:{volume}:{key}", "image", images, [turn], "slices"
                    )
                    yield {**record, "scan": volume, "masks": [masks]}
        for what in ("image", "mask"):
            listed = f"{top}{split}{'_mask' if what == 'mask' else ''}"
            note_unnamed(left_out, folder, listed, named, file=file, what=f"{what} files")


@dataclass(frozen=True, slots=True)
class _Place:
    """An expression of a volume, and where its files may lie."""

    folder: Path
    top: str
    split: str
    volume: str
    file: Path
    index: int
    left_out: LeftOut
    named: set[str]
    """Files that rows name; added to."""

    def pairs(self, entry: dict[str, Any]) -> list[tuple[str, str]]:
        """Return the slices that hold the target, in order, each with its mask.

        A mask without a slice, a slice without a mask and missing files are counted as left out.

        Raises:
            DataError: a field has another type, or no slice is left.
        """
        slices, masks = self._names(entry, "img_file"), self._names(entry, "mask_file")
        self.name(slices, self.split)
        self.name(masks, f"{self.split}_mask")
        found: dict[int, tuple[str, str]] = {}
        owners = [slice_of(mask, slices) for mask in masks]
        for mask, owner in zip(masks, owners, strict=True):
            with noting(self.left_out, self.file, self.index):
                mask_path = self._find(mask, f"{self.split}_mask")
                if owner is None:
                    raise DataError(f"{mask}: it is named after no slice of the expression")
                if owner in found:
                    raise DataError(f"{mask}: a second mask of the slice {slices[owner]}")
                found[owner] = self._find(slices[owner], self.split), mask_path
        for number, name in enumerate(slices):
            if number not in owners:
                with noting(self.left_out, self.file, self.index):
                    self._find(name, self.split)
                    raise DataError(f"{name}: the slice has no mask", field="img_file")
        if not found:
            raise DataError("no slice of the expression has a mask", field="mask_file")
        return [found[number] for number in sorted(found)]

    def _names(self, entry: dict[str, Any], field: str) -> list[str]:
        values = field_of(entry, field, list, file=self.file, index=self.index)
        if not all(isinstance(value, str) for value in values):
            raise DataError("expected a list of file names", field=field)
        return values

    def name(self, names: object, place: str) -> None:
        """Note files as named, wherever they may lie."""
        for name in names if isinstance(names, list) else []:
            self.named.update(f"{one}/{name}" for one in self._places(place))

    def _places(self, place: str) -> list[str]:
        return [f"{self.top}{place}/{self.volume}", f"{self.top}{place}", self.top.rstrip("/")]

    def _find(self, name: str, place: str) -> str:
        return find_file(self.folder, name, self._places(place))


def _chosen(pairs: Sequence[tuple[str, str]], draw: Draw, name: str) -> Sequence[tuple[str, str]]:
    """Return at most `MAX_SLICES` in order: drawn, or evenly spread without a seed."""
    if len(pairs) <= MAX_SLICES:
        return pairs
    if draw.seed is not None:
        return [pairs[at] for at in sorted(draw.of(name).sample(range(len(pairs)), MAX_SLICES))]
    return [pairs[round(at * (len(pairs) - 1) / (MAX_SLICES - 1))] for at in range(MAX_SLICES)]


SEGMENTATION_3D = SliceSet(
    source="unibiomed-3d",
    layout="SET/meta_train.json (volumes with slices and expressions) beside SET/train and "
    "SET/train_mask, or one such set",
)
