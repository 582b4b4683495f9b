"""Splits of an annotation file by patient, study or another field: no group is in two splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medm.data.leaks import (
    Contents,
    Kind,
    RecordFacts,
    Shared,
    as_json,
    find_duplicates,
    find_shared,
    read_contents,
    read_facts,
    things,
)
from medm.data.record_files import RecordFile
from medm.data.writing import write_records
from medm.errors import DataError, RecipeError
from medm.files import atomic_write_text
from medm.types import JsonObject

SPLITS = ("train", "val", "test")
_JOINING: frozenset[Kind] = frozenset({"path", "content"})
"""Groups that share such a thing are kept in one split."""
_OWNERS: frozenset[Kind] = frozenset({"patient", "study"})
"""A record without the field that is split by stays with the records of the same one."""
_MUCH_LARGER = 1.5
"""Times its fraction of the records, from which a split is much larger than it should be."""


@dataclass(frozen=True, slots=True)
class Split:
    """The splits of a file, as written."""

    files: Mapping[str, Path]
    counts: Mapping[str, int]
    """Records of each split."""
    groups: Mapping[str, int]
    """Groups of each split."""
    missing: int
    """Records without the field, each a group of its own where it is not joined to another."""
    joined: int
    """Groups that were joined to another one, because they share a file or its content, or because
    a record without the field has the patient or study of the other."""
    large: Mapping[str, float]
    """Fraction that was wanted of each split that is much larger than that."""
    shared: Mapping[Kind, Shared]
    """What the splits still have in common."""
    duplicates: Mapping[Kind, Shared]
    """What records of the whole file have in common."""
    unreadable: int
    """Files that could not be compared."""
    report: Path


def split_file(
    file: Path,
    *,
    by: str,
    val: float,
    test: float = 0.0,
    seed: int = 0,
    root: Path | None = None,
    output: Path | None = None,
    allow_missing: bool = False,
    contents: bool = True,
    near_duplicates: bool = False,
    pipeline: str | None = None,
) -> Split:
    """Split a file by groups and write `NAME.train.json`, `NAME.val.json`, `NAME.test.json`.

    Groups are put in an order that depends on `seed` and their own names alone, and fill the test
    and validation sets up to their fractions of the records. A set that no group fits gets the
    smallest one. Groups that share a file or the content of one count as one group.

    Args:
        file: JSON or JSONL.
        by: field of the records: `patient`, `study`, or another one.
        val: fraction of the records for validation.
        test: fraction for the test set; 0 for none.
        seed: of the order.
        root: folder of the paths; None for that of the file.
        output: folder of the splits; None for that of the file.
        allow_missing: a record without the field is a group of its own, or joins the records of its
            patient or study.
        contents: compare the contents of files of one size.
        near_duplicates: look for images in two splits that look the same.
        pipeline: of the records; None for the one that the first record shows.

    Raises:
        RecipeError: fractions that leave nothing to train on.
        DataError: a record cannot be read or lacks the field; too few groups; the folder holds a
            split that this one does not write.
    """
    if not (val >= 0 and test >= 0 and 0 < val + test < 1):
        raise RecipeError(
            f"val {val:g} and test {test:g}: expected fractions above 0 that leave records to "
            "train on"
        )
    wanted = [name for name, part in (("train", 1), ("val", val), ("test", test)) if part]
    paths = _paths(file, output)
    _refuse_stale({name: path for name, path in paths.items() if name not in wanted})
    facts = read_facts(file, root=root, by=by, pipeline=pipeline)
    missing = [record for record in facts if record.group is None]
    if missing and not allow_missing:
        raise DataError(
            f"{len(missing)} of {len(facts)} records have no {by!r}, the first of them here; name "
            "another field, or let each be a group of its own by --allow-missing",
            file=file,
            index=missing[0].index,
            field=by,
        )
    found = read_contents(facts, contents=contents, near_duplicates=near_duplicates)
    units, joined = _units(facts, found)
    assigned = _assign(units, {"test": test, "val": val}, len(facts), seed)
    splits: dict[str, list[RecordFacts]] = {
        name: sorted(records, key=lambda record: record.index)
        for name in SPLITS
        if (records := assigned.get(name))
    }
    if absent := [name for name in wanted if name not in splits]:
        raise DataError(
            f"{len(units)} groups by {by!r} are too few for {' and '.join(wanted)}: nothing is "
            f"left for {absent[0]}",
            file=file,
        )
    files = {name: paths[name] for name in splits}
    source = RecordFile(file)
    for name, path in files.items():
        write_records(path, _records(source, splits[name]))
    split = Split(
        files,
        {name: len(part) for name, part in splits.items()},
        {name: len({_group(record) for record in part}) for name, part in splits.items()},
        len(missing),
        joined,
        _large(splits, {"val": val, "test": test}, len(facts)),
        find_shared(splits, found),
        find_duplicates(facts, found),
        found.unreadable,
        paths["train"].with_name(f"{file.stem}.split.json"),
    )
    settings: JsonObject = {"by": by, "val": val, "test": test, "seed": seed}
    _write_report(split, settings)
    return split


def _paths(file: Path, output: Path | None) -> dict[str, Path]:
    folder = file.parent if output is None else output
    return {name: folder / f"{file.stem}.{name}{file.suffix}" for name in SPLITS}


def _refuse_stale(unwritten: Mapping[str, Path]) -> None:
    """Refuse splits of an earlier run that would lie beside the new ones. Raises `DataError`."""
    for name, path in unwritten.items():
        if path.exists():
            raise DataError(
                f"lies where the splits are written, and no {name} set is asked for; it may share "
                "records with the new ones. Delete it, choose another --output, or ask for a "
                f"{name} set",
                file=path,
            )


def _large(
    splits: Mapping[str, Sequence[RecordFacts]], fractions: Mapping[str, float], total: int
) -> dict[str, float]:
    return {
        name: fraction
        for name, fraction in fractions.items()
        if len(splits.get(name, ())) > _MUCH_LARGER * max(1, fraction * total)
    }


def _records(file: RecordFile, part: Sequence[RecordFacts]) -> Iterator[JsonObject]:
    for facts in part:
        record = file[facts.index]
        assert isinstance(record, dict)
        yield record


def _group(record: RecordFacts) -> str:
    """Return the group of a record; one without the field is alone."""
    return f"record {record.index}" if record.group is None else f"group {record.group}"


def _units(facts: Sequence[RecordFacts], contents: Contents) -> tuple[list[list[RecordFacts]], int]:
    """Return groups, joined where they share a file or content, and the number of joins.

    A record without the field joins the records of its patient and of its study.
    """
    parent: dict[str, str] = {}

    def root_of(group: str) -> str:
        while parent.setdefault(group, group) != group:
            parent[group] = parent[parent[group]]
            group = parent[group]
        return group

    of_missing = {
        (kind, thing)
        for record in facts
        if record.group is None
        for kind, thing in things(record, contents)
        if kind in _OWNERS
    }
    owners: dict[object, str] = {}
    joined = 0
    for record in facts:
        group = root_of(_group(record))
        for kind, thing in things(record, contents):
            if kind not in _JOINING and (kind, thing) not in of_missing:
                continue
            other = root_of(owners.setdefault((kind, thing), group))
            group = root_of(group)
            if other != group:
                # The smaller name stays, whatever the order of the records.
                parent[max(other, group)] = min(other, group)
                joined += 1
    units: dict[str, list[RecordFacts]] = {}
    for record in facts:
        units.setdefault(root_of(_group(record)), []).append(record)
    return list(units.values()), joined


def _assign(
    units: Sequence[list[RecordFacts]], fractions: Mapping[str, float], total: int, seed: int
) -> dict[str, list[RecordFacts]]:
    """Return the records of each split."""

    def order(unit: Sequence[RecordFacts]) -> bytes:
        name = min(_group(record) for record in unit)
        return hashlib.blake2b(name.encode(), key=str(seed).encode(), digest_size=16).digest()

    targets = {name: max(1, round(part * total)) for name, part in fractions.items() if part}
    splits: dict[str, list[RecordFacts]] = {name: [] for name in SPLITS}
    rest = []
    for unit in sorted(units, key=order):
        for name, target in targets.items():
            if len(splits[name]) + len(unit) <= target:
                splits[name] += unit
                break
        else:
            rest.append(unit)
    for name in targets:
        if not splits[name] and len(rest) > 1:
            smallest = min(rest, key=len)  # of equal ones the first in the order of the seed
            rest.remove(smallest)
            splits[name] += smallest
    for unit in rest:
        splits["train"] += unit
    return splits


def _write_report(split: Split, settings: JsonObject) -> None:
    content: JsonObject = {
        **settings,
        "files": {name: path.name for name, path in split.files.items()},
        "records": dict(split.counts),
        "groups": dict(split.groups),
        "records_without_group": split.missing,
        "groups_joined": split.joined,
        "files_not_compared": split.unreadable,
        "shared_by_splits": as_json(split.shared),
        "duplicates": as_json(split.duplicates),
    }
    atomic_write_text(split.report, json.dumps(content, indent=2) + "\n")
