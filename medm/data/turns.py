"""One record of an annotation file with turns to a checked `Sample`.

Reads LLaVA turns, ShareGPT and OpenAI-style `messages`. Knows no tokens and opens no image: a path
is text until `Records.media_path` asks `medm.imaging` whether it lies inside the data root.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medm.data.field_types import json_type, require_text
from medm.data.mask_entries import MASK_FIELD, MaskEntry, mask_entries
from medm.data.regions import REGION_FIELD, read_regions
from medm.errors import DataError
from medm.types import (
    KIND_OF_PLACEHOLDER,
    MASK_TOKEN,
    PHRASE_TOKENS,
    ControlToken,
    MaskSource,
    Media,
    Role,
    Sample,
    Turn,
)

MEDIA_FIELDS = {
    "image": "image",
    "images": "image",
    "image3d": "volume",
    "volume": "volume",
    "volumes": "volume",
}
"""Record fields that name files, and the branch that reads them."""

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_PART_FIELDS = {"image": "image", "image_url": "image", "volume": "volume", "image3d": "volume"}
_OWN_FIELDS = {
    "id",
    "task",
    "answer",
    "system",
    "conversations",
    "messages",
    MASK_FIELD,
    REGION_FIELD,
    *MEDIA_FIELDS,
}

_CONTROL = re.compile("|".join(map(re.escape, (MASK_TOKEN, *PHRASE_TOKENS))))
"""Control tokens in a reply of a record with masks."""
_PLACEHOLDER = re.compile("|".join(map(re.escape, KIND_OF_PLACEHOLDER)))
_FOREIGN_PLACEHOLDER = re.compile(
    r"</?\|?(?P<kind>im_patch|image|img|picture|volume|ct|scan|vision|video|audio|speech|point_?cloud)s?"
    r"(?:[_ -]?(?:3d|\d{1,3}|here|file|patch|pad|tokens?|placeholder|start|end|bos"
    r"|eos|soft_token|content|context))?"
    r"\|?>",
    re.IGNORECASE,
)
"""Placeholders and marks of other programs, such as <video>, <|image_pad|>, <img> and <image_1>. As
text they would be trained as words without an image."""

_FOREIGN_FIELD = re.compile(
    r"(?P<kind>image|img|picture|photo|volume|video|audio|pointcloud)s?(?:3d)?"
    r"(?P<suffix>paths?|files?|filenames?|names?|urls?|bytes)?"
)
"""Fields of other programs that name files, in lower case and without `_` and `-`."""

_UNREAD = {
    "video": "video",
    "audio": "audio",
    "speech": "audio",
    "pointcloud": "point clouds",
    "point_cloud": "point clouds",
}
"""Kinds of media that no model reads, by the names that other programs give them."""

_TO_CONVERSATION = (
    "write 'conversations': [{{'from': 'human', 'value': {question}}}, {{'from': 'gpt', 'value': "
    "{reply}}}]"
)
_FOREIGN_FORMATS: tuple[tuple[frozenset[str], str, str, str], ...] = (
    (frozenset({"instruction", "output"}), "the Alpaca format", "instruction and input", "output"),
    (
        frozenset({"query", "response"}),
        "the query/response format of ms-swift",
        "query",
        "response",
    ),
    (frozenset({"prompt", "completion"}), "the prompt/completion format", "prompt", "completion"),
    (frozenset({"prompt", "response"}), "the prompt/response format", "prompt", "response"),
    (frozenset({"question", "answer"}), "a question and its answer", "question", "answer"),
    (
        frozenset({"image", "caption"}),
        "an image and its caption",
        "'<image>' and a request",
        "caption",
    ),
    (
        frozenset({"image", "report"}),
        "an image and its report",
        "'<image>' and a request",
        "report",
    ),
    (frozenset({"image", "text"}), "an image and its text", "'<image>' and a request", "text"),
)
"""Records of other programs: fields that tell them, their name, and the fields that become question
and reply."""

_PREFERENCE_FIELDS = ("rejected", "rejected_response", "rejected_messages", "kto_tag")
"""Fields of preference data, whose replies are not all meant to be learned."""


def parse_record(
    record: object,
    *,
    inference: bool = False,
    file: str | Path | None = None,
    index: int | None = None,
) -> Sample:
    """Check one record and read it.

    Args:
        record: output of the JSON parser.
        inference: the last reply is to be generated: it is missing, or it is taken out of the turns
            and kept as `answer` (where the record has no `answer` of its own).
        file: annotation file of the record, for messages and for the sample.
        index: its position there, from 0.

    Raises:
        DataError: with file, index, field and reason. Placeholders and files, or `[SEG]` and masks,
            that do not agree in number, roles out of order and empty replies are such errors;
            nothing is dropped or fixed.
    """
    try:
        return _parse(
            record, inference=inference, file=None if file is None else str(file), index=index
        )
    except DataError as error:
        raise error.at(file=file, index=index) from None


def _parse(record: object, *, inference: bool, file: str | None, index: int | None) -> Sample:
    if not isinstance(record, dict):
        raise DataError(
            f"expected an object with 'conversations' or 'messages', found {json_type(record)}"
        )
    _refuse_other_formats(record, inference=inference)
    files = _media_files(record)
    masks = _Masks(mask_entries(record.get(MASK_FIELD)))
    turns = _turns(record, files, masks)
    _check_masks(masks, turns, inference=inference)
    _refuse_unread_media(record, turns)
    sources = _mask_sources(masks.entries, turns)
    answer = _optional_text(record, "answer")
    if inference and turns[-1].role == "assistant":
        answer = answer if answer is not None else turns[-1].text or None
        turns = turns[:-1]
    _check_order(turns, record, inference=inference)
    turns, regions = read_regions(record, turns)
    return Sample(
        turns=tuple(turns),
        id=_identifier(record),
        task=_optional_text(record, "task"),
        answer=answer,
        file=file,
        index=index,
        masks=sources,
        regions=regions,
        extra={key: value for key, value in record.items() if key not in _OWN_FIELDS},
    )


def _refuse_other_formats(record: Mapping[str, object], *, inference: bool) -> None:
    """Raise `DataError` for a record in another program's format, with the fix."""
    preference = next(
        (field for field in _PREFERENCE_FIELDS if record.get(field) is not None), None
    )
    if preference is not None and not inference:
        raise DataError(
            "a field of preference data (DPO, KTO): medm learns every reply of a record; write "
            "the preferred reply as the last turn of 'conversations', and leave the other out",
            field=preference,
        )
    if "conversations" in record or "messages" in record:
        return
    for fields, name, question, reply in _FOREIGN_FORMATS:
        if fields <= record.keys():
            raise DataError(
                f"this is {name}, which is not read; "
                f"{_TO_CONVERSATION.format(question=question, reply=reply)}"
            )
    if "dataset" in record or "file_name" in record:
        raise DataError(
            "this lists data sets or files and is no conversation; name the annotation file that "
            "it lists"
        )


