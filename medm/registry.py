"""Registries: tables of parts by exact name.

A table has one line per member: its name, the place of its code and one sentence. Reading the table
imports nothing; `get` imports the module of a member. Other packages add members through entry
points (the registry's `group`), single files through `--plugin file.py`, which calls `register`.
The torch-free options class of a member defines its keys in a recipe.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Generic, TypeAlias, TypeVar, Union, cast, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from medm.config import Options
from medm.errors import RecipeError, UnknownNameError

T = TypeVar("T")
Member = TypeVar("Member")
Part = TypeVar("Part")


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a registry's table."""

    name: str
    target: str | Any
    """`"package.module:attribute"`, imported by `Registry.get`, or the object itself."""
    summary: str
    options: type[Options]
    """Options of the member; its fields are the keyword arguments of the target."""


class Registry(Generic[T]):
    """Table of one kind of part.

    Args:
        kind: singular noun for messages ("connector").
        group: entry-point group through which other packages add members ("medm.connectors").
        options: options class of members without their own.
    """

    def __init__(self, kind: str, *, group: str, options: type[Options] = Options) -> None:
        self.kind, self.group, self.options = kind, group, options
        self._entries: dict[str, Entry] = {}
        self._entry_points_read = False

    def add(
        self, name: str, target: str | T, summary: str, *, options: type[Options] | None = None
    ) -> None:
        """Add a member. Raises `RecipeError` when the name is taken.

        Silent replacement would hide mistakes.
        """
        if name in self._entries:
            raise RecipeError(
                f"{self.kind} {name!r} is registered twice: first as "
                f"{self._entries[name].target}, now as {target}; give the second one a name of "
                "its own"
            )
        self._entries[name] = Entry(name, target, summary, options or self.options)

    def register(
        self, name: str, summary: str, *, options: type[Options] | None = None
    ) -> Callable[[Member], Member]:
        """Return a decorator that adds its target, for plug-in files."""

        def decorate(member: Member) -> Member:
            self.add(name, cast(T, member), summary, options=options)
            return member

        return decorate

    def names(self) -> list[str]:
        """Return every name, sorted."""
        self._read_entry_points()
        return sorted(self._entries)

    def entries(self) -> list[Entry]:
        """Return the entries in the order of the table."""
        self._read_entry_points()
        return list(self._entries.values())

    def entry(self, name: str) -> Entry:
        """Return the entry of an exact name.

        Raises `UnknownNameError` with the nearest name and the list.
        """
        self._read_entry_points()
        if name not in self._entries:
            hint = "; a part of your own comes with 'medm --plugin FILE'"
            raise UnknownNameError(self.kind, name, self._entries, hint=hint)
        return self._entries[name]

    def get(self, name: str) -> T:
        """Return the member; imports its module on first use."""
        target = self.entry(name).target
        if not isinstance(target, str):
            return target
        module, _, attribute = target.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def constructor(
        self: Registry[type[Part]], config: Mapping[str, object], **sizes: object
    ) -> Callable[[], Part]:
        """Return the constructor of a part with its arguments bound.

        Args:
            config: name and options, as a checkpoint holds them. Absent options have the defaults
                of the class.
            sizes: arguments that the composition derives.

        Raises:
            RecipeError: no such part, or it does not accept the config.
        """
        options = dict(config)
        name = str(options.pop("name", ""))
        maker = self.get(name)
        try:
            inspect.signature(maker).bind(**sizes, **options)
        except TypeError as error:
            raise RecipeError(
                f"{self.kind} {name!r} does not take what its config says ({error}); a later medm "
                "may have written it"
            ) from None
        return partial(maker, **sizes, **options)

    def __contains__(self, name: str) -> bool:
        self._read_entry_points()
        return name in self._entries

    @contextmanager
    def temporary(self) -> Iterator[Registry[T]]:
        """Remove all additions at the end of the block (for tests)."""
        before = dict(self._entries)
        try:
            yield self
        finally:
            self._entries = before

    def _read_entry_points(self) -> None:
        if self._entry_points_read:
            return
        self._entry_points_read = True
        for point in entry_points(group=self.group):
            if not point.attr:  # a module, whose import adds lines with options of their own
                point.load()
                continue
            source = point.dist.name if point.dist else "an installed package"
            self.add(point.name, point.value, f"from {source}")


