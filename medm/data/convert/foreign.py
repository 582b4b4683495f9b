"""Rows of other programs as records: Alpaca, query and response, ShareGPT with tags of its own.

A registry names sources as LLaMA-Factory's `dataset_info.json` does: file, formatting, columns,
tags. Nothing is downloaded, and nothing that a row asks to learn is dropped: what medm does not
train (preferences, tools, video, audio) is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, cast, get_args

from medm.config import read_yaml
from medm.data.field_types import json_type
from medm.data.left_out import LeftOut
from medm.data.options import format_of
from medm.data.record_files import RecordFile
from medm.data.tables import TableFile
from medm.data.turns import MEDIA_FIELDS, parse_record
from medm.errors import DataError, RecipeError, UnknownNameError, suggest
from medm.types import KIND_OF_PLACEHOLDER, PLACEHOLDERS, JsonObject, Kind

Formatting: TypeAlias = Literal["alpaca", "query-response", "sharegpt", "openai"]
_FORMATTINGS: tuple[Formatting, ...] = get_args(Formatting)

_DEFAULT_COLUMNS: Mapping[Formatting, Mapping[str, str]] = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "query-response": {"prompt": "query", "query": "", "response": "response"},
    "sharegpt": {"messages": "conversations"},
    "openai": {"messages": "messages"},
}
_COMMON_COLUMNS = {"system": "system", "history": "history", "images": "", "volumes": ""}
"""Without `images` or `volumes`, the fields of medm's own records are looked for."""
_DEFAULT_TAGS: Mapping[Formatting, Mapping[str, str]] = {
    "sharegpt": {
        "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
        "system_tag": "system",
    },
    "openai": {
        "role_tag": "role", "content_tag": "content", "user_tag": "user",
        "assistant_tag": "assistant", "system_tag": "system",
    },
}  # fmt: skip
_REFUSED_COLUMNS = {
    "videos": "video", "audios": "audio", "tools": "the use of tools",
    "chosen": "preferences", "rejected": "preferences", "kto_tag": "preferences",
}  # fmt: skip
"""Columns of a registry that medm does not train."""
_REFUSED_FIELDS = {
    "videos": "video", "video": "video", "audios": "audio", "audio": "audio", "tools": "tools",
    "chosen": "preferences", "rejected": "preferences", "rejected_response": "preferences",
    "objects": "boxes of ms-swift; write them as regions or text",
}  # fmt: skip
_KEPT_FIELDS = ("id", "task", "patient", "study")
"""Kept as they are; `medm data split` needs patients and studies."""
_REFUSED_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "cloud_file_name", "script_url")
_IGNORED_KEYS = {"subset", "split", "folder"}
"""Of sources on a hub; without one they have no meaning."""
_SOURCE_KEYS = {"file_name", "formatting", "columns", "tags", "ranking", "num_samples"}
_TAG_KEYS = {*_DEFAULT_TAGS["sharegpt"], "observation_tag", "function_tag"}
_COLUMN_KEYS = {
    *(key for columns in _DEFAULT_COLUMNS.values() for key in columns), *_COMMON_COLUMNS,
    *_REFUSED_COLUMNS,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RowSource:
    """One file of rows, and how they are written."""

    path: Path
    formatting: Formatting
    columns: Mapping[str, str]
    """Field of a row by its role; empty text for one that the rows do not have."""
    tags: Mapping[str, str]
    limit: int | None = None
    """Only the first rows."""


def plain_source(path: Path) -> RowSource:
    """Return a file without a registry; its first row shows the formatting.

    Raises:
        DataError: the file cannot be read, or its rows are in none of the forms.
    """
    first = _open(path)[0]
    fields = set(first) if isinstance(first, dict) else set()
    for formatting in _FORMATTINGS:
        columns = _DEFAULT_COLUMNS[formatting]
        needed = [columns[role] for role in ("prompt", "response", "messages") if role in columns]
        if fields.issuperset(needed):
            return RowSource(
                path,
                formatting,
                {**columns, **_COMMON_COLUMNS},
                _DEFAULT_TAGS.get(formatting, {}),
            )
    raise DataError(
        "expected instruction and output (Alpaca), query and response (ms-swift), conversations or "
        f"messages; the first row has {', '.join(sorted(map(str, fields))) or json_type(first)}",
        file=path,
        index=0,
    )


def read_registry(path: Path) -> Mapping[str, object]:
    """Return the sources of a registry by name, JSON or YAML.

    Raises:
        RecipeError: no such file, or it is not a mapping of names to sources.
    """
    content: Mapping[str, object] = {}
    if path.suffix.lower() == ".json":
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path}: cannot be read as JSON ({error})") from None
        content = found if isinstance(found, dict) else {}
    else:
        content = read_yaml(path)
    if not content or not all(isinstance(source, dict) for source in content.values()):
        raise RecipeError(f"{path}: expected sources by name, each with file_name")
    return content


