"""Pickles of plain values (PathVQA is distributed as such), read without unpickling.

A pickle is a program that may call any function. This reader walks its instructions
(`pickletools.genops` only decodes, it executes nothing) and follows those that build text, numbers,
lists, tuples and dicts. Any other one, above all those that look up or call something, ends the
reading with an error.
"""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import TypeVar

from medm.errors import DataError

Container = TypeVar("Container")

_MAX_BYTES = 512 * 2**20
_LITERALS = frozenset((
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "SHORT_BINUNICODE",
    "BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING",
))  # fmt: skip
_CONSTANTS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_IGNORED = frozenset(("PROTO", "FRAME", "STOP"))


def read_plain_pickle(path: Path) -> object:
    """Return the value of a pickle that contains plain data only.

    Raises `DataError` for anything that is not plain data, damaged, or larger than 512 MiB.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(
                f"is larger than {_MAX_BYTES // 2**20} MiB, more than annotations need", file=path
            )
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", file=path) from None
    reader = _Reader()
    try:
        for instruction, argument, _ in pickletools.genops(content):
            reader.follow(instruction.name, argument)
        return reader.result()
    except DataError as error:
        raise error.at(file=path) from None
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise DataError(f"is not a pickle, or a damaged one ({error})", file=path) from None


class _Reader:
    """A stack with marks, and a memo, as the pickle format describes them."""

    def __init__(self) -> None:
        self.stack: list[object] = []
        self.marks: list[int] = []
        """Heights of the stack at which marks were set."""
        self.memo: dict[object, object] = {}

    def follow(self, name: str, argument: object) -> None:
        """One instruction."""
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE"):
            stack.append({"EMPTY_LIST": [], "EMPTY_DICT": {}, "EMPTY_TUPLE": ()}[name])
        elif name in ("LIST", "TUPLE", "DICT"):
            items = self.since_mark()
            stack.append(
                items if name == "LIST" else tuple(items) if name == "TUPLE" else _pairs(items)
            )
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            stack[-size:] = [tuple(stack[-size:])]
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self.since_mark()
            self.top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self.popped(2) if name == "SETITEM" else self.since_mark()
            self.top(dict).update(_pairs(items))
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "POP":
            stack.pop()
        elif name not in _IGNORED:
            raise DataError(
                f"holds the pickle instruction {name}: more than text, numbers, lists and dicts, "
                "and reading it could run code that the file brings. Convert it to JSON on a "
                "machine that holds nothing of value"
            )

    def since_mark(self) -> list[object]:
        """Takes what was pushed after the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def popped(self, size: int) -> list[object]:
        """Takes the last `size` items."""
        items = self.stack[-size:]
        del self.stack[-size:]
        return items

    def top(self, kind: type[Container]) -> Container:
        """Return the container on top."""
        container = self.stack[-1]
        if not isinstance(container, kind):
            raise ValueError(f"expected a {kind.__name__} on the stack")
        return container

    def result(self) -> object:
        """Return the value that is left at the end."""
        if len(self.stack) != 1 or self.marks:
            raise ValueError(f"{len(self.stack)} values are left where one belongs")
        return self.stack[0]


def _pairs(items: list[object]) -> dict[object, object]:
    return dict(zip(items[::2], items[1::2], strict=True))
