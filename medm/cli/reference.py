"""Recipe reference, read from the options classes.

Source of `docs/recipe-reference.md` and `medm list KIND NAME`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from medm.config import Options
from medm.registry import EACH_ITEM, NamedBlock, Registry, Section, sections_in

HEADER = """\
# Recipe reference

Every key of a recipe, its type, its default and what it does. This page is written by `make docs` from the classes that
check recipes, and a test fails when it is not current. How recipes work: [recipes.md](recipes.md).

Keys are strict: an unknown one is an error that names the nearest known one. Any key can be set on the command line as
`dotted.key=value`.
"""


@dataclass(frozen=True)
class Field:
    """One key of a section."""

    key: str
    type: str
    default: str
    text: str


def fields(options: type[Options], *, beyond: type[Options] | None = None) -> list[Field]:
    """Return the keys of a section in their written order.

    With `beyond`, only those that the other class lacks.
    """
    known = beyond.model_fields if beyond is not None else {}
    return [
        Field(key, type_text(info), default_text(info), " ".join((info.description or "").split()))
        for key, info in options.model_fields.items()
        if key not in known
    ]


def type_text(info: FieldInfo) -> str:
    """A field's type in words, with its bounds."""
    bounds = [text for constraint in info.metadata if (text := _bound(constraint))]
    return ", ".join([_type(info.annotation, list(info.metadata)), *bounds])


def _bound(constraint: object) -> str:
    words = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [
        f"{sign} {getattr(constraint, name)}"
        for name, sign in words.items()
        if hasattr(constraint, name)
    ]
    return ", ".join(found)


def _type(annotation: object, metadata: list[object]) -> str:
    block = next((item for item in metadata if isinstance(item, NamedBlock)), None)
    if block is not None:
        return f"{block.registry.kind} block"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], list(arguments[1:]))
    if origin is Literal:
        return " or ".join("null" if value is None else f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(argument, []) for argument in arguments)
    if origin in (list, tuple):
        return f"list of {_type(arguments[0], [])}"
    if origin is dict:
        return "mapping" if arguments[1] is Any else f"mapping of name to {_type(arguments[1], [])}"
    if annotation is type(None):
        return "null"
    plain: dict[object, str] = {
        str: "text",
        int: "integer",
        float: "number",
        bool: "true or false",
        Any: "any value",
    }
    if isinstance(annotation, type) and issubclass(annotation, Options):
        return "block"
    return plain.get(annotation) or str(getattr(annotation, "__name__", annotation))


def default_text(info: FieldInfo) -> str:
    """A field's default as it would be written in YAML."""
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, Options):
        block = next((item for item in info.metadata if isinstance(item, NamedBlock)), None)
        return "see below" if block is None else str(getattr(value, block.key))
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value != "" else '""'


def sections(options: type[Options], path: str = "") -> Iterator[tuple[str, Section]]:
    """Yield every section below one, depth first, itself included, and every table of parts.

    Each comes once.
    """
    seen: set[int] = set()

    def expand(current: type[Options], place: str) -> Iterator[tuple[str, Section]]:
        for key, info in current.model_fields.items():
            for steps, found in sections_in(info):
                below = f"{place}.{key}".lstrip(".") + "".join(
                    step if step == EACH_ITEM else f".{step}" for step in steps
                )
                mark = id(found.registry) if isinstance(found, NamedBlock) else id(found)
                if mark in seen:
                    continue
                seen.add(mark)
                yield below, found
                inner = (
                    [e.options for e in found.registry.entries()]
                    if isinstance(found, NamedBlock)
                    else [found]
                )
                for member in inner:
                    yield from expand(member, below)

    yield path, options
    yield from expand(options, path)


def page() -> str:
    """The whole reference page, in Markdown."""
    from medm.training.recipe import Recipe

    parts = [HEADER]
    for path, found in sections(Recipe):
        parts.append(
            _named_section(path, found.registry)
            if isinstance(found, NamedBlock)
            else _section(path, found)
        )
    return "\n".join(parts)


def _section(path: str, options: type[Options]) -> str:
    title = f"`{path}`" if path else "A recipe"
    return f"## {title}\n\n{_first_paragraph(options)}\n\n{_table(fields(options))}\n"


def _named_section(path: str, registry: Registry[Any]) -> str:
    """A block that names a part: what all members share, then what each adds."""
    lines = [
        f"## `{path}`: {registry.kind}",
        "",
        f"Names one {registry.kind} of the table `{registry.group}`.",
        "",
    ]
    lines += [_table(fields(registry.options)), ""] if registry.options.model_fields else []
    for entry in registry.entries():
        lines += [f"### {registry.kind} `{entry.name}`", "", f"{entry.summary}.", ""]
        own = fields(entry.options, beyond=registry.options)
        lines += [_table(own), ""] if own else []
    return "\n".join(lines)


def _first_paragraph(options: type[Options]) -> str:
    return " ".join((options.__doc__ or "").strip().split("\n\n")[0].split())


def _table(rows: list[Field]) -> str:
    lines = ["| key | type | default | what it does |", "|---|---|---|---|"]
    for row in rows:
        cells = [
            f"`{row.key}`",
            row.type,
            f"`{row.default}`" if row.default != "required" else "required",
            row.text,
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
