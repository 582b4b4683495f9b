"""Lists of parts and recipes: `medm list` and `medm recipes`."""

from __future__ import annotations

from pathlib import Path
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
    "knowledge": "medm.knowledge:KNOWLEDGE",
    "models": "medm.models:MODELS",
    "pipelines": "medm.data.pipelines:PIPELINES",
    "objectives": "medm.objectives:OBJECTIVES",
    "tasks": "medm.tasks:TASKS",
    "pair_sources": "medm.tasks.pair_sources:PAIR_SOURCES",
    "study_sources": "medm.tasks.study_sources:STUDY_SOURCES",
    "mask_sources": "medm.tasks.mask_sources:MASK_SOURCES",
    "metrics": "medm.metrics:METRICS",
}
"""What `medm list` prints: kind, and where its table is."""

CONCEPTS = "concepts"
"""What `medm list` prints of a model folder."""

recipes = typer.Typer(help="Recipes that come with medm, and your own.", no_args_is_help=True)


def registry(kind: str) -> Registry[Any]:
    """The table of one kind of part. Raises `UnknownNameError`."""
    import importlib

    from medm.errors import UnknownNameError

    if kind not in REGISTRIES:
        raise UnknownNameError("kind of part", kind, [*REGISTRIES, "recipes", CONCEPTS])
    module, _, attribute = REGISTRIES[kind].partition(":")
    return getattr(importlib.import_module(module), attribute)


def list_parts(
    kind: Annotated[
        str | None,
        typer.Argument(help=f"One of: {', '.join([*REGISTRIES, 'recipes', CONCEPTS])}."),
    ] = None,
    name: Annotated[str | None, typer.Argument(help="One part: its options.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="With `concepts`: the model folder whose masks were named in training."),
    ] = None,
) -> None:
    """Print every part that a recipe can name, with one line on it; or the options of one part.

    `medm list concepts --model DIR` prints what a model was trained to name and segment.
    """
    if (kind == CONCEPTS) != (model is not None):
        raise typer.BadParameter("`medm list concepts --model DIR` needs both words")
    if model is not None:
        _print_concepts(model)
        return
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


def _print_concepts(model: Path) -> None:
    from medm.errors import CheckpointError
    from medm.models.provenance import read_concepts

    if not (model / "config.json").is_file():
        raise CheckpointError(f"{model}: no config.json in it; expected a model folder")
    found = read_concepts(model)
    if found is None:
        raise CheckpointError(
            f"{model}: no concepts.json in it. It is written by a training on records with masks; "
            "models without masks, imported weights and folders of an earlier medm have none"
        )
    rows(
        [
            (phrase, str(entry["records"]), str(entry.get("absent", 0)))
            for phrase, entry in found["concepts"].items()
        ],
        header=["phrase", "records", "of them absent"],
    )
    out.print(
        f"\n{len(found['concepts'])} phrases of the masks of {found.get('records', 0)} records; "
        f"{found.get('other_phrases', 0)} others, each in fewer than {found.get('min_records')} "
        f"records, and {found.get('unnamed_records', 0)} records with a mask without a phrase",
        markup=False,
    )


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
