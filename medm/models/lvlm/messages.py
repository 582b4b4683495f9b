"""Conversion of messages, as transformers and OpenAI write them, to turns and their media.

`{"role": "user", "content": [{"type": "image", "image": ...}, {"type": "text", "text": "What is
seen?"}]}`. Images and volumes are parts; text is text, whatever stands in it. Knows no tokens and
decodes no image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from medm.errors import DataError, MediaError
from medm.imaging.sources import decode_base64
from medm.types import Media, Role, Turn

_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_KEYS = {
    "image": ("image", "path", "url", "base64"),
    "volume": ("volume", "path", "url"),
}
"""Kinds of content parts, and the keys that may hold the item itself. Without one it is handed over
apart."""
_MESSAGE_KEYS = {"role", "content", "name"}


@dataclass(frozen=True, slots=True)
class ChatInput:
    """One conversation."""

    turns: tuple[Turn, ...]
    items: tuple[object, ...]
    """Of each image and volume in order, what its part holds; None where it holds nothing."""


def parse_messages(messages: object) -> ChatInput:
    """Read one conversation.

    Args:
        messages: mappings with `role` and `content`, which is text or a list of parts.

    Raises:
        DataError: a role, part or key that is unknown, with its place.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise DataError(
            f"expected a list of messages with 'role' and 'content', found {_kind(messages)}"
        )
    turns: list[Turn] = []
    items: list[object] = []
    for position, message in enumerate(messages):
        place = f"messages.{position}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise DataError(
                f"expected a message with 'role' and 'content', found {_kind(message)}", field=place
            )
        unknown = sorted(key for key in set(message) - _MESSAGE_KEYS if message[key] is not None)
        if unknown:
            raise DataError(
                f"{', '.join(unknown)}: not supported; messages have 'role' and 'content'",
                field=place,
            )
        if message["role"] not in _ROLES:
            raise DataError(
                f"unknown role {str(message['role'])[:40]!r}; expected one of {', '.join(_ROLES)}",
                field=f"{place}.role",
            )
        content: list[str | Media] = []
        for part, item in _parts(message["content"], f"{place}.content"):
            if isinstance(part, Media):
                if message["role"] == "assistant":
                    raise DataError(
                        "an image or volume in a reply; replies are text", field=f"{place}.content"
                    )
                items.append(item)
            content.append(part)
        turns.append(Turn(_ROLES[message["role"]], tuple(content)))
    return ChatInput(tuple(turns), tuple(items))


def _parts(content: object, field: str) -> Iterator[tuple[str | Media, object]]:
    if isinstance(content, str):
        yield content, None
        return
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise DataError(
            f"expected text or a list of content parts, found {_kind(content)}", field=field
        )
    for position, part in enumerate(content):
        place = f"{field}.{position}"
        if isinstance(part, str):
            yield part, None
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise DataError(
                    f"expected text, found {_kind(part.get('text'))}", field=f"{place}.text"
                )
            yield part["text"], None
        elif kind == "image_url":
            value = part.get("image_url")
            yield Media("image"), value.get("url") if isinstance(value, Mapping) else value
        elif kind in _KEYS:
            found = [key for key in _KEYS[kind] if part.get(key) is not None]
            if len(found) > 1:
                raise DataError(f"{' and '.join(found)} are given; keep one", field=place)
            item = part[found[0]] if found else None
            yield Media(kind), _bytes(item, place) if found == ["base64"] else item
        else:
            known = ", ".join(["text", *_KEYS, "image_url"])
            found_kind = f"type {str(kind)[:40]!r}" if isinstance(part, Mapping) else _kind(part)
            raise DataError(
                f"expected a content part of type {known}, found {found_kind}", field=place
            )


def _bytes(text: object, field: str) -> object:
    if not isinstance(text, (str, bytes)):
        raise DataError(f"expected base64 as text, found {_kind(text)}", field=field)
    try:
        return decode_base64(text)
    except MediaError as error:
        raise error.at(field=field) from None


def flatten(value: object) -> list[object]:
    """One item, or lists of them at any depth, as one list."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return [item for part in value for item in flatten(part)]
    return [value]


def _kind(value: object) -> str:
    """The type of a value. The value itself may be about a patient and stays out of messages."""
    return "nothing" if value is None else type(value).__name__
