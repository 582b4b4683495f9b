"""M3D-Cap (Bai et al. 2024) as pairs: CT volumes of 1 x 32 x 256 x 256 and their reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from medm.errors import DataError
from medm.imaging import resolve_inside
from medm.tasks.benchmark_files import field_of, read_json_map, read_text, require
from medm.tasks.m3d import M3DCap, npy_path
from medm.tasks.pair_sources.base import Pair, PairSource


@dataclass(frozen=True, kw_only=True)
class M3DReports(PairSource):
    """M3D_Cap.json: volumes and text files of each split."""

    splits = M3DCap.splits
    branch = "volume"

    def pairs(self, folder: Path, split: str) -> Iterator[Pair]:
        file = require(folder, "M3D_Cap.json", layout=self.layout)
        rows = read_json_map(file).get(split)
        if not isinstance(rows, list):
            raise DataError("expected a list of objects", file=file, field=split)
        for index, row in enumerate(rows):
            pair = Pair(file, index)
            try:
                image = field_of(row, "image", str, file=file, index=index)
                text = field_of(row, "text", str, file=file, index=index)
                pair.image = npy_path(folder, image)
                pair.captions = [read_text(resolve_inside(folder, npy_path(folder, text)))]
            except DataError as error:
                pair.problem = error.reason
            yield pair


M3D_CAP = M3DReports(source="m3d-cap", layout=M3DCap.layout)
