"""Contract of every registry: a member takes the options of its table line, and each option is
described once."""

import inspect
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

from medm.config import Options
from medm.connectors import CONNECTORS
from medm.encoders import ENCODERS
from medm.heads import HEADS
from medm.knowledge import KNOWLEDGE
from medm.llms import LLMS, LLMOptions
from medm.llms.base import LLMFamily
from medm.metrics import METRICS
from medm.objectives import OBJECTIVES
from medm.registry import Registry
from medm.tasks import TASKS


class Table(NamedTuple):
    """A registry whose members are called with the options of a recipe as keywords."""

    registry: Registry[Any]
    elsewhere: frozenset[str]
    """Options that others read: the registry, the loading of weights, the preprocessing."""
    given: frozenset[str]
    """Keywords that the composition gives."""


TABLES = (
    Table(ENCODERS, frozenset({"name", "path", "image_size"}), frozenset()),
    Table(
        CONNECTORS, frozenset({"name", "path"}), frozenset({"in_dim", "out_dim", "grid", "prefix"})
    ),
    Table(HEADS, frozenset({"name", "path", "image_size"}), frozenset()),
    Table(
        KNOWLEDGE,
        frozenset({"name", "file", "shuffle", "fusion"}),
        frozenset({"graph", "node_ids", "word_dim", "key_dim", "length"}),
    ),
    Table(OBJECTIVES, frozenset({"name"}), frozenset()),
    Table(METRICS, frozenset({"name"}), frozenset()),
    Table(TASKS, frozenset({"name"}), frozenset()),
)
every_member = pytest.mark.parametrize(
    ("table", "name"),
    [
        pytest.param(table, name, id=f"{table.registry.kind}-{name}")
        for table in TABLES
        for name in table.registry.names()
    ],
)


def keywords(member: Any) -> dict[str, inspect.Parameter]:
    """Keywords of a class or function by name, those of the constructors above a `**options`
    included."""
    found: dict[str, inspect.Parameter] = {}
    calls = (
        [vars(base)["__init__"] for base in member.__mro__ if "__init__" in vars(base)]
        if inspect.isclass(member)
        else [member]
    )
    for call in calls:
        parameters = list(inspect.signature(call).parameters.values())
        found = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY} | found
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def plain(value: Any) -> Any:
    """A default as a recipe has it: a constructor's default cannot be a list or a dict."""
    return list(value) if isinstance(value, (tuple, list)) else value


def disagreements(
    options: type[Options], member: Any, *, elsewhere: frozenset[str], given: frozenset[str]
) -> list[str]:
    """Differences between the options of a recipe and the keywords of a member."""
    fields = {key: field for key, field in options.model_fields.items() if key not in elsewhere}
    taken = {key: parameter for key, parameter in keywords(member).items() if key not in given}
    found = [f"{key}: option without a keyword" for key in fields if key not in taken]
    found += [
        f"{key}: keyword without an option"
        for key, parameter in taken.items()
        if key not in fields and parameter.default is parameter.empty
    ]
    for key in fields.keys() & taken.keys():
        default, keyword = fields[key].get_default(call_default_factory=True), taken[key].default
        required = keyword is inspect.Parameter.empty
        empty = keyword is None and default in ([], {})
        if (
            not required
            and not fields[key].is_required()
            and not empty
            and plain(keyword) != plain(default)
        ):
            found.append(f"{key}: default {default!r} in a recipe, {keyword!r} as a keyword")
    return sorted(found)


@every_member
def test_options_are_the_keywords_with_the_same_defaults(table: Table, name: str) -> None:
    member = table.registry.get(name)
    options = table.registry.entry(name).options
    assert disagreements(options, member, elsewhere=table.elsewhere, given=table.given) == []


@every_member
def test_an_option_is_described_in_its_options_class_alone(table: Table, name: str) -> None:
    options, member = table.registry.entry(name).options, table.registry.get(name)
    fields = {key: field for key, field in options.model_fields.items() if key != "name"}
    assert [key for key, field in fields.items() if not field.description] == []
    documented = re.findall(r"^\s+(\w+): (.*)", inspect.getdoc(member) or "", re.MULTILINE)
    twice = [
        key
        for key, text in documented
        if key in fields and key != "architecture" and not text.startswith("see ")
    ]
    assert twice == []


@pytest.mark.parametrize("name", LLMS.names())
def test_families_of_language_models_share_one_options_class(name: str) -> None:
    """A family is data: everything that a recipe sets belongs to all of them."""
    assert LLMS.entry(name).options is LLMOptions
    assert isinstance(LLMS.get(name), LLMFamily)


class Wide(Options):
    name: str
    depth: int = 2
    tokens: list[str] = []
    extra: int = 1


class Narrow:
    def __init__(self, *, depth: int = 3, tokens: Sequence[str] = (), other: int) -> None: ...


class Passing(Narrow):
    def __init__(self, *, extra: int = 1, **options: Any) -> None: ...


def test_the_comparison_finds_each_kind_of_disagreement() -> None:
    compare = {"elsewhere": frozenset({"name"}), "given": frozenset()}
    assert disagreements(Wide, Narrow, **compare) == [
        "depth: default 2 in a recipe, 3 as a keyword",
        "extra: option without a keyword",
        "other: keyword without an option",
    ]
    assert disagreements(
        Wide, Passing, elsewhere=frozenset({"name"}), given=frozenset({"other"})
    ) == ["depth: default 2 in a recipe, 3 as a keyword"]
