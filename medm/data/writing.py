"""Annotation files written atomically: a JSON array or JSONL."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from medm.errors import DataError
from medm.files import atomic_file


def write_records(path: Path, records: Iterable[Mapping[str, object]]) -> int:
    """Write records one at a time, so that they need not fit into memory. Return their number.

    Args:
        path: a name that ends in .jsonl has one record a line; any other is a JSON array.
        records: in order. An error among them leaves an older file as it was.

    Raises:
        DataError: there are no records, or the file cannot be written.
    """
    lines = path.suffix == ".jsonl"
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            with temporary.open("w", encoding="utf-8") as file:
                for record in records:
                    text = json.dumps(record, ensure_ascii=False)
                    file.write(f"{text}\n" if lines else f"{',' if count else '['}\n{text}")
                    count += 1
                file.write("" if lines else "\n]\n")
            if count == 0:
                raise DataError("there are no records to write", file=path)
    except OSError as error:
        raise DataError(f"cannot be written ({error.strerror or error})", file=path) from None
    return count
