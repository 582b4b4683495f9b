"""UniBiomed's 3-D sets: PNG slices of volumes, and classes whose masks share one `[SEG]`.

`meta_train.json` lists the slices of each volume, and for each expression its mask files and the
slices that hold the target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from medm.errors import DataError
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
from medm.tasks.pair_sources.base import LeftOut
from medm.types import JsonObject

MAX_SLICES = 10
"""Slices of a record, as published."""


@dataclass(frozen=True, kw_only=True)
class SliceSet(MaskSet):
    """One set, or a folder of them: a record for each expression of each volume."""

    def rows(
        self, folder: Path, split: str, *, draw: Draw, left_out: LeftOut
    ) -> Iterator[JsonObject]:
        name = f"meta_{split}.json"
        files = [folder / name] if (folder / name).is_file() else []
        for pattern in (f"*/{name}", f"3D/*/{name}"):
            files = files or sorted(folder.glob(pattern))
        for file in files or [require(folder, name, layout=self.layout)]:
            yield from self._rows_of(folder, file, split, draw, left_out)

    def _rows_of(
        self, folder: Path, file: Path, split: str, draw: Draw, left_out: LeftOut
    ) -> Iterator[JsonObject]:
        relative = file.parent.relative_to(folder).as_posix()
        top = "" if relative == "." else f"{relative}/"
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
        by_stem = {PurePosixPath(name).stem: name for name in slices}
        found: dict[str, tuple[str, str]] = {}
        for mask in masks:
            # A mask is named after its slice, so the longest name that it begins with is its own.
            stem = PurePosixPath(mask).stem
            owners = [name for name in by_stem if stem.startswith(name)]
            with noting(self.left_out, self.file, self.index):
                mask_path = self._find(mask, f"{self.split}_mask")
                if not owners:
                    raise DataError(f"{mask}: no slice has a name that this one begins with")
                owner = max(owners, key=len)
                if owner in found:
                    raise DataError(f"{mask}: a second mask of the slice {by_stem[owner]}")
                found[owner] = self._find(by_stem[owner], self.split), mask_path
        for stem, name in by_stem.items():
            if not any(PurePosixPath(mask).stem.startswith(stem) for mask in masks):
                with noting(self.left_out, self.file, self.index):
                    self._find(name, self.split)
                    raise DataError(f"{name}: the slice has no mask", field="img_file")
        if not found:
            raise DataError("no slice of the expression has a mask", field="mask_file")
        return [found[stem] for stem in by_stem if stem in found]

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
