"""Writing tar shards of pairs, and the manifest of shards that exist."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from medm.data.options import SourceOptions
from medm.data.pairs import Pair, Pairs
from medm.data.records import Records
from medm.data.shards import IMAGE_SUFFIXES, SAMPLE, Manifest, ShardEntry, index_shard
from medm.errors import DataError
from medm.files import atomic_file, atomic_write_text, remove_leftovers
from medm.imaging.images import check_image

SUFFIX = ".shards.json"
MAX_KEPT = 1000
"""So many bad records are kept with their place and reason; the rest are counted."""


@dataclass(slots=True)
class Written:
    """Counts of a finished writing."""

    shards: int = 0
    samples: int = 0
    num_bad: int = 0
    bad: list[DataError] = field(default_factory=list)
    """The first records that were left out, with their place; and shards with damage."""

    def note(self, error: DataError) -> None:
        """Count a bad record."""
        self.num_bad += 1
        if len(self.bad) < MAX_KEPT:
            self.bad.append(error)


def write_shards(
    manifest: Path,
    sources: Sequence[SourceOptions],
    *,
    samples: int = 1000,
    bad_records: Literal["stop", "skip"] = "stop",
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write the pairs of annotation files into tar shards beside a manifest, and the manifest.

    Images are copied as they are. The other fields of a record go into its `.json` member.

    Args:
        manifest: a name that ends in `.shards.json`; shards are called after it.
        sources: annotation files of pairs with 2-D images.
        samples: samples of a shard; the last one has fewer.
        bad_records: stop at a record that cannot be used, or leave it out and count it.
        progress: called with (records done, records in all) now and then.

    Raises:
        DataError: a bad record, nothing to write, or a file that cannot be written.
    """
    _require_name(manifest)
    records = Records(sources, Pairs())
    written = Written()

    def usable() -> Iterator[tuple[bytes, str, dict[str, Any]]]:
        for index in range(len(records)):
            try:
                with records.placed(index):
                    yield _content(records, index)
            except DataError as error:
                if bad_records == "stop":
                    raise
                written.note(error)
            if progress is not None and (index + 1) % 1000 == 0:
                progress(index + 1, len(records))

    paths: list[Path] = []
    try:
        manifest.parent.mkdir(parents=True, exist_ok=True)
        stem = manifest.name[: -len(SUFFIX)]
        content = usable()
        for first in content:
            path = manifest.with_name(f"{stem}-{len(paths):06d}.tar")
            remove_leftovers(path)
            written.samples += _write_shard(path, first, content, samples, written.samples)
            paths.append(path)
    except OSError as error:
        raise DataError(f"cannot be written ({error.strerror or error})", file=manifest) from error
    if not paths:
        raise DataError("no record can be written", file=manifest)
    write_manifest(manifest, paths)
    written.shards = len(paths)
    return written


def write_manifest(
    manifest: Path,
    shards: Sequence[Path],
    *,
    root: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write the manifest and the index of shards that exist. Each is read once, for its checksum.

    Args:
        manifest: a name that ends in `.shards.json`.
        shards: in the order of the records.
        root: folder that the shards lie in, for shards elsewhere than beside the manifest; then it
            is the `root` of the source.
        progress: called with (shards done, shards in all) after each.

    Raises:
        DataError: a shard that cannot be read or lies outside the root; or a file that cannot be
            written.
    """
    _require_name(manifest)
    written, entries, indexes = Written(), [], []
    base = (root or manifest.parent).resolve()
    for number, path in enumerate(shards):
        real = path.resolve()
        if not real.is_relative_to(base):
            raise DataError(
                f"lies outside {base}, the folder of the manifest; name the folder of the shards "
                "as root",
                file=path,
            )
        found = index_shard(path)
        if found.damage is not None:
            written.note(DataError(found.damage, file=path))
        with path.open("rb") as file:
            digest = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
        name = real.relative_to(base).as_posix()
        entries.append(
            ShardEntry(
                file=name,
                samples=len(found.samples),
                size=size,
                sha256=digest,
                damage=found.damage,
            )
        )
        indexes.append(found.samples)
        if progress is not None:
            progress(number + 1, len(shards))
    written.shards, written.samples = len(entries), sum(entry.samples for entry in entries)
    content = io.BytesIO()
    np.save(content, np.concatenate(indexes).astype(SAMPLE), allow_pickle=False)
    index = manifest.with_name(f"{manifest.name[: -len(SUFFIX)]}.index.npy")
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    listed = Manifest(index=index.name, index_sha256=digest, shards=entries)
    try:
        manifest.parent.mkdir(parents=True, exist_ok=True)
        for made in (index, manifest):
            remove_leftovers(made)
        with atomic_file(index) as temporary:
            temporary.write_bytes(content.getvalue())
        atomic_write_text(manifest, f"{json.dumps(listed.model_dump(), indent=1)}\n")
    except OSError as error:
        raise DataError(f"cannot be written ({error.strerror or error})", file=manifest) from error
    return written


def shards_in(paths: Sequence[Path]) -> list[Path]:
    """Return the tar files among paths, those of a folder in the order of their names.

    Empty where a path is neither a folder nor a tar file. Raises `DataError` for a folder without
    any.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        if not inside:
            raise DataError("the folder holds no .tar files", file=path)
        if not all(one.suffix.lower() == ".tar" for one in inside):
            return []
        found += inside
    return found


def _require_name(manifest: Path) -> None:
    if not manifest.name.endswith(SUFFIX) or manifest.name == SUFFIX:
        raise DataError(f"expected a name that ends in {SUFFIX}", file=manifest)


def _content(records: Records[Pair, Any], index: int) -> tuple[bytes, str, dict[str, Any]]:
    """Return image, suffix and fields of a record. Raises `DataError`."""
    pair = records[index]
    if pair.item.branch != "image":
        raise DataError(
            "shards hold 2-D images; train volumes from a JSON file that names them",
            field=pair.item.branch,
        )
    fields: dict[str, Any] = {**pair.extra, "captions": list(pair.captions)}
    for name in ("label", "id", "source", "task"):
        if getattr(pair, name) is not None:
            fields[name] = getattr(pair, name)
    try:
        path = records.media_path(index, pair.item)
        suffix = path.suffix.lower().removeprefix(".")
        if suffix not in IMAGE_SUFFIXES:
            raise DataError(
                f"{path.name}: expected an image whose name ends in "
                f"{', '.join(f'.{one}' for one in IMAGE_SUFFIXES)}"
            )
        check_image(path)
        image = path.read_bytes()
    except DataError as error:
        raise error.at(field="image") from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", field="image") from error
    return image, suffix, fields


def _write_shard(
    path: Path,
    first: tuple[bytes, str, dict[str, Any]],
    following: Iterator[tuple[bytes, str, dict[str, Any]]],
    samples: int,
    number: int,
) -> int:
    """Write a shard of at most so many samples, the first of which is number `number` of all.
    Returns how many it has.
    """
    count = 0
    with (
        atomic_file(path) as temporary,
        tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for image, suffix, fields in itertools.chain([first], following):
            key = f"{number + count:09d}"
            _add(tar, f"{key}.{suffix}", image)
            _add(tar, f"{key}.json", json.dumps(fields, ensure_ascii=False).encode())
            count += 1
            if count == samples:
                break
    return count


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file without owner and time, so that equal data gives equal shards."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
