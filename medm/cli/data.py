"""`medm data`: annotation files looked at before anything is trained or answered."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from medm.cli.console import note, out

if TYPE_CHECKING:
    from medm.data.options import SourceOptions
    from medm.training.recipe import Recipe

app = typer.Typer(help="Look at annotation files before training or inference.", no_args_is_help=True)


@app.command()
def check(
    files: Annotated[list[Path] | None, typer.Argument(help="Annotation files: JSON arrays or JSONL.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder that image paths are relative to.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe: its data (where no files are given), its model's token lengths.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Trained model, for token lengths and a preview.")] = None,
    inference: Annotated[bool, typer.Option("--inference", help="The last reply may be missing.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Read every image in full, not its header alone.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Look at the first so many records of each file.")] = None,
) -> None:
    """Name every bad record with its place and reason; count the good ones.

    With --recipe or --model also: token lengths, and one sample as the model sees it, with what is learned.
    The exit status is 1 when a record is bad.
    """
    from medm.data.check import check as check_records

    loaded = _load(recipe) if recipe else None
    sources = _sources(files or [], root, loaded)
    settings = _settings(loaded, model)
    report = check_records(
        sources, inference=inference, decode=decode, limit=limit, progress=_show_progress, **settings
    )
    for line in report.lines():
        out.print(line, markup=False)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def preview(
    file: Annotated[Path, typer.Argument(help="An image, a volume, or the folder of a DICOM series.")],
    output: Annotated[Path, typer.Argument(help="PNG to write.")],
    fields: Annotated[
        list[str] | None, typer.Argument(help="field=value of the preprocessing, such as window=[-160,240] ...")
    ] = None,
    branch: Annotated[Literal["image", "volume"], typer.Option(help="What it is: 2-D or 3-D.")] = "image",
    recipe: Annotated[str | None, typer.Option(help="Recipe whose model's preprocessing is used.")] = None,
    model: Annotated[Path | None, typer.Option(help="Trained model whose preprocessing is used.")] = None,
    slices: Annotated[int, typer.Option(min=1, help="Most slices of a volume that are shown.")] = 12,
) -> None:
    """Draw what a model will see of one file: after window, orientation and size. Not for clinical use."""
    from medm.config import apply_overrides
    from medm.errors import RecipeError
    from medm.imaging import preprocess_from_dict
    from medm.imaging.preview import save_contact_sheet

    known = _settings(_load(recipe) if recipe else None, model).get("preprocess", {})
    if known and branch not in known:
        raise RecipeError(f"--branch {branch}: the model has {', '.join(sorted(known))}")
    described = known[branch].model_dump() if known else {"kind": branch}
    save_contact_sheet(file, preprocess_from_dict(apply_overrides(described, fields or [])), output, slices=slices)
    out.print(str(output), markup=False)


def _load(recipe: str) -> Recipe:
    from medm.cli.recipes import find
    from medm.training.recipe import load_recipe

    return load_recipe(find(recipe))


def _sources(files: list[Path], root: Path | None, recipe: Recipe | None) -> list[SourceOptions]:
    """What to look at: the files that were named, else the recipe's."""
    from medm.data.options import SourceOptions

    if files:
        return [SourceOptions(path=str(file), root=str(root) if root else None) for file in files]
    sources = [*recipe.data.train, *recipe.data.eval] if recipe else []
    if not sources:
        raise typer.BadParameter("name an annotation file, or a recipe that has data")
    return sources


def _settings(recipe: Recipe | None, model: Path | None) -> dict[str, Any]:
    """What a check learns from a model: its preprocessing, its encoder, its limits. Empty without one."""
    if recipe is None and model is None:
        return {}
    processor = _saved_processor(model) if model is not None else _processor_of(recipe)
    limits = {"max_length": recipe.data.max_length, "too_long": recipe.data.too_long} if recipe else {}
    return {
        "preprocess": processor.preprocess,
        "encode": processor.encode,
        "to_text": processor.tokenizer.decode,
        "placeholder_ids": frozenset(processor.placeholder_ids.values()),
        **limits,
    }


def _saved_processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    from medm.errors import CheckpointError

    if not (folder / "processor_config.json").is_file():
        raise CheckpointError(f"{folder}: not a model folder; expected processor_config.json in it")
    try:
        return AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: its processor cannot be opened ({error})") from None


def _processor_of(recipe: Recipe | None) -> Any:
    from medm.errors import RecipeError
    from medm.models.lvlm.build import resolve

    if recipe is None or recipe.model.kind != "lvlm":
        raise RecipeError("--recipe: token lengths are known for models of kind 'lvlm'; leave --recipe out")
    return resolve(recipe.model)[1]


def _show_progress(done: int, total: int) -> None:
    note(f"{done} of {total} records")
