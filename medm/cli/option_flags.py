"""Flags of a command from the fields of an options class.

Name, type, default and help text are the field's own.

A command says which options it takes and receives what was typed as dotted keys of the section. The
options class is imported when the command itself is used or asked for help: `medm --help` stays as
fast as without.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

import typer
from typer.core import TyperCommand

from medm.errors import RecipeError
from medm.types import JsonObject

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from medm.config import Options


Annotation: TypeAlias = Any
"""A type as it is written: a class, a union or a `Literal`."""


@dataclass(frozen=True, slots=True)
class Flag:
    """One field of an options class on the command line."""

    key: str
    """Dotted key of the section that it sets: `generation.top_k`."""
    name: str
    """What is typed: `--top-k`."""
    annotation: Annotation
    """Type of the value, as typer takes it."""
    help: str
    required: bool
    """The command cannot do without it."""

    @property
    def is_switch(self) -> bool:
        """It takes no value."""
        return self.annotation is bool

    def parameter(self) -> inspect.Parameter:
        """Return the parameter of a command function that typer turns into the flag."""
        option = typer.Option(self.name, help=self.help, show_default=False)
        given = self.annotation if self.required or self.is_switch else self.annotation | None
        default = False if self.is_switch else None
        return inspect.Parameter(
            self.name.removeprefix("--").replace("-", "_"),
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if self.required else default,
            annotation=Annotated[given, option],
        )


@dataclass(frozen=True, slots=True)
class Typed:
    """The flags that were typed."""

    values: Mapping[str, object]
    """Dotted key to value."""
    shown: Mapping[str, str]
    """Dotted key to the flag, and key of a block to the flags in it, for messages about their
    values."""

    def under(self, section: Mapping[str, object]) -> JsonObject:
        """Return a section with the typed values in place of its own.

        Raises:
            RecipeError: the section holds something else where a block is expected.
        """
        result: JsonObject = dict(section)
        for key, value in self.values.items():
            *blocks, last = key.split(".")
            node = result
            for block in blocks:
                inner = node.get(block, {})
                if not isinstance(inner, Mapping):
                    raise RecipeError(f"{block}: expected a block of keys, found {inner!r}")
                node[block] = dict(inner)
                node = node[block]
            node[last] = value
        return result

    def block(self, place: str) -> JsonObject:
        """Return what was typed for the fields of one block, by their names in it."""
        return {
            key.removeprefix(place): value
            for key, value in self.values.items()
            if key.startswith(place)
        }

    def beside(self, place: str) -> Typed:
        """Return the flags that belong to no field of this block."""
        kept = {key: value for key, value in self.values.items() if not key.startswith(place)}
        return Typed(kept, self.shown)


def flags_of(
    options: type[Options],
    *,
    place: str = "",
    names: Mapping[str, str] | None = None,
    leave_out: Collection[str] = (),
    optional: bool = False,
) -> list[Flag]:
    """Return a flag for each field: those of the class itself before those that it inherits.

    The fields of a nested block are flags under their own names.

    Args:
        options: the class.
        place: beginning of the dotted keys, where the class is a block of a section: `tasks.0.`.
        names: dotted key to flag where the field's own name is not used.
        leave_out: dotted keys without a flag.
        optional: nothing has to be typed, as where a recipe may say it.

    Raises:
        TypeError: a field is neither a plain value nor a block, or two flags have one name.
    """
    flags = list(_flags(options, place, names or {}, leave_out, optional))
    twice = {flag.name for flag in flags if sum(other.name == flag.name for other in flags) > 1}
    if twice:
        raise TypeError(f"{options.__name__}: two fields are {', '.join(sorted(twice))}")
    return flags


def _flags(
    options: type[Options],
    prefix: str,
    names: Mapping[str, str],
    leave_out: Collection[str],
    optional: bool,
) -> Iterator[Flag]:
    from medm.config import Options as Block
    from medm.registry import NamedBlock

    for field in _own_first(options):
        key, info = f"{prefix}{field}", options.model_fields[field]
        if key in leave_out:
            continue
        names_a_part = any(isinstance(item, NamedBlock) for item in info.metadata)
        if (
            isinstance(info.annotation, type)
            and issubclass(info.annotation, Block)
            and not names_a_part
        ):
            yield from _flags(info.annotation, f"{key}.", names, leave_out, optional)
            continue
        yield Flag(
            key=key,
            name=names.get(key, f"--{field.replace('_', '-')}"),
            annotation=_plain(info.annotation, info.default, f"{options.__name__}.{field}"),
            help=_help(info),
            required=info.is_required() and not optional,
        )


def _own_first(options: type[Options]) -> list[str]:
    """Names of the fields, those of each class before those of its bases."""
    order = [name for base in options.__mro__ for name in getattr(base, "__annotations__", {})]
    return sorted(options.model_fields, key=order.index)


def _plain(annotation: Annotation, default: object, field: str) -> Annotation:
    """The type of a field without None, which is what a flag that is not typed stands for."""
    if annotation is bool and default is not False:
        raise TypeError(f"{field}: on unless it is switched off; leave the field out")
    origin: object = get_origin(annotation)
    if origin in (Union, UnionType):
        kept = [inner for inner in get_args(annotation) if inner is not NoneType]
        annotation = kept[0] if len(kept) == 1 else annotation
        origin = get_origin(annotation)
    if annotation not in (str, int, float, bool) and origin is not Literal:
        raise TypeError(f"{field}: {annotation} cannot be typed as a flag; leave the field out")
    return annotation


def _help(info: FieldInfo) -> str:
    text = " ".join((info.description or "").split())
    if info.is_required() or info.default is None or info.default is False:
        return text
    return f"{text.removesuffix('.')}.  [default: {info.default}]"


def add_option_command(
    program: typer.Typer,
    name: str,
    function: Callable[..., None],
    flags: Callable[[], Sequence[Flag]],
) -> None:
    """Add a command whose flags are fields of options classes.

    Args:
        program: takes the command.
        name: of the command.
        function: the command. Its first parameter is `typed: Typed`; the others are arguments and
            flags that are no fields, declared as for any command of typer.
        flags: gives the flags; called when the command is used.
    """

    class OptionCommand(TyperCommand):
        """The command, completed when its parameters are asked for."""

        complete = False

        def get_params(self, ctx: Any) -> Any:
            if not self.complete:
                whole = typer.Typer(add_completion=False)
                whole.command(name)(_with_flags(function, flags()))
                command = typer.main.get_command(whole)
                self.params, self.callback = command.params, command.callback
                self.complete = True
            return super().get_params(ctx)

    def unread() -> None:
        raise AssertionError("a command is invoked after its parameters were read")

    program.command(name, cls=OptionCommand, help=inspect.getdoc(function))(unread)


def _with_flags(function: Callable[..., None], flags: Sequence[Flag]) -> Callable[..., None]:
    """The command with a parameter for each flag in place of `typed`."""
    generated = {flag.parameter().name: flag for flag in flags}
    others = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

    def command(**given: object) -> None:
        found = {flag.key: given.pop(name) for name, flag in generated.items()}
        typed = [
            flag for flag in flags if found[flag.key] is not None and found[flag.key] is not False
        ]
        shown: dict[str, str] = {flag.key: flag.name for flag in typed}
        for flag in typed:  # what is wrong with a block as a whole
            block = flag.key.rpartition(".")[0]
            shown[block] = f"{shown[block]}, {flag.name}" if block in shown else flag.name
        function(Typed({flag.key: found[flag.key] for flag in typed}, shown), **given)

    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in others]
    parameters = [*keyword, *(flag.parameter() for flag in flags)]
    command.__dict__["__signature__"] = inspect.Signature(parameters)  # what typer reads
    return command