def registered_source(registry: Path, name: str) -> RowSource:
    """Return one source of a registry.

    Raises:
        UnknownNameError: no source of that name.
        RecipeError: it says something that medm does not do, such as a download.
    """
    sources = read_registry(registry)
    if name not in sources:
        raise UnknownNameError("source", name, sources)
    source = cast(Mapping[str, object], sources[name])
    place = f"{registry}: {name}"
    for key in source:
        if key in _REFUSED_KEYS:
            raise RecipeError(f"{place}: {key}: nothing is downloaded; give file_name")
        if key not in _SOURCE_KEYS | _IGNORED_KEYS:
            raise RecipeError(f"{place}: unknown key {key!r}{suggest(key, _SOURCE_KEYS)}")
    if source.get("ranking"):
        raise RecipeError(f"{place}: ranking: medm does not train preferences")
    formatting = str(source.get("formatting", "alpaca")).replace("_", "-")
    if formatting not in _FORMATTINGS:
        raise UnknownNameError("formatting", formatting, _FORMATTINGS)
    form = formatting
    columns = _mapping(source, "columns", place, _COLUMN_KEYS)
    for role, what in _REFUSED_COLUMNS.items():
        if role in columns:
            raise RecipeError(f"{place}: columns: {role}: medm does not train {what}")
    file = source.get("file_name")
    if not isinstance(file, str) or not file:
        raise RecipeError(f"{place}: expected file_name, the path of a JSON, JSONL or CSV file")
    limit = source.get("num_samples")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise RecipeError(f"{place}: num_samples: expected a whole number from 1")
    return RowSource(
        registry.parent / file,
        form,
        {**_DEFAULT_COLUMNS[form], **_COMMON_COLUMNS, **columns},
        {**_DEFAULT_TAGS.get(form, {}), **_mapping(source, "tags", place, _TAG_KEYS)},
        limit,
    )


def foreign_records(source: RowSource, *, left_out: LeftOut) -> Iterator[JsonObject]:
    """Yield the rows of a source as records; those that cannot be trained are counted.

    Paths of images stay as they are written, relative to the `root` of the source in a recipe.

    Raises:
        DataError: the file cannot be read.
    """
    rows = _open(source.path)
    count = len(rows) if source.limit is None else min(len(rows), source.limit)
    for index in range(count):
        try:
            row = rows[index]
            if not isinstance(row, dict):
                raise DataError(f"expected an object, found {json_type(row)}")
            record = _record(row, source)
            parse_record(record)
        except DataError as error:
            left_out.add("the row cannot be trained", error.at(file=source.path, index=index))
            continue
        yield record


def _open(path: Path) -> RecordFile:
    return TableFile(path) if format_of(str(path)) == "table" else RecordFile(path)


def _mapping(
    source: Mapping[str, object], key: str, place: str, known: set[str]
) -> Mapping[str, str]:
    found = source.get(key, {})
    if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
        raise RecipeError(f"{place}: {key}: expected names by role")
    for role in found:
        if role not in known:
            raise RecipeError(f"{place}: {key}: unknown role {role!r}{suggest(role, known)}")
    return found