def _refuse_unread_media(record: Mapping[str, object], turns: Sequence[Turn]) -> None:
    """Raise `DataError` for a field that names files which would not be read.

    A record with a file of its own may also name the source of that file ("video_name"): only
    `video` and `audio` themselves are refused then.
    """
    has_media = any(isinstance(part, Media) for turn in turns for part in turn.content)
    for field, value in record.items():
        if field in _OWN_FIELDS or not value or not isinstance(value, (str, list, dict)):
            continue
        found = _FOREIGN_FIELD.fullmatch(field.lower().replace("_", "").replace("-", ""))
        if found is None:
            continue
        kind = found["kind"]
        if kind in _UNREAD and not (has_media and found["suffix"]):
            raise DataError(
                f"the record names {_UNREAD[kind]}, which medm does not read; leave the record "
                "out, or write single frames as 'image'",
                field=field,
            )
        if not has_media:
            branch = "volume" if kind == "volume" else "image"
            raise DataError(
                f"this field is not read, but looks like it names {branch}s, and the record has "
                f"no other; rename it to '{branch}' and write <{branch}> where each belongs, or "
                "remove it",
                field=field,
            )


def _identifier(record: Mapping[str, object]) -> str | None:
    value = record.get("id")
    if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int))):
        raise DataError(f"expected text or a whole number, found {json_type(value)}", field="id")
    return None if value is None else require_text(str(value), "id")


