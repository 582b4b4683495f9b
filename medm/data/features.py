"""Feature cache on disk: the output of a frozen encoder, computed once for each file.

A store belongs to one encoder (its weights, its config, its precision) and one preprocessing:
`name` says which. An item is found by the content of its file or folder, so it may move, and one
that changed is simply not found. Items are written in shards, atomically; several processes may
fill one store. The index of a shard holds the key of each item and the placement of the pixels that
the encoder saw. Indices of earlier versions of medm hold the keys alone.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medm.data.content import content_hash, identity
from medm.errors import MediaError, MedmError
from medm.files import atomic_file, atomic_write_text
from medm.imaging.placement import Placement

logger = logging.getLogger(__name__)

_SLACK = 1.05
"""Required free space, as a multiple of the size of a shard."""


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """Items to be written to a store."""

    keys: Sequence[str]
    placements: Sequence[Placement]
    """Of the pixels that the encoder saw, one per key."""
    features: np.ndarray
    """(n, *shape)."""
    rows: Sequence[int] | None = None
    """Of each key the number of rows of `features`, its tiles; None: one, which stands alone."""


@dataclass(slots=True)
class FeatureStore:
    """Arrays of one shape and type by the content of the file that they come from.

    Memory-mapped: any number of workers read the same pages, and memory does not grow with the
    data.
    """

    folder: Path
    """A store; `open_store` creates it."""
    _rows: dict[str, tuple[np.ndarray, int | slice]] = field(default_factory=dict)
    _placements: dict[str, Placement] = field(default_factory=dict)
    _shards: set[str] = field(default_factory=set)
    _keys: dict[str, str] = field(default_factory=dict)

    def refresh(self) -> None:
        """Add the shards that were finished since the last call."""
        for index in sorted(self.folder.glob("*.json")):
            if index.name in self._shards:
                continue
            self._shards.add(index.name)
            array = np.load(index.with_suffix(".npy"), mmap_mode="r")
            listed = json.loads(index.read_text(encoding="utf-8"))
            keys = listed if isinstance(listed, list) else listed["keys"]
            counts = None if keys is listed else listed.get("rows")
            for key, row in zip(keys, _row_indices(len(keys), counts), strict=True):
                self._rows.setdefault(key, (array, row))
            if keys is not listed:
                self._placements |= zip(
                    keys, map(Placement.from_dict, listed["placements"]), strict=True
                )

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def get(self, file: Path) -> np.ndarray | None:
        """Return the features of a file, mapped from disk; None if they are not stored.

        They are (*shape), and (T, *shape) of an image that is cut into T tiles.
        """
        found = self._rows.get(self.key(file))
        return None if found is None else found[0][found[1]]

    def placement(self, file: Path) -> Placement | None:
        """Return where the pixels that the encoder saw lie in a file.

        None if its features are not stored, or were stored by an earlier version of medm.
        """
        return self._placements.get(self.key(file))

    def key(self, file: Path) -> str:
        """Return the key of the content of a file, of a header and its data file, or of a folder.

        A folder of slices may name a series ("folder#3").

        Read again only when a name, size or time in it changed.

        Raises:
            MediaError: it is missing, or not a file that medm reads.
        """
        state = identity(file)
        if state not in self._keys:
            self._keys[state] = content_hash(file)
        return self._keys[state]

    def add(
        self, batches: Iterable[FeatureBatch], *, most: int, shape: tuple[int, ...], dtype: np.dtype
    ) -> None:
        """Write one shard.

        Args:
            batches: the items.
            most: maximum number of rows.
            shape: of one item.
            dtype: of the items.

        Raises:
            MedmError: the disk has no room for it.
            ValueError: there are more than `most` rows, or keys, placements and arrays differ in
                number.
        """
        needed = _SLACK * most * np.prod(shape, dtype=np.int64) * dtype.itemsize
        status = os.statvfs(self.folder)
        if status.f_bavail * status.f_frsize < needed:
            raise MedmError(
                f"{self.folder}: features of {most} files need {needed / 1e9:.2f} GB, and "
                f"{status.f_bavail * status.f_frsize / 1e9:.2f} GB are free; make room or set "
                "data.cache_features: null"
            )
        name = uuid.uuid4().hex
        keys: list[str] = []
        placements: list[Placement] = []
        counts: list[int] = []
        filled = 0
        with atomic_file(self.folder / f"{name}.npy") as temporary:
            # Rows that stay empty are a hole in the file and take no disk.
            table = np.lib.format.open_memmap(
                temporary, mode="w+", dtype=dtype, shape=(most, *shape)
            )
            for batch in batches:
                count = len(batch.keys)
                rows = [1] * count if batch.rows is None else list(batch.rows)
                total = sum(rows)
                if (
                    {count} != {len(rows), len(batch.placements)}
                    or total != len(batch.features)
                    or filled + total > most
                ):
                    raise ValueError(
                        f"expected {count} items in {total} rows, at most {most} rows in all, "
                        f"found {len(batch.features)} arrays and {len(batch.placements)} placements"
                    )
                table[filled : filled + total] = batch.features
                filled += total
                counts += [] if batch.rows is None else rows
                keys += batch.keys
                placements += batch.placements
            table.flush()
            del table
        # The index comes last: a shard without one is not seen.
        index: dict[str, object] = {
            "keys": keys,
            "placements": [placement.to_dict() for placement in placements],
        }
        if counts:
            index["rows"] = counts
        atomic_write_text(self.folder / f"{name}.json", json.dumps(index))
        self.refresh()


def _row_indices(count: int, rows: Sequence[int] | None) -> Sequence[int | slice]:
    """Return the place of each item in a shard: a row, or as many rows as it has tiles."""
    if rows is None:
        return range(count)
    ends = list(itertools.accumulate(rows, initial=0))
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def open_store(root: Path, name: str) -> FeatureStore:
    """Open the feature store of one encoder and one preprocessing in a cache folder.

    The store knows every item that it holds.
    """
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    store = FeatureStore(folder)
    store.refresh()
    if old := len(store._rows.keys() - store._placements.keys()):
        logger.info(
            "%s: %d features of an earlier medm have no placement, which masks need; they are "
            "used as they are. Delete the folder to have them computed again",
            folder,
            old,
        )
    return store


def missing(store: FeatureStore, files: Iterable[Path]) -> tuple[list[tuple[str, Path]], list[str]]:
    """Return (key, file) of each content that a store lacks, and errors of unreadable files."""
    found: dict[str, Path] = {}
    bad = []
    for file in files:
        try:
            key = store.key(file)
        except MediaError as error:
            bad.append(str(error))
            continue
        if key not in store:
            found.setdefault(key, file)
    return list(found.items()), bad
