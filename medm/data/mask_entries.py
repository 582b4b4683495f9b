"""Entries of a record's `masks`: each the masks of one `[SEG]`, as files, run lengths or polygons.

Knows no turns and opens no file: an entry is checked as far as its own text goes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from medm.data.field_types import json_type, require_text
from medm.errors import DataError, suggest
from medm.types import JsonObject, Kind, MaskSource

MASK_FIELD = "masks"
"""Record field with one entry for each `[SEG]` in the replies."""

_FORMS = ("file", "rle", "polygons")
_KINDS: tuple[Kind, ...] = ("image", "volume")
_KEYS = (*_FORMS, "value", "phrase", *_KINDS)
_RLE_KEYS = ("size", "counts")


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskEntry:
    """One mask as the record writes it, before it is known which image it belongs to."""

    field: str
    """Field of the record, for messages: `masks.0`."""
    kind: Kind | None = None
    position: int | None = None
    """Image or volume that it names, by kind and position among those of the kind; None for the
    default."""
    path: str | None = None
    value: int | None = None
    rle: JsonObject | None = None
    polygons: tuple[tuple[float, ...], ...] | None = None
    phrase: str | None = None

    def source(self, *, token: int, media: int, phrase: str | None) -> MaskSource:
        """Return the mask of `[SEG]` number `token` in file number `media` of the record."""
        return MaskSource(
            token=token,
            media=media,
            field=self.field,
            path=self.path,
            value=self.value,
            rle=self.rle,
            polygons=self.polygons,
            phrase=self.phrase if self.phrase is not None else phrase,
        )


def mask_entries(value: object) -> list[list[MaskEntry]]:
    """Return the masks of each `[SEG]` of a record, in order.

    Args:
        value: the record's `masks`: a path, or a list with one entry for each `[SEG]`: a path, an
            object with `file`, `rle` or `polygons`, null for a target that is not there, or a list
            of such entries where several images share the `[SEG]`. None for a record without masks.

    Raises:
        DataError: with field and reason.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return [[mask_entry(value, MASK_FIELD)]]
    if not isinstance(value, list):
        raise DataError(
            f"expected a path, or a list with one entry for each [SEG], found {json_type(value)}",
            field=MASK_FIELD,
        )
    return [_group(entry, f"{MASK_FIELD}.{number}") for number, entry in enumerate(value)]


def _group(value: object, field: str) -> list[MaskEntry]:
    """Return the masks that share one `[SEG]`."""
    if not isinstance(value, list):
        return [mask_entry(value, field)]
    if not value:
        raise DataError(
            "an empty list; write null for a target that is not in the image", field=field
        )
    return [mask_entry(entry, f"{field}.{number}") for number, entry in enumerate(value)]


def mask_entry(value: object, field: str) -> MaskEntry:
    """Return one mask of a record. Raises `DataError` with field and reason."""
    if value is None:
        return MaskEntry(field=field)
    if isinstance(value, str):
        return MaskEntry(field=field, path=_path(value, field))
    if not isinstance(value, dict):
        raise DataError(
            f"expected a path, an object with {', '.join(_FORMS)}, or null for a target that is "
            f"not in the image, found {json_type(value)}",
            field=field,
        )
    return _from_object(value, field)


def _from_object(value: Mapping[str, object], field: str) -> MaskEntry:
    for key in value:
        if key not in _KEYS:
            raise DataError(
                f"unknown key{suggest(key, _KEYS)}; a mask has {', '.join(_KEYS)}",
                field=f"{field}.{key[:40]}",
            )
    forms = [form for form in _FORMS if form in value]
    if len(forms) != 1:
        raise DataError(
            f"expected one of {', '.join(_FORMS)}, found {' and '.join(forms) or 'none'}; for a "
            "target that is not in the image write null",
            field=field,
        )
    kind, position = _media(value, field)
    entry = MaskEntry(field=field, kind=kind, position=position, phrase=_phrase(value, field))
    form, content = forms[0], value[forms[0]]
    if value.get("value") is not None and (form != "file" or content is None):
        raise DataError("'value' is a label in a 'file', and there is none", field=f"{field}.value")
    place = f"{field}.{form}"
    if content is None:
        return entry
    if form == "file":
        label = None if value.get("value") is None else _whole(value["value"], f"{field}.value")
        return replace(entry, path=_path(content, place), value=label)
    if form == "rle":
        return replace(entry, rle=_rle(content, place))
    return replace(entry, polygons=_polygons(content, place))


def _media(value: Mapping[str, object], field: str) -> tuple[Kind | None, int | None]:
    named = [kind for kind in _KINDS if value.get(kind) is not None]
    if len(named) > 1:
        raise DataError("'image' and 'volume' are both given; keep one", field=field)
    if not named:
        return None, None
    return named[0], _whole(value[named[0]], f"{field}.{named[0]}")


def _phrase(value: Mapping[str, object], field: str) -> str | None:
    if value.get("phrase") is None:
        return None
    phrase = require_text(value["phrase"], f"{field}.phrase")
    if not phrase.strip():
        raise DataError("expected words of the reply, found empty text", field=f"{field}.phrase")
    return phrase


def _path(value: object, field: str) -> str:
    path = require_text(value, field)
    if not path.strip():
        raise DataError("expected a path, found empty text", field=field)
    return path


def _whole(value: object, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DataError(f"expected a whole number from 0 on, found {json_type(value)}", field=field)
    return value


def _rle(value: object, field: str) -> JsonObject:
    """Return a run-length code; its numbers are checked where it is decoded."""
    if not isinstance(value, dict) or value.keys() != set(_RLE_KEYS):
        found = (
            f"an object with {', '.join(map(str, value)) or 'no key'}"[:80]
            if isinstance(value, dict)
            else json_type(value)
        )
        raise DataError(f"expected an object with 'size' and 'counts', found {found}", field=field)
    size, counts = value["size"], value["counts"]
    if (
        not isinstance(size, list)
        or len(size) not in (2, 3)
        or not all(isinstance(side, int) and not isinstance(side, bool) for side in size)
    ):
        raise DataError(
            "expected [rows, columns], or [slices, rows, columns] of a volume, as whole numbers",
            field=f"{field}.size",
        )
    if not isinstance(counts, (list, str)):
        raise DataError(
            f"expected a list of run lengths or text, found {json_type(counts)}",
            field=f"{field}.counts",
        )
    return value


def _polygons(value: object, field: str) -> tuple[tuple[float, ...], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(
            "expected a list of outlines [[x1, y1, x2, y2, x3, y3, ...], ...], found "
            f"{json_type(value)}",
            field=field,
        )
    return tuple(_polygon(outline, f"{field}.{number}") for number, outline in enumerate(value))


def _polygon(value: object, field: str) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise DataError(
            f"expected an outline [x1, y1, x2, y2, x3, y3, ...], found {json_type(value)}",
            field=field,
        )
    if len(value) < 6 or len(value) % 2:
        raise DataError(
            f"{len(value)} numbers; an outline has x and y of at least three points", field=field
        )
    return tuple(_finite(value, number, field) for number in range(len(value)))


def _finite(values: Sequence[object], number: int, field: str) -> float:
    value = values[number]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise DataError(f"expected a number, found {json_type(value)}", field=f"{field}.{number}")
    return float(value)