def _optional_text(record: Mapping[str, object], field: str) -> str | None:
    value = record.get(field)
    return None if value is None else require_text(value, field)


@dataclass(slots=True)
class _Files:
    """The files of one branch, taken in order by its placeholders."""

    field: str
    paths: list[str]
    used: int = 0
    """Placeholders met so far; may run past the number of paths."""

    def take(self) -> str | None:
        self.used += 1
        return self.paths[self.used - 1] if self.used <= len(self.paths) else None


@dataclass(slots=True)
class _Masks:
    """The masks of each `[SEG]`, taken in order by the `[SEG]` of the replies."""

    entries: list[list[MaskEntry]]
    used: int = 0
    """`[SEG]` met so far; may run past the number of entries."""

    def take(self) -> ControlToken:
        self.used += 1
        return ControlToken(MASK_TOKEN, mask=self.used - 1)


def _media_files(record: Mapping[str, object]) -> dict[str, _Files]:
    files: dict[str, _Files] = {}
    for field, branch in MEDIA_FIELDS.items():
        value = record.get(field)
        if value is None:
            continue
        if branch in files:
            raise DataError(
                f"'{files[branch].field}' is given as well, and both name {branch}s; keep one",
                field=field,
            )
        if any(isinstance(entry, dict) and "bytes" in entry for entry in (value, *_listed(value))):
            raise DataError(
                "an image inside the record (as Hugging Face data sets hold them) is not read; "
                "write it to a file and give its path",
                field=field,
            )
        files[branch] = _Files(field, _paths(value, field))
    return files


def _paths(value: object, field: str) -> list[str]:
    """Return the paths of a field that names files: one, a list of them, or none."""
    if value is None:
        return []
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list):
        raise DataError(
            f"expected a path or a list of paths, found {json_type(value)}", field=field
        )
    for position, path in enumerate(paths):
        place = field if isinstance(value, str) else f"{field}.{position}"
        if not require_text(path, place).strip():
            raise DataError("expected a path, found empty text", field=place)
    return paths


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _turns_field(record: Mapping[str, object]) -> str:
    return "messages" if "messages" in record else "conversations"


def _turns(record: Mapping[str, object], files: dict[str, _Files], masks: _Masks) -> list[Turn]:
    field = _turns_field(record)
    if field not in record:
        raise DataError(
            "expected 'conversations' or 'messages', a list of turns; the record has neither",
            field=field,
        )
    if field == "messages" and "conversations" in record:
        raise DataError("'conversations' is given as well; keep one of the two", field=field)
    entries = record[field]
    if not isinstance(entries, list):
        raise DataError(f"expected a list of turns, found {json_type(entries)}", field=field)
    if not entries:
        raise DataError(
            "the conversation is empty; expected at least one turn of the user", field=field
        )
    turns = []
    system = _optional_text(record, "system")
    if system:
        turns.append(_turn("system", system, "system", files, masks))
    for position, entry in enumerate(entries):
        role, content, place = _role_and_content(entry, f"{field}.{position}")
        if role == "system" and turns and (position or system):
            advice = (
                "the record's field 'system' is one already"
                if not position
                else "it can only be the first turn"
            )
            raise DataError(
                f"a system turn is not allowed here: {advice}", field=f"{field}.{position}"
            )
        turns.append(_turn(role, content, place, files, masks))
    for branch, media in files.items():
        if media.used != len(media.paths):
            raise DataError(_count_reason(branch, media), field=media.field)
    return turns