@dataclass(frozen=True)
class NamedBlock:
    """Annotation of a field whose block names a registered part.

    Such a block is `{name: mlp, depth: 2}` or just `mlp`.

    The field's type is the options class that all members share: `Annotated[ConnectorOptions,
    NamedBlock(CONNECTORS)]`. The block is checked by the options class of the part that it names,
    so an unknown option is reported with the options of this part.
    """

    registry: Registry[Any]
    key: str = "name"
    """Key of the block that holds the name."""
    default: str | None = None
    """Name of a block that gives none."""
    beside: tuple[tuple[str, type[Options]], ...] = ()
    """Options of blocks that may replace it and name no part, each recognized by a key."""

    def __get_pydantic_core_schema__(self, _source: object, _handler: object) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda options: options.model_dump()
            ),
        )

    def _validate(self, value: object) -> Options:
        if isinstance(value, Options):
            return value
        if isinstance(value, str):
            value = {self.key: value}
        for mark, options in self.beside:
            if isinstance(value, Mapping) and mark in value:
                return options.model_validate(dict(value))
        if self.default is not None and isinstance(value, Mapping):
            value = {self.key: self.default, **value}
        if not isinstance(value, Mapping) or not isinstance(value.get(self.key), str):
            raise PydanticCustomError(
                "named_block",
                "expected a {kind} block with a '{key}', found {found}",
                {"kind": self.registry.kind, "key": self.key, "found": repr(value)},
            )
        try:
            entry = self.registry.entry(value[self.key])
        except RecipeError as error:
            raise PydanticCustomError("unknown_name", "{reason}", {"reason": str(error)}) from None
        return entry.options.model_validate(dict(value))


Section: TypeAlias = type[Options] | NamedBlock
"""Options of a section of a recipe: a class, or a table of classes by the name of a part."""
EACH_ITEM, EACH_VALUE = "[]", "<name>"
"""Steps of a path into a field: to every item of a list, to every value of a mapping."""


def sections_in(field: FieldInfo) -> Iterator[tuple[tuple[str, ...], Section]]:
    """Yield the sections that a field holds, each with its path.

    The path consists of the steps (`EACH_ITEM`, `EACH_VALUE`) that lead to the section.
    """
    yield from _sections(field.annotation, list(field.metadata), ())


def _sections(
    annotation: object, metadata: Sequence[object], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Section]]:
    block = next((item for item in metadata if isinstance(item, NamedBlock)), None)
    if block is not None:
        yield path, block
        yield from ((path, options) for _, options in block.beside)
        return
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _sections(arguments[0], list(arguments[1:]), path)
    elif origin is list:
        yield from _sections(arguments[0], [], (*path, EACH_ITEM))
    elif origin is dict:
        yield from _sections(arguments[1], [], (*path, EACH_VALUE))
    elif origin in (Union, UnionType):
        for argument in arguments:
            yield from _sections(argument, [], path)
    elif (
        isinstance(annotation, type)
        and issubclass(annotation, Options)
        and annotation is not Options
    ):
        yield path, annotation


_plugins: list[Path] = []


def loaded_plugins() -> list[Path]:
    """Return the plug-in files in loading order, for worker processes that load them too."""
    return list(_plugins)


def load_plugin(path: str | Path) -> None:
    """Run a plug-in file, whose `register` calls add parts.

    A second call with the same file has no effect.

    Raises:
        RecipeError: there is no such file, or it registers a name that is taken.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise RecipeError(f"--plugin {path}: no such file")
    # The same name in every process, so that objects of its classes can be pickled.
    name = f"medm_plugin_{file.stem}_{hashlib.sha256(os.fsencode(file)).hexdigest()[:16]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise RecipeError(f"--plugin {path}: expected a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _plugins.append(file)
