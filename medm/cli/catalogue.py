"""Lists of parts and recipes: `medm list` and `medm recipes`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from medm.cli.console import out, rows

if TYPE_CHECKING:
    from medm.registry import Entry, Registry

REGISTRIES = {
    "encoders": "medm.encoders:ENCODERS",
    "text_encoders": "medm.text_encoders:TEXT_ENCODERS",
    "connectors": "medm.connectors:CONNECTORS",
    "llms": "medm.llms:LLMS",
    "heads": "medm.heads:HEADS",
    "models": "medm.models:MODELS",
    "pipelines": "medm.data.pipelines:PIPELINES",
    "objectives": "medm.objectives:OBJECTIVES",
    "tasks": "medm.tasks:TASKS",
    "pair_sources": "medm.tasks.pair_sources:PAIR_SOURCES",
    "mask_sources": "medm.tasks.mask_sources:MASK_SOURCES",
    "metrics": "medm.metrics:METRICS",
}
"""What `medm list` prints: kind, and where its table is."""

recipes = typer.Typer(help="Recipes that come with medm, and your own.", no_args_is_help=True)


def registry(kind: str) -> Registry[Any]:
    """The table of one kind of part. Raises `UnknownNameError`."""
    import importlib

    from medm.errors import UnknownNameError

    if kind not in REGISTRIES:
        raise UnknownNameError("kind of part", kind, [*REGISTRIES, "recipes"])
    module, _, attribute = REGISTRIES[kind].partition(":")
    return getattr(importlib.import_module(module), attribute)


def list_parts(
    kind: Annotated[
        str | None, typer.Argument(help=f"One of: {', '.join([*REGISTRIES, 'recipes'])}.")
    ] = None,
    name: Annotated[str | None, typer.Argument(help="One part: its options.")] = None,
) -> None:
    """Print every part that a recipe can name, with one line on it; or the options of one part."""
    if kind is not None and name is not None:
        _print_options(registry(kind).entry(name))
        return
    for each in [kind] if kind else [*REGISTRIES, "recipes"]:
        if kind is None:
            out.print(f"\n{each}", style="bold underline")
        if each == "recipes":
            _print_recipes()
        else:
            rows((entry.name, entry.summary) for entry in registry(each).entries())


@recipes.command("list")
def list_recipes() -> None:
    """Print the recipes that come with medm."""
    _print_recipes()


def _print_recipes() -> None:
    from medm.cli.recipes import shipped, summary

    rows((name, summary(path)) for name, path in shipped().items())


def _print_options(entry: Entry) -> None:
    from medm.cli.reference import fields

    out.print(f"{entry.name}: {entry.summary}\n")
    rows(
        [(f.key, f.type, f.default, f.text) for f in fields(entry.options)],
        header=["option", "type", "default", ""],
    )


@recipes.command("show")
def show(
    recipe: Annotated[
        str, typer.Argument(help="A file, or a name that `medm list recipes` prints.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value ...")] = None,
) -> None:
    """Check a recipe and print it as medm understands it, defaults included."""
    from medm.cli.recipes import find
    from medm.training.recipe import dump, load_recipe, resolved

    out.print(dump(resolved(load_recipe(find(recipe), overrides or []))), end="", markup=False)