def _role_and_content(entry: object, field: str) -> tuple[Role, object, str]:
    """Return role, content and the content's field of one turn.

    Both forms are read: from/value and role/content.
    """
    if not isinstance(entry, dict):
        raise DataError(
            f"expected a turn, an object with 'from' and 'value', found {json_type(entry)}",
            field=field,
        )
    role_key, content_key = ("role", "content") if "role" in entry else ("from", "value")
    for key in (role_key, content_key):
        if key not in entry:
            raise DataError(
                f"'{key}' is missing; a turn has 'from' and 'value', or 'role' and 'content'",
                field=field,
            )
    name = require_text(entry[role_key], f"{field}.{role_key}")
    if name not in _ROLES:
        raise DataError(
            f"unknown role {name[:40]!r}; expected one of {', '.join(_ROLES)}",
            field=f"{field}.{role_key}",
        )
    return _ROLES[name], entry[content_key], f"{field}.{content_key}"


def _turn(role: Role, content: object, field: str, files: dict[str, _Files], masks: _Masks) -> Turn:
    if isinstance(content, list):
        parts = [_part(part, f"{field}.{position}", files) for position, part in enumerate(content)]
        if role == "assistant":
            return Turn(role, tuple(_split_control_tokens(parts, masks)))
        return Turn(role, tuple(parts))
    text = require_text(content, field)
    if role == "assistant":  # a placeholder in a reply is text to be learned
        return Turn(role, tuple(_split_control_tokens([text], masks)))
    return Turn(role, tuple(_split_placeholders(text, field, files)))


def _split_control_tokens(
    parts: Sequence[str | Media], masks: _Masks
) -> Iterator[str | Media | ControlToken]:
    """Yield the parts of a reply.

    `[SEG]` and the marks of phrases in its text are control tokens where the record has masks.
    """
    for part in parts:
        if not isinstance(part, str) or not masks.entries:
            yield part
            continue
        start = 0
        for found in _CONTROL.finditer(part):
            if found.start() > start:
                yield part[start : found.start()]
            token = found.group()
            yield masks.take() if token == MASK_TOKEN else ControlToken(token)
            start = found.end()
        if start < len(part):
            yield part[start:]


def _check_masks(masks: _Masks, turns: Sequence[Turn], *, inference: bool) -> None:
    """Raise `DataError` where `[SEG]` and masks differ in number.

    The masks that are left may belong to the reply that is to be generated.
    """
    count = len(masks.entries)
    to_be_generated = inference and turns[-1].role != "assistant"
    if masks.used == count or (to_be_generated and masks.used < count):
        return
    raise DataError(
        f"{count} mask(s), but {masks.used} {MASK_TOKEN} in the replies; write one "
        f"{MASK_TOKEN} where each mask belongs, in order",
        field=MASK_FIELD,
    )


def _mask_sources(
    entries: Sequence[Sequence[MaskEntry]], turns: Sequence[Turn]
) -> tuple[MaskSource, ...]:
    """Return the masks of a record with the file and the words that each belongs to.

    Raises:
        DataError: a mask of a file that the record does not have, or that stands behind the
            `[SEG]`; or two masks of one file for the same `[SEG]`.
    """
    if not entries:
        return ()
    media = [part for turn in turns for part in turn.content if isinstance(part, Media)]
    before = _before_mask_tokens(turns)
    sources = []
    for token, group in enumerate(entries):
        shown, phrase = before[token] if token < len(before) else (len(media), None)
        owners: dict[int, str] = {}
        for entry in group:
            owner = _owner(entry, media, shown)
            if owner in owners:
                raise DataError(
                    f"a second mask of one {media[owner].branch}, after '{owners[owner]}'; a "
                    f"{MASK_TOKEN} has one mask in each. Join the two, or name the other file by "
                    f"'{media[owner].branch}'",
                    field=entry.field,
                )
            owners[owner] = entry.field
            _check_axes(entry, media[owner])
            sources.append(entry.source(token=token, media=owner, phrase=phrase))
    return tuple(sources)


