"""Batch inference in the tasks of a job array: the records of each task, and their merged lines.

Each shard has an output of its own beside that of the whole run, with its settings, its lock and
its way to resume (`Results`). No task waits for another or writes to its files.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medm.data.owners import Shard, all_shards
from medm.data.records import Records
from medm.errors import DataError, RecipeError
from medm.inference.predictions import ResultLine, Results
from medm.types import Sample


def owned_indices(records: Records[Any, Any], shard: Shard | None) -> list[int]:
    """Return the records of a shard, in their order; all records without one."""
    if shard is None:
        return list(range(len(records)))
    return [index for index in range(len(records)) if shard.owns(owner_name(records, index))]


def owner_name(records: Records[Any, Any], index: int) -> str:
    """Return the name of a record by which its shard is found.

    It is the id, or else the files, or else the text. A record that cannot be read has its
    position.
    """
    try:
        sample = records[index]
    except DataError:
        return f"record {index}"
    if sample.id is not None:
        return str(sample.id)
    paths = [media.path for media in sample.media if media.path is not None]
    if not paths and isinstance(sample, Sample):
        return "\n".join(turn.text for turn in sample.turns)
    return "\n".join(paths)


def merged_lines(
    output: Path, settings: Mapping[str, object], records: Records[Any, Any]
) -> dict[int, ResultLine]:
    """Return the line of every record from the outputs of all shards.

    Args:
        output: of the whole run.
        settings: of this run, which those of each shard must equal.
        records: of the whole run.

    Raises:
        RecipeError: a shard is missing, is not finished, or is of other settings.
    """
    pattern = f"{glob.escape(output.name)}.shard-*-of-*"
    files = [file for file in output.parent.glob(pattern) if file.name.rpartition("-")[2].isdigit()]
    names = [owner_name(records, index) for index in range(len(records))]
    shards = all_shards(files, target=output, names=names)
    merged: dict[int, ResultLine] = {}
    for shard in shards:
        results = Results(output.with_name(f"{output.name}.{shard.label}"), settings)
        results.require_same_settings()
        done = results.done()
        owned = [index for index, name in enumerate(names) if shard.owns(name)]
        _require_all(shard, done, owned, output)
        merged |= {index: done[index] for index in owned}
    return merged


def _require_all(
    shard: Shard, done: Mapping[int, ResultLine], owned: Sequence[int], output: Path
) -> None:
    """Raise `RecipeError` where a shard lacks records."""
    if missing := [index for index in owned if index not in done]:
        raise RecipeError(
            f"{output}: shard {shard} lacks {len(missing)} of its {len(owned)} records (the first "
            f"is record {missing[0]}); run it again with --shard {shard}, then merge"
        )
