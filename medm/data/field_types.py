"""Types of the fields of a record, for the readers of records and their messages."""

from __future__ import annotations

from medm.errors import DataError


def json_type(value: object) -> str:
    """Return the JSON type of a value.

    Messages name the type: the value itself may be about a patient.
    """
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def require_text(value: object, field: str) -> str:
    """Return a text that can be written as UTF-8. Raises `DataError` for anything else."""
    if not isinstance(value, str):
        raise DataError(f"expected text, found {json_type(value)}", field=field)
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"half of a surrogate pair at character {error.start}; save the file as UTF-8",
                field=field,
            ) from None
    return value
