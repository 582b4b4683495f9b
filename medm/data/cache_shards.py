"""Filling a cache in the tasks of a job array, and one manifest of its entries.

The entries of all tasks lie in one folder: each is written once, by rename, under a name that
follows from its content. A task also writes an index of its files, by rename when it is done
(`shards/shard-3-of-64.jsonl`), with the reason for each file that cannot be used. A task that is
started again verifies the entries that exist and writes the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.lib import format as npy

from medm.data.cached import FilePlace, FillReport, file_places, load_places
from medm.data.owners import Shard, all_shards
from medm.data.records import Records
from medm.data.volume_cache import MediaCache
from medm.errors import DataError, MediaError, RecipeError
from medm.files import atomic_write_text
from medm.imaging import Preprocess, fingerprint
from medm.types import JsonObject

MANIFEST, FAILED = "manifest.jsonl", "failed.jsonl"
"""Files of a merged cache: its entries, and the files without one."""

_VERSION = 1
"""Version of the index of a shard."""


@dataclass(frozen=True, slots=True)
class _EntryWriter:
    """Stores a file in the cache and returns the description of its entry."""

    cache: MediaCache

    def __call__(self, path: Path, preprocess: Preprocess) -> JsonObject:
        """Raise `MediaError` where the file cannot be used or stored."""
        placement = self.cache.prepare(path, preprocess).placement
        entry = self.cache.entry_file(path, preprocess)
        if entry is None:
            raise MediaError(
                f"{path}: not stored, since the cache is full or cannot be written; raise "
                "data.cache.max_gb, or make room"
            )
        with entry.open("rb") as stream:
            npy.read_magic(stream)
            shape, _, dtype = npy.read_array_header_1_0(stream)
            offset = stream.tell()
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {
            "entry": entry.relative_to(self.cache.folder).as_posix(),
            "sha256": digest,
            "bytes": entry.stat().st_size,
            "offset": offset,
            "shape": list(shape),
            "dtype": dtype.name,
            "preprocess": fingerprint(preprocess),
            "placement": placement.to_dict(),
        }


def fill_shard(
    data: Sequence[Records],
    preprocess: Mapping[str, Preprocess],
    cache: MediaCache,
    shard: Shard,
    *,
    only_failed: bool = False,
    workers: int = 0,
    start: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FillReport:
    """Store the files of one shard, and write its index.

    Args:
        data: whose files are stored.
        preprocess: the views whose files are stored, and how they are prepared.
        cache: of all shards; it does not evict.
        shard: owns a file by its path as a record has it.
        only_failed: try only the files that the index of an earlier run lists with a reason.
        workers: as of `medm.data.cached.fill`.
        start: as of `fill`.
        progress: as of `fill`.

    Raises:
        RecipeError: `only_failed` without an index, or with one of other settings.
    """
    report = FillReport()

    def note(error: DataError) -> None:
        if shard.owns(f"{error.file} {error.index}"):  # one shard names a bad record
            report.note(error)

    places = [place for place in file_places(data, preprocess, note) if shard.owns(place.name)]
    rows: dict[tuple[str, str], JsonObject] = {}
    if only_failed:
        rows = _read(cache.folder, shard, preprocess)
        places = [place for place in places if "error" in rows.get(_key(place), {})]

    def keep(place: FilePlace, reason: str | None, entry: JsonObject | None) -> None:
        rows[_key(place)] = _row(place) | ({"error": reason} if entry is None else entry)

    load_places(
        places,
        preprocess,
        _EntryWriter(cache),
        report,
        workers=workers,
        start=start,
        progress=progress,
        keep=keep,
    )
    file = _index(cache.folder, shard)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, _lines([_header(shard, preprocess), *rows.values()]))
    return report


@dataclass(frozen=True, slots=True)
class Merged:
    """Result of merging the indices of all shards."""

    entries: int
    bytes: int
    """Of the entries."""
    failed: list[JsonObject]
    """Files and records without an entry, with the reason."""


def merge_shards(
    data: Sequence[Records], preprocess: Mapping[str, Preprocess], folder: Path
) -> Merged:
    """Write one manifest of a cache from the indices of all shards, in the order of the records.

    Args:
        data: as of the shards.
        preprocess: as of the shards.
        folder: of the cache.

    Raises:
        RecipeError: a shard is missing, lacks files, or is of other settings.
        MediaError: an entry is missing or of another size than its index says.
    """
    shards = all_shards((folder / "shards").glob("shard-*-of-*.jsonl"), target=folder)
    indices = [_read(folder, shard, preprocess) for shard in shards]
    bad: list[JsonObject] = []
    good: list[JsonObject] = []
    lacking: dict[Shard, list[str]] = {}

    def note(error: DataError) -> None:
        bad.append({"record": _record(error), "error": error.reason})

    for place in file_places(data, preprocess, note):
        (shard,) = (shard for shard in shards if shard.owns(place.name))
        row = indices[shard.index].get(_key(place))
        if row is None:
            lacking.setdefault(shard, []).append(place.name)
        elif "error" in row:
            bad.append(row)
        else:
            good.append(row)
    if lacking:
        shard, names = min(lacking.items())
        raise RecipeError(
            f"{folder}: shard {shard} lacks {len(names)} files of the data (the first is "
            f"{names[0]}), as when records were added; run --shard "
            f"{', '.join(str(shard) for shard in sorted(lacking))} again, then merge"
        )
    for row in good:
        _require_entry(folder, row)
    atomic_write_text(folder / MANIFEST, _lines(good))
    if bad:
        atomic_write_text(folder / FAILED, _lines(bad))
    else:
        (folder / FAILED).unlink(missing_ok=True)
    return Merged(len(good), sum(row["bytes"] for row in good), bad)


def _require_entry(folder: Path, row: JsonObject) -> None:
    entry = folder / row["entry"]
    size = entry.stat().st_size if entry.exists() else None
    if size != row["bytes"]:
        raise MediaError(
            f"{entry}: expected {row['bytes']} bytes, found {size or 'no file'}; run its shard "
            "again, then merge"
        )


def _key(place: FilePlace) -> tuple[str, str]:
    return place.view, str(place.path)


def _row(place: FilePlace) -> JsonObject:
    return {"path": str(place.path), "view": place.view, "record": _record(place.error(""))}


def _record(error: DataError) -> JsonObject:
    return {"file": str(error.file), "index": error.index, "field": error.field}


def _index(folder: Path, shard: Shard) -> Path:
    return folder / "shards" / f"{shard.label}.jsonl"


def _header(shard: Shard, preprocess: Mapping[str, Preprocess]) -> JsonObject:
    views = {view: fingerprint(how) for view, how in sorted(preprocess.items())}
    return {"version": _VERSION, "shard": str(shard), "views": views}


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _read(
    folder: Path, shard: Shard, preprocess: Mapping[str, Preprocess]
) -> dict[tuple[str, str], JsonObject]:
    """Return the rows of an index by view and path.

    Raises:
        RecipeError: there is none, it is damaged, or it is of other settings.
    """
    file, expected = _index(folder, shard), _header(shard, preprocess)
    if not file.exists():
        raise RecipeError(f"{file}: no such index; run --shard {shard} first")
    try:
        header, *rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        found = {(row["view"], row["path"]): row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{file}: damaged ({error}); run --shard {shard} again") from None
    if header != expected:
        raise RecipeError(
            f"{file}: written with other settings (found {header}, expected {expected}): the "
            f"preprocessing or the views of the recipe changed; run --shard {shard} again"
        )
    return found
