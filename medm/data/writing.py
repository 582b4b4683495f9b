"""Annotation files written atomically, a JSON array or JSONL; a sample as a record of one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from medm.errors import DataError
from medm.files import atomic_file
from medm.types import KIND_OF_PLACEHOLDER, JsonObject, Media, Sample, TurnPart, written


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


def record_of(sample: Sample) -> JsonObject:
    """Return a sample as a record that the pipeline reads back as the same turns.

    Its `answer` is the last reply; without one the record is a question, for inference.
    """
    known = {"id": sample.id, "task": sample.task}
    record: JsonObject = {key: value for key, value in known.items() if value is not None}
    answered = sample.answer is not None
    for media in sample.media:
        record.setdefault(media.branch, []).append(media.path)
    texts = [part for turn in sample.turns for part in turn.content if isinstance(part, str)]
    if any(name in text for text in texts for name in KIND_OF_PLACEHOLDER):
        # Text that looks like a placeholder can only be told from one where media are parts of
        # their own.
        messages: list[JsonObject] = [
            {"role": turn.role, "content": [_part(part) for part in turn.content]}
            for turn in sample.turns
        ]
        if answered:
            messages.append({"role": "assistant", "content": sample.answer})
        named = {key: value for key, value in record.items() if key in known}
        return {**named, "messages": messages, **sample.extra}
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[turn.role], "value": turn.as_written} for turn in sample.turns]
    if answered:
        turns.append({"from": "gpt", "value": str(sample.answer)})
    return {**record, "conversations": turns, **sample.extra}


def _part(part: TurnPart) -> JsonObject:
    if isinstance(part, Media):
        return {"type": part.branch, "path": part.path}
    return {"type": "text", "text": written(part)}
