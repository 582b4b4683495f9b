"""What splits of a data set have in common: patients, files, contents, texts, near duplicates.

A model that has seen a patient of its test set is measured on its memory. Messages name files of
records and positions, never a value.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from medm.data.content import content_hash, total_size
from medm.data.options import SourceOptions
from medm.data.pairs import Pair
from medm.data.pipelines import PIPELINES
from medm.data.records import Records
from medm.data.studies import Study
from medm.errors import DataError, MediaError
from medm.imaging.image_hash import BITS, image_hash
from medm.imaging.paths import split_series
from medm.types import JsonObject, Sample

logger = logging.getLogger(__name__)

Kind: TypeAlias = Literal["patient", "study", "path", "content", "text", "near duplicate"]
LEAKS: tuple[Kind, ...] = ("patient", "study", "path", "content")
"""Kinds that no two splits may share. Equal texts and similar images may be of two patients."""
_KINDS: tuple[Kind, ...] = (*LEAKS, "text", "near duplicate")
MAX_DISTANCE = 12
"""Most bits of `image_hash` in which near duplicates differ. Copies of an image in another size or
as JPEG differ in up to a dozen of 256, different images in about a hundred."""
_BANDS = MAX_DISTANCE + 1
"""Parts of a hash, one of which at least is equal in near duplicates."""
_LISTED = 5


@dataclass(slots=True)
class RecordFacts:
    """What a record is compared by."""

    file: Path
    index: int
    group: str | None = None
    """Value of the field that is split by."""
    patient: str | None = None
    study: str | None = None
    media: tuple[Path, ...] = ()
    images: tuple[Path, ...] = ()
    """Of the media, the 2-D images."""
    text: bytes | None = None
    """Hash of its report, reply or captions."""

    @property
    def place(self) -> str:
        return f"{self.file.name}, record {self.index}"


@dataclass(slots=True)
class Contents:
    """Contents of files, read where two files have one size."""

    by_path: dict[Path, str] = field(default_factory=dict)
    """Hash by path without the mark of a series, of files of a size that another one has too."""
    hashes: dict[Path, int] = field(default_factory=dict)
    """Perceptual hash of images, where it was asked for."""
    unreadable: int = 0
    series: dict[Hashable, set[str]] = field(default_factory=dict)
    """Marks ("folder#3") of the series that records name, by path without it and by its hash."""

    def parts(self, thing: Hashable, series: str | None) -> list[tuple[Hashable, str | None]]:
        """Return what a record holds of a path or content: a series; without a mark, any of it."""
        named: list[str | None] = [series]
        if series is None:
            named = [*sorted(self.series.get(thing, ()))] or [None]
        return [(thing, one) for one in named]


@dataclass(slots=True)
class Shared:
    """One kind of things that records have in common."""

    kind: Kind
    count: int = 0
    """Things that several splits have; within one split, records beyond the first."""
    examples: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Return what a report says of it."""
        return f"{self.kind}: {self.count} ({'; '.join(self.examples)})"


def read_facts(
    file: Path, *, root: Path | None, by: str | None = None, pipeline: str | None = None
) -> list[RecordFacts]:
    """Read what the records of a file are compared by.

    Args:
        file: JSON or JSONL.
        root: folder of its paths; None for that of the file.
        by: field that is split by.
        pipeline: of the records; None for the one that the first record shows.

    Raises:
        DataError: the file or a record cannot be read.
    """
    source = SourceOptions(path=str(file), root=None if root is None else str(root))
    first = Records([source], PIPELINES.get("conversations")()).files[0][0]
    reader = PIPELINES.get(pipeline or _pipeline_of(first))(inference=True)
    records: Records[Any, Any] = Records([source], reader)
    facts = []
    for index in range(len(records)):
        sample = records[index]
        record = records.files[0][index]
        assert isinstance(record, dict)
        found = RecordFacts(
            file,
            index,
            group=None if by is None else _value(record.get(by)),
            patient=_value(record.get("patient")),
            study=_value(record.get("study")),
            text=_text_hash(sample),
        )
        paths = [(media.branch, _resolved(records, index, media)) for media in sample.media]
        found.media = tuple(path for _, path in paths)
        found.images = tuple(path for kind, path in paths if kind == "image")
        facts.append(found)
    return facts


def _pipeline_of(record: object) -> str:
    fields = set(record) if isinstance(record, dict) else set()
    if fields & {"conversations", "messages"}:
        return "conversations"
    return "pairs" if fields & {"caption", "captions"} else "studies"


def _value(value: object) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    return str(value).strip() or None


def _resolved(records: Records[Any, Any], index: int, media: Any) -> Path:
    """Return the file of a record, also where it is missing: `medm data check` reports that."""
    try:
        return records.media_path(index, media)
    except DataError:
        return Path(f"missing/{media.path}")


def _text_hash(sample: object) -> bytes | None:
    """Return a hash of the text that is learned, without regard to case and spaces."""
    if isinstance(sample, Pair):
        text = "\n".join(sample.captions)
    elif isinstance(sample, Study):
        text = sample.text or ""
    else:
        assert isinstance(sample, Sample)
        text = sample.answer or ""
    words = " ".join(text.casefold().split())
    return hashlib.sha256(words.encode()).digest() if words else None