def _record(row: Mapping[str, object], source: RowSource) -> JsonObject:
    """Return the record of a row. Raises `DataError`."""
    columns = source.columns
    for field, what in _REFUSED_FIELDS.items():
        if row.get(field) and field not in columns.values():
            raise DataError(f"medm does not train {what}", field=field)
    record: JsonObject = {key: row[key] for key in _KEPT_FIELDS if key in row}
    files: dict[Kind, list[str]] = {"image": _paths(row, columns["images"], "image")}
    files["volume"] = _paths(row, columns["volumes"], "volume")
    for kind, paths in files.items():
        if paths:
            record[kind] = paths
    if "messages" in columns:
        turns = _messages(row, source)
    else:
        turns = _exchange(row, columns)
    system = _text(row, columns["system"])
    if system:
        record["system"] = system
    _place_files(turns, files)
    return {**record, "conversations": turns}


def _exchange(row: Mapping[str, object], columns: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the turns of a row with a question and its reply, after those of its history."""
    turns: list[dict[str, str]] = []
    history = row.get(columns["history"]) or []
    if not isinstance(history, list):
        raise DataError("expected a list of pairs", field=columns["history"])
    for position, pair in enumerate(history):
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(t, str) for t in pair)
        ):
            raise DataError(
                "expected a question and its reply", field=f"{columns['history']}.{position}"
            )
        turns += [{"from": "human", "value": pair[0]}, {"from": "gpt", "value": pair[1]}]
    asked = [_text(row, columns["prompt"]), _text(row, columns["query"])]
    reply = _text(row, columns["response"])
    if not any(asked):
        raise DataError("the question is empty", field=columns["prompt"])
    if not reply:
        raise DataError("the reply is empty", field=columns["response"])
    turns.append({"from": "human", "value": "\n".join(text for text in asked if text)})
    return [*turns, {"from": "gpt", "value": reply}]


def _messages(row: Mapping[str, object], source: RowSource) -> list[dict[str, str]]:
    """Return the turns of a row under the names of medm."""
    field, tags = source.columns["messages"], source.tags
    messages = row.get(field)
    if not isinstance(messages, list) or not messages:
        raise DataError("expected a list of turns", field=field)
    roles = {
        tags["user_tag"]: "human",
        tags["assistant_tag"]: "gpt",
        tags["system_tag"]: "system",
    }
    turns = []
    for position, message in enumerate(messages):
        place = f"{field}.{position}"
        if not isinstance(message, dict):
            raise DataError(f"expected a turn, found {json_type(message)}", field=place)
        role, content = message.get(tags["role_tag"]), message.get(tags["content_tag"])
        if role not in roles:
            raise DataError(
                f"expected one of the roles {', '.join(roles)}; medm does not train the use of "
                "tools",
                field=f"{place}.{tags['role_tag']}",
            )
        if not isinstance(content, str):
            raise DataError(
                f"expected text, found {json_type(content)}; medm reads lists of parts as they are",
                field=f"{place}.{tags['content_tag']}",
            )
        turns.append({"from": roles[str(role)], "value": content})
    return turns


def _place_files(turns: Sequence[dict[str, str]], files: Mapping[Kind, Sequence[str]]) -> None:
    """Put files that no placeholder stands for before the first question, as ms-swift does."""
    questions = [turn for turn in turns if turn["from"] == "human"]
    if not questions:
        return
    for kind in ("volume", "image"):  # so that images come first
        names = [name for name, of in KIND_OF_PLACEHOLDER.items() if of == kind]
        placed = sum(turn["value"].count(name) for turn in questions for name in names)
        if placed == 0:
            count = len(files[kind])
            questions[0]["value"] = f"{PLACEHOLDERS[kind]}\n" * count + questions[0]["value"]


def _text(row: Mapping[str, object], field: str) -> str:
    value = row.get(field) if field else None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"expected text, found {json_type(value)}", field=field)
    return value.strip()


def _paths(row: Mapping[str, object], field: str, kind: Kind) -> list[str]:
    """Return the paths of one kind: of a field, or of the fields that medm's own records have."""
    names = [field] if field else [name for name, of in MEDIA_FIELDS.items() if of == kind]
    paths: list[str] = []
    for name in names:
        value = row.get(name)
        found = [value] if isinstance(value, str) else value or []
        if not isinstance(found, list) or not all(isinstance(path, str) for path in found):
            raise DataError("expected a path or a list of paths", field=name)
        paths += [path for path in found if path]
    return paths
