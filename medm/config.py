"""Strict, typed options, and the reading of YAML recipes with dotted overrides.

Knows no component and no tensor library. Each package defines the options of its own section of a
recipe; this file defines how a section is written, read, checked and reported.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from medm.errors import RecipeError, suggest
from medm.limits import MAX_RECIPE_BYTES, MAX_RECIPE_DEPTH, MAX_RECIPE_VALUES


class Options(BaseModel):
    """A section of a recipe.

    It is frozen. Every key is known, every value has its type, and every field has a docstring.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        validate_default=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, value: object) -> object:
        if isinstance(value, Mapping):
            unknown = [str(key) for key in value if key not in cls.model_fields]
            if unknown:
                reasons = "; ".join(
                    f"unknown key {key!r}{suggest(key, cls.model_fields)}" for key in unknown
                )
                raise PydanticCustomError("unknown_key", "{reasons}", {"reasons": reasons})
        return value


OptionsT = TypeVar("OptionsT", bound=Options)
T = TypeVar("T")


class Mark(Enum):
    """Properties of an option that stand on its field, as `Annotated` metadata."""

    RESUME_SAFE = "resume-safe"
    """May change between a run and its continuation."""
    OWN = "own"
    """Read by medm, not passed on with the other options of its section."""


ResumeSafe: TypeAlias = Annotated[T, Mark.RESUME_SAFE]
"""Type of an option that may change between a run and its continuation: it does not change what is
learned.

On a section it covers every key below. Options of plug-ins use it too.
"""


class _RecipeLoader(yaml.SafeLoader):
    """SafeLoader that reads `2e-4` as a number and `no` as text, unlike YAML 1.1.

    It refuses duplicate keys, values that are none of their type, and aliases that repeat a block
    without end or often.
    """

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        _check_extent(node)
        return self.construct_document(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            if isinstance(error, RecipeError):
                raise
            kind = str(node.tag).rpartition(":")[2]
            text = f" {node.value[:40]!r}" if isinstance(node, yaml.ScalarNode) else ""
            raise RecipeError(
                f"{_place(node)}: cannot read{text} as {kind} ({str(error)[:100]}); put it in "
                "quotes if it is text"
            ) from None
        if (isinstance(value, int) and value.bit_length() > 63) or (
            isinstance(value, float) and not math.isfinite(value)
        ):
            raise RecipeError(
                f"{_place(node)}: expected a finite number of at most 63 bits, found "
                f"{str(node.value)[:40]!r}"
            )
        return value

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, object]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(
                    f"{_place(key_node)}: expected a word as a key, found {type(key).__name__}"
                )
            if key in seen:
                raise RecipeError(
                    f"{_place(key_node)}: key {key!r} is written twice; keep one of the two"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_BOOL = "tag:yaml.org,2002:bool"
_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver(
    _BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _check_extent(root: yaml.Node) -> None:
    """Raise `RecipeError` for a tree that is too deep or too large with its aliases expanded.

    Each node is visited once; an alias counts as what it repeats.
    """
    counts: dict[int, int] = {}
    inside: set[int] = set()

    def count(node: yaml.Node, depth: int) -> int:
        if id(node) in inside:
            raise RecipeError(f"{_place(node)}: an alias repeats the block that it stands in")
        if depth > MAX_RECIPE_DEPTH:
            raise RecipeError(
                f"{_place(node)}: nested deeper than {MAX_RECIPE_DEPTH} levels; no key is so deep"
            )
        if id(node) not in counts:
            inside.add(id(node))
            total = 1
            for child in node.value if isinstance(node, yaml.CollectionNode) else ():
                for part in child if isinstance(child, tuple) else (child,):
                    total += count(part, depth + 1)
            inside.discard(id(node))
            counts[id(node)] = total
        if counts[id(node)] > MAX_RECIPE_VALUES:
            raise RecipeError(
                f"{_place(node)}: holds more than {MAX_RECIPE_VALUES} values, each counted as "
                "often as an alias repeats it; write less, or set MEDM_MAX_RECIPE_VALUES"
            )
        return counts[id(node)]

    count(root, 0)


def _load(text: str, name: str) -> object:
    """Return the value of a YAML text. Raises `RecipeError` with the place."""
    try:
        loader = _RecipeLoader(text)
        loader.name = name
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"{name}, line {line}: holds the character {error.character!r}, which YAML does not "
            "allow; remove it"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}, line {mark.line + 1}" if mark else name
        raise RecipeError(
            f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}"
        ) from None
    except RecursionError:
        raise RecipeError(
            f"{name}: nested deeper than {MAX_RECIPE_DEPTH} levels; no key is so deep"
        ) from None


def _place(node: yaml.Node) -> str:
    return f"{node.start_mark.name}, line {node.start_mark.line + 1}"


