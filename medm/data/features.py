"""What a frozen encoder makes of each file, kept on disk, so that it runs once and not once an epoch.

A store belongs to one encoder (its weights, its config, its precision) and one preprocessing: `name` says which.
An item is found by the content of its file or folder, so it may move, and one that changed is simply not found. Items
are written in shards that appear whole or not at all; several processes may fill one store.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medm.data.content import content_hash, identity
from medm.errors import MediaError, MedmError
from medm.files import atomic_file, atomic_write_text

_SLACK = 1.05
"""Free space that has to be there, as a multiple of what a shard takes."""


@dataclass(slots=True)
class FeatureStore:
    """Arrays of one shape and type by the content of the file that they come from.

    Memory-mapped: any number of workers read the same pages, and memory does not grow with the data.
    """

    folder: Path
    """One store; made by `open_store`."""
    _rows: dict[str, tuple[np.ndarray, int]] = field(default_factory=dict)
    _shards: set[str] = field(default_factory=set)
    _keys: dict[str, str] = field(default_factory=dict)

    def refresh(self) -> None:
        """Take in the shards that were finished since."""
        for index in sorted(self.folder.glob("*.json")):
            if index.name in self._shards:
                continue
            self._shards.add(index.name)
            array = np.load(index.with_suffix(".npy"), mmap_mode="r")
            for row, key in enumerate(json.loads(index.read_text(encoding="utf-8"))):
                self._rows.setdefault(key, (array, row))

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def get(self, file: Path) -> np.ndarray | None:
        """The features of a file, a view of the disk; None where they are not kept."""
        found = self._rows.get(self.key(file))
        return None if found is None else found[0][found[1]]

    def key(self, file: Path) -> str:
        """Name of the content of a file, of a header and its data file, or of a folder of slices ("folder#3" too).

        Read again only when a name, size or time in it changed.

        Raises:
            MediaError: it is missing, or holds what is not read.
        """
        state = identity(file)
        if state not in self._keys:
            self._keys[state] = content_hash(file)
        return self._keys[state]

    def add(
        self, batches: Iterable[tuple[Sequence[str], np.ndarray]], *, most: int, shape: tuple[int, ...], dtype: np.dtype
    ) -> None:
        """Write one shard.

        Args:
            batches: keys of some items and their arrays (n, *shape).
            most: items that may come; fewer are fine.
            shape: of one item.
            dtype: of the items.

        Raises:
            MedmError: the disk has no room for it.
            ValueError: more than `most` items came, or keys and arrays differ in number.
        """
        needed = _SLACK * most * np.prod(shape, dtype=np.int64) * dtype.itemsize
        status = os.statvfs(self.folder)
        if status.f_bavail * status.f_frsize < needed:
            raise MedmError(
                f"{self.folder}: features of {most} files need {needed / 1e9:.2f} GB, and "
                f"{status.f_bavail * status.f_frsize / 1e9:.2f} GB are free; make room or set data.cache_features: null"
            )
        name = uuid.uuid4().hex
        keys: list[str] = []
        with atomic_file(self.folder / f"{name}.npy") as temporary:
            # Rows that stay empty are a hole in the file and take no disk.
            table = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=(most, *shape))
            for names, batch in batches:
                if len(names) != len(batch) or len(keys) + len(names) > most:
                    raise ValueError(f"expected {len(names)} items, at most {most} in all, found {len(batch)}")
                table[len(keys) : len(keys) + len(batch)] = batch
                keys += names
            table.flush()
            del table
        # The index comes last: a shard without one is not seen.
        atomic_write_text(self.folder / f"{name}.json", json.dumps(keys))
        self.refresh()


def open_store(root: Path, name: str) -> FeatureStore:
    """The store of one encoder and one preprocessing beneath a cache folder, with everything that it holds."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    store = FeatureStore(folder)
    store.refresh()
    return store


def missing(store: FeatureStore, files: Iterable[Path]) -> tuple[list[tuple[str, Path]], list[str]]:
    """(key, file) of what a store does not hold, each content once; and why the others' content cannot be read."""
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