def read_contents(
    facts: Sequence[RecordFacts], *, contents: bool = True, near_duplicates: bool = False
) -> Contents:
    """Read the files of records where that can show something.

    Args:
        facts: the records.
        contents: hash the files that share their size with another one.
        near_duplicates: hash every image by its looks; each is decoded.
    """
    found = Contents()
    marked = {split_series(path) for record in facts for path in record.media}
    paths = {path for path, _ in marked}
    by_size: dict[int, list[Path]] = {}
    for path in sorted(paths):
        try:
            by_size.setdefault(total_size(path), []).append(path)
        except MediaError:
            found.unreadable += 1
    for same in by_size.values():
        if contents and len(same) > 1:
            for path in same:
                try:
                    found.by_path[path] = content_hash(path)
                except MediaError:
                    found.unreadable += 1
    for path, series in marked:
        if series is not None:
            found.series.setdefault(path, set()).add(series)
            if path in found.by_path:
                found.series.setdefault(found.by_path[path], set()).add(series)
    if near_duplicates:
        for path in sorted({path for record in facts for path in record.images}):
            try:
                found.hashes[path] = image_hash(path)
            except MediaError:
                found.unreadable += 1
    return found


def things(record: RecordFacts, contents: Contents) -> Iterator[tuple[Kind, Hashable]]:
    """Yield everything that a record may share with another one, other than looks."""
    if record.patient is not None:
        yield "patient", record.patient
    if record.study is not None:
        yield "study", record.study
    for path in record.media:
        plain, series = split_series(path)
        for part in contents.parts(plain, series):
            yield "path", part
        if plain in contents.by_path:
            for part in contents.parts(contents.by_path[plain], series):
                yield "content", part
    if record.text is not None:
        yield "text", record.text


def find_shared(
    splits: Mapping[str, Sequence[RecordFacts]], contents: Contents
) -> dict[Kind, Shared]:
    """Return what two splits have in common, by kind; kinds without anything are left out."""
    owners: dict[tuple[Kind, Hashable], dict[str, RecordFacts]] = {}
    for name, records in splits.items():
        for record in records:
            for thing in things(record, contents):
                owners.setdefault(thing, {}).setdefault(name, record)
    found: dict[Kind, Shared] = {}
    for (kind, _), by_split in owners.items():
        if len(by_split) > 1:
            _add(found, kind, list(by_split.values()))
    for first, second in _near_duplicates(splits, contents):
        _add(found, "near duplicate", [first, second])
    return {kind: found[kind] for kind in _KINDS if kind in found}


def find_duplicates(records: Sequence[RecordFacts], contents: Contents) -> dict[Kind, Shared]:
    """Return what records of one split have in common: files, contents and texts, by kind."""
    seen: dict[tuple[Kind, Hashable], RecordFacts] = {}
    found: dict[Kind, Shared] = {}
    for record in records:
        for kind, thing in things(record, contents):
            first = seen.setdefault((kind, thing), record)
            if first is not record and kind in ("path", "content", "text"):
                _add(found, kind, [first, record])
    return found


def _add(found: dict[Kind, Shared], kind: Kind, records: Sequence[RecordFacts]) -> None:
    shared = found.setdefault(kind, Shared(kind))
    shared.count += 1
    if len(shared.examples) < _LISTED:
        shared.examples.append(" = ".join(record.place for record in records))


def _near_duplicates(
    splits: Mapping[str, Sequence[RecordFacts]], contents: Contents
) -> Iterator[tuple[RecordFacts, RecordFacts]]:
    """Yield pairs of records of two splits whose images differ in few bits and are not equal files.

    Only images that agree in one band of bits are compared: at least one of `_BANDS` bands agrees
    where fewer bits than bands differ. Bands that are all 0 or all 1 do not count: X-rays with
    black borders agree in them, and each would be compared with each.
    """
    width = BITS // _BANDS
    uniform = (0, (1 << width) - 1)
    buckets: dict[tuple[int, int], list[tuple[str, Path, int, RecordFacts]]] = {}
    yielded: set[tuple[Path, Path]] = set()
    for name, records in splits.items():
        for record in records:
            for path in record.images:
                bits = contents.hashes.get(path, 0)
                if not bits:
                    continue
                for band in range(_BANDS):
                    part = (bits >> (band * width)) & ((1 << width) - 1)
                    if part in uniform:
                        continue
                    bucket = buckets.setdefault((band, part), [])
                    for other_name, other_path, other_bits, other in bucket:
                        pair = (other_path, path)
                        if other_name == name or pair in yielded or other_path == path:
                            continue
                        if _same_file(other_path, path, contents):
                            continue
                        if (bits ^ other_bits).bit_count() <= MAX_DISTANCE:
                            yielded.add(pair)
                            yield other, record
                    bucket.append((name, path, bits, record))


def _same_file(one: Path, other: Path, contents: Contents) -> bool:
    known = contents.by_path
    return one in known and known.get(one) == known.get(other)


def as_json(found: Mapping[Kind, Shared]) -> JsonObject:
    """Return counts and places by kind, for a file."""
    return {
        kind: {"count": shared.count, "examples": shared.examples} for kind, shared in found.items()
    }