def _check_axes(entry: MaskEntry, owner: Media) -> None:
    """Raise `DataError` for run lengths or outlines of another kind of file than the mask's."""
    is_volume = owner.branch == "volume"
    if entry.polygons is not None and is_volume:
        raise DataError(
            "outlines are for images, and the mask belongs to a volume; write a label map or run "
            "lengths",
            field=f"{entry.field}.polygons",
        )
    if entry.rle is not None and len(entry.rle["size"]) != 2 + is_volume:
        expected = "[slices, rows, columns]" if is_volume else "[rows, columns]"
        raise DataError(
            f"{len(entry.rle['size'])} numbers; the mask is of the kind {owner.branch}, whose size "
            f"is {expected}",
            field=f"{entry.field}.rle.size",
        )


def _before_mask_tokens(turns: Sequence[Turn]) -> list[tuple[int, str | None]]:
    """Return, for each `[SEG]`, the files before it, and the words between the marks before it."""
    opening, closing = PHRASE_TOKENS
    found: list[tuple[int, str | None]] = []
    shown = 0
    for turn in turns:
        phrase: str | None = None
        words: list[str] | None = None
        for part in turn.content:
            if isinstance(part, Media):
                shown += 1
            elif isinstance(part, str):
                if words is not None:
                    words.append(part)
            elif not isinstance(part, ControlToken):
                continue
            elif part.token == opening:
                words = []
            elif part.token == closing:
                phrase = "".join(words or []).strip() or None
                words = None
            else:
                found.append((shown, phrase))
                phrase = None
    return found


def _owner(entry: MaskEntry, media: Sequence[Media], shown: int) -> int:
    """Return the position among all files of the one that a mask belongs to.

    Args:
        entry: the mask.
        media: all files of the record.
        shown: number of those before the `[SEG]`.
    """
    if entry.position is None:
        if not shown:
            raise DataError(
                f"a mask, but no image or volume stands before its {MASK_TOKEN}", field=entry.field
            )
        return shown - 1
    of_kind = [number for number, item in enumerate(media) if item.branch == entry.kind]
    field = f"{entry.field}.{entry.kind}"
    if entry.position >= len(of_kind):
        raise DataError(
            f"{entry.position}, and the record has {len(of_kind)} {entry.kind}(s), counted from 0",
            field=field,
        )
    owner = of_kind[entry.position]
    if owner >= shown:
        raise DataError(
            f"the {entry.kind} stands behind the {MASK_TOKEN}; the model has not seen it there",
            field=field,
        )
    return owner


def _split_placeholders(text: str, field: str, files: dict[str, _Files]) -> Iterator[str | Media]:
    start = 0
    for found in _PLACEHOLDER.finditer(text):
        if found.start() > start:
            yield _plain(text[start : found.start()], field)
        name = found.group()
        yield _next_media(KIND_OF_PLACEHOLDER[name], f"{name} stands in the text", field, files)
        start = found.end()
    if start < len(text):
        yield _plain(text[start:], field)


def _plain(text: str, field: str) -> str:
    """Return the text between placeholders.

    Raises `DataError` for a placeholder that would be trained as words.
    """
    found = _FOREIGN_PLACEHOLDER.search(text) if "<" in text else None
    if found is None:
        return text
    kind = found["kind"].lower()
    if kind in _UNREAD:
        raise DataError(
            f"{found.group()} stands in the text, and medm reads no {_UNREAD[kind]}", field=field
        )
    raise DataError(
        f"{found.group()} stands in the text, which is no placeholder of medm; write <image> or "
        "<volume> where each file belongs",
        field=field,
    )