def read_yaml(path: str | Path) -> dict[str, object]:
    """Read a YAML file as a mapping. Raises `RecipeError` with file and line."""
    file = Path(path)
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_RECIPE_BYTES + 1)
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise RecipeError(
            f"{path}: no such recipe; 'medm list recipes' prints the ones that are shipped"
        ) from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if len(data) > MAX_RECIPE_BYTES:
        raise RecipeError(
            f"{path}: larger than {MAX_RECIPE_BYTES} bytes, which no recipe is; is it another file?"
        )
    value = _load(text, str(path))
    if not isinstance(value, dict):
        raise RecipeError(
            f"{path}: expected a mapping of keys at the top, found {type(value).__name__}"
        )
    return value


def parse_value(text: str) -> object:
    """Return the value of `key=value`, read as YAML.

    `1e-3` is a number, `[a, b]` a list, `null` is None.
    """
    try:
        return _load(text, "the value")
    except RecipeError as error:
        shown = text if len(text) <= 200 else f"{text[:200]}..."
        reason = str(error).removeprefix("the value, ")
        raise RecipeError(f"cannot read the value {shown!r}: {reason}") from None


ShortForm: TypeAlias = Callable[[Sequence[str]], "str | None"]
"""Function from the place of a block to the key that its short form sets (`name` for `connector:
mlp`), or None."""


def apply_overrides(
    recipe: Mapping[str, object],
    overrides: Iterable[str],
    *,
    short_form: ShortForm = lambda place: None,
) -> dict[str, Any]:
    """Return a copy of the recipe with each `dotted.key=value` set.

    A key inside a block in short form (`connector: mlp`, `llm: frozen`) expands the block.

    A number in the path is a list index (`data.train.0.weight=2`). The longest existing key wins,
    so part names may contain dots (`parts.image.connector.lr`).
    """
    result = copy.deepcopy(dict(recipe))
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise RecipeError(f"override {override!r}: expected dotted.key=value")
        if path.count(".") >= MAX_RECIPE_DEPTH:
            raise RecipeError(
                f"override {override[:40]!r}...: nested deeper than {MAX_RECIPE_DEPTH} levels; no "
                "key is so deep"
            )
        _assign(result, path.split("."), parse_value(text), override, short_form)
    return result


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """Return nested blocks as `dotted.key` to value. A list of plain values is one value."""
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, item in items:
        flat |= flatten(item, f"{prefix}.{key}" if prefix else key)
    return flat


def _assign(
    node: object,
    keys: list[str],
    value: object,
    override: str,
    short_form: ShortForm,
    place: tuple[str, ...] = (),
) -> None:
    if isinstance(node, list):
        if not keys[0].isdigit() or int(keys[0]) >= len(node):
            raise RecipeError(
                f"override {override!r}: {keys[0]!r} is not a position in a list of {len(node)} "
                "items"
            )
        if len(keys) == 1:
            node[int(keys[0])] = value
        else:
            _assign(node[int(keys[0])], keys[1:], value, override, short_form, (*place, keys[0]))
        return
    if not isinstance(node, dict):
        raise RecipeError(f"override {override!r}: there is no section {keys[0]!r} to set a key in")
    for length in range(len(keys), 0, -1):
        key = ".".join(keys[:length])
        if key in node:
            rest = keys[length:]
            if not rest:
                node[key] = value
            elif isinstance(node[key], (dict, list)):
                _assign(node[key], rest, value, override, short_form, (*place, key))
            elif isinstance(node[key], str) and (name := short_form((*place, key))) is not None:
                node[key] = {name: node[key]}
                _assign(node[key], rest, value, override, short_form, (*place, key))
            else:
                raise RecipeError(
                    f"override {override!r}: {key!r} holds {node[key]!r}, not a block; write the "
                    f"whole block, for example {key}={{...}}"
                )
            return
    if len(keys) == 1:
        node[keys[0]] = value
    else:
        _assign(
            node.setdefault(keys[0], {}), keys[1:], value, override, short_form, (*place, keys[0])
        )


def validate(
    schema: type[OptionsT],
    value: Mapping[str, object],
    *,
    source: str,
    shown: Mapping[str, str] | None = None,
) -> OptionsT:
    """Check a mapping against a schema.

    Args:
        schema: the options class.
        value: the mapping.
        source: its file or command, for messages.
        shown: other names of keys in messages, such as the command-line option.

    Raises:
        RecipeError: one line per problem, with the dotted key, the value found, and the nearest
            known key.
    """
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        lines = [f"  {_describe(problem, shown or {})}" for problem in error.errors()]
        raise RecipeError(f"{source}: {len(lines)} problem(s)\n" + "\n".join(lines)) from None


_PLAIN = {
    "a valid boolean": "true or false",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid list": "a list",
    "a valid dictionary": "a block of keys",
}
"""Names of YAML's types: pydantic's, and those of the documentation."""


def _describe(problem: ErrorDetails, shown: Mapping[str, str]) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "(top)"
    key = shown.get(key, key)
    if problem["type"] == "missing":
        return f"{key}: missing; this key is required"
    if problem["type"] in ("unknown_key", "named_block", "unknown_name", "value_error"):
        return f"{key}: {problem['msg'].removeprefix('Value error, ')}"
    message = problem["msg"].replace("Input should be", "expected")
    for technical, plain in _PLAIN.items():
        message = message.replace(technical, plain)
    return f"{key}: {message}, found {problem['input']!r}"