def _next_media(branch: str, what: str, field: str, files: dict[str, _Files]) -> Media:
    if branch not in files:
        names = " or ".join(f"'{key}'" for key, value in MEDIA_FIELDS.items() if value == branch)
        raise DataError(
            f"{what}, and the record has no field {names} that names a file", field=field
        )
    return Media(branch, files[branch].take())


def _part(part: object, field: str, files: dict[str, _Files]) -> str | Media:
    """Return one part of an OpenAI-style content list.

    Images and volumes are parts of their own, so the text of a part holds no placeholders.
    """
    if not isinstance(part, dict) or "type" not in part:
        raise DataError(
            f"expected a content part, an object with 'type', found {json_type(part)}", field=field
        )
    kind = require_text(part["type"], f"{field}.type")
    if kind == "text":
        return require_text(part.get("text"), f"{field}.text")
    if kind not in _PART_FIELDS:
        raise DataError(
            f"unknown content part {kind[:40]!r}; expected text, {', '.join(_PART_FIELDS)}",
            field=f"{field}.type",
        )
    branch = _PART_FIELDS[kind]
    for key in (kind, "path", "url"):
        value = part.get(key)
        if isinstance(value, dict) and key == "image_url":
            key, value = "image_url.url", value.get("url")
        if value is not None:
            if not require_text(value, f"{field}.{key}").strip():
                raise DataError("expected a path, found empty text", field=f"{field}.{key}")
            return Media(branch, value)
    return _next_media(branch, "the part names no path", field, files)


def _count_reason(branch: str, media: _Files) -> str:
    names = " or ".join(name for name, value in KIND_OF_PLACEHOLDER.items() if value == branch)
    reason = (
        f"{len(media.paths)} file(s), but {media.used} placeholder(s) {names} in the user's and "
        "system turns"
    )
    if media.used == 0:
        return (
            f"{reason}; write one where each file belongs, usually '{names.split(' ')[0]}\\n' "
            "before the question"
        )
    return f"{reason}; each file needs exactly one"


def _check_order(turns: Sequence[Turn], record: Mapping[str, object], *, inference: bool) -> None:
    """Check the order of the turns: one system turn at most, then user and assistant alternate.

    For training, the last turn is the assistant's.
    """
    field = _turns_field(record)
    has_system = bool(turns) and turns[0].role == "system"
    dialog = turns[1:] if has_system else turns
    offset = 1 if has_system and not record.get("system") else 0
    if not dialog:
        raise DataError("there is no turn of the user", field=field)
    for position, turn in enumerate(dialog):
        place = f"{field}.{position + offset}"
        expected = "assistant" if position % 2 else "user"
        if turn.role != expected:
            raise DataError(
                f"turns are out of order: expected the {expected}, found the {turn.role}; user "
                "and assistant take turns, the user first",
                field=place,
            )
        if any(isinstance(part, Media) for part in turn.content):
            if turn.role == "assistant":
                raise DataError("an image or volume in a reply; replies are text", field=place)
        elif not turn.text.strip() and not any(
            isinstance(part, ControlToken) for part in turn.content
        ):
            raise DataError(f"the {turn.role}'s turn is empty", field=place)
    if not inference and dialog[-1].role != "assistant":
        raise DataError("the last turn is the user's; training needs a reply to learn", field=field)


def media_field(record: object, media_index: int) -> str:
    """Return the field that names file `media_index` of a good record, for messages.

    Reads the record again.
    """
    # Inference accepts every record that training does, and finds the same files in it.
    media = _parse(record, inference=True, file=None, index=None).media
    assert isinstance(record, dict)  # anything else is refused
    branch = media[media_index].branch
    for field, owner in MEDIA_FIELDS.items():
        if owner == branch and record.get(field) is not None:
            before = sum(other.branch == branch for other in media[:media_index])
            return field if isinstance(record[field], str) else f"{field}.{before}"
    return _turns_field(record)
