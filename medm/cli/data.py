"""`medm data`: annotation files and their images checked before training or inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from medm.cli.console import note, out

if TYPE_CHECKING:
    from medm.data.base import AnyPipeline
    from medm.data.options import SourceOptions
    from medm.training.recipe import Recipe

LISTED = 20
"""Rows and files of grounded sources that are listed for each reason to leave them out."""

app = typer.Typer(
    help="Check, preview, cache and convert data before training or inference.",
    no_args_is_help=True,
)


@app.command()
def check(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Annotation files: JSON arrays or JSONL; tables and shards of pairs."),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder that image paths are relative to.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe: its data (where no files are given), its model's token lengths."
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Trained model, for token lengths and a preview.")
    ] = None,
    inference: Annotated[
        bool, typer.Option("--inference", help="The last reply may be missing.")
    ] = False,
    decode: Annotated[
        bool,
        typer.Option("--decode", help="Read every image and volume in full, not its header alone."),
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Look only at the first N records of each file.")
    ] = None,
    pipeline_name: Annotated[
        str,
        typer.Option(
            "--pipeline",
            help="Kind of records, where neither recipe nor model says it: see `medm list "
            "pipelines`.",
        ),
    ] = "conversations",
) -> None:
    """Name every bad record with its place and reason; count the good ones.

    Images and volumes are checked by their headers, each once; --decode reads them in full.
    With --recipe or --model also: token lengths, and one sample as the model sees it, with what is
    learned. The exit status is 1 when a record is bad or an annotation file cannot be read.
    """
    from medm.data.check import check as check_records
    from medm.data.limits import LengthLimit

    loaded = _load(recipe) if recipe else None
    sources = _sources(files or [], root, loaded)
    pipeline = _pipeline(loaded, model, inference=inference, name=pipeline_name)
    report = check_records(
        sources,
        pipeline,
        decode=decode,
        preview=pipeline.makes_examples,
        length_limit=LengthLimit(loaded.data.max_length, loaded.data.too_long) if loaded else None,
        limit=limit,
        progress=_show_progress,
    )
    for line in report.lines():
        out.print(line, markup=False)
    if report.media and not decode:
        note("images and volumes were checked by their headers; --decode reads them in full")
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def preview(
    file: Annotated[
        Path, typer.Argument(help="An image, a volume, or the folder of a DICOM series.")
    ],
    output: Annotated[Path, typer.Argument(help="PNG to write.")],
    fields: Annotated[
        list[str] | None,
        typer.Argument(
            help="field=value of the preprocessing, such as window=[-160,240] or series=largest ..."
        ),
    ] = None,
    branch: Annotated[
        Literal["image", "volume"] | None,
        typer.Option(
            help="What it is: 2-D or 3-D; found out without it where the name or the model says so."
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe whose model's preprocessing is used.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Trained model whose preprocessing is used.")
    ] = None,
    slices: Annotated[
        int, typer.Option(min=1, help="Most slices of a volume that are shown.")
    ] = 12,
    mask: Annotated[
        list[Path] | None,
        typer.Option(help="Mask file whose outline is drawn; may be given several times."),
    ] = None,
) -> None:
    """Draw what a model will see of one file: after window, orientation and size.

    Not for clinical use.

    Published preprocessing goes by name. Volumes: convention=medm-vl, m3d, medm-clip, astra,
    merlin. Images: convention=medsiglip-448, medgemma-896, raddino-518.
    """
    from medm.config import apply_overrides
    from medm.errors import RecipeError
    from medm.imaging import preprocess_from_dict
    from medm.imaging.options import changed
    from medm.imaging.preview import save_contact_sheet

    known = _preprocess(_load(recipe) if recipe else None, model)
    branch = branch or _kind_of(file, known)
    if known and branch not in known:
        raise RecipeError(f"--branch {branch}: the model has {', '.join(sorted(known))}")
    described = known[branch].model_dump() if known else {"kind": branch}
    wanted = preprocess_from_dict(changed(described, apply_overrides({}, fields or [])))
    save_contact_sheet(file, wanted, output, slices=slices, masks=mask or ())
    out.print(str(output), markup=False)


@app.command()
def cache(
    recipe: Annotated[
        str, typer.Argument(help="A file, or a name that `medm list recipes` prints.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value ...")] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that read and resample.  [default: by cores]"),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="Where volumes are resampled: cpu, or cuda, each process with a context of its "
            "own."
        ),
    ] = "cpu",
    shard: Annotated[
        str | None,
        typer.Option(
            help="Only a part of the files, as i/N with i from 0: one task of a job array.",
            metavar="i/N",
        ),
    ] = None,
    only_failed: Annotated[
        bool,
        typer.Option("--only-failed", help="Only the files that this shard failed at before."),
    ] = False,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", help="Write one manifest of the entries, after all shards; caches nothing."
        ),
    ] = False,
) -> None:
    """Fill the cache of a recipe (data.cache) before training.

    Every volume is read and resampled once.

    Started again, it resumes. The exit status is 1 when a file or record is bad; the others are
    cached all the same. Many machines: --shard in each task of a job array, then --merge.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from medm.cli.console import err
    from medm.data.cache_shards import fill_shard
    from medm.data.cached import fill, loader, media_cache
    from medm.data.owners import parse_shard
    from medm.data.records import Records
    from medm.data.volume_cache import MediaCache
    from medm.errors import RecipeError

    part = None if shard is None else parse_shard(shard)
    if merge and part is not None:
        raise typer.BadParameter("--merge takes no --shard: it is for the files of all shards")
    if only_failed and part is None:
        raise typer.BadParameter("--only-failed needs --shard, whose index lists what failed")
    read = _load(recipe, overrides or [])
    options = read.data.cache
    if options is None:
        raise RecipeError(
            f"{recipe}: no data.cache; name a folder, such as data.cache.dir=.cache/volumes"
        )
    if device != "cpu":
        from medm.inference.generator import pick_device

        device = str(pick_device(device))
    pipeline = _pipeline(read, None)
    prepared = {
        name: how for name, how in pipeline.preprocess.items() if how.kind in options.branches
    }
    sources = [Records([source], pipeline) for source in _sources([], None, read)]
    if merge:
        _merge_cache(sources, prepared, Path(options.dir))
        return
    columns = (TextColumn("volumes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as bar:
        task = bar.add_task("volumes", total=None)
        running: Any = {
            "workers": _cores() if workers is None else workers,
            "start": None if device == "cpu" else "spawn",
            "progress": lambda done, total: bar.update(task, completed=done, total=total),
        }
        if part is None:
            filled = fill(sources, prepared, loader(options, device=device), **running)
        else:
            stored = media_cache(options, device=device, evict=False)
            filled = fill_shard(sources, prepared, stored, part, only_failed=only_failed, **running)
    for error in filled.bad:
        out.print(str(error), markup=False)
    for message in filled.warnings:
        out.print(f"warning: {message}", markup=False)
    warned = f", {filled.num_warnings} warnings" if filled.num_warnings else ""
    entries, size = MediaCache(options.dir, 0).size()
    out.print(
        f"{filled.files} files, {filled.num_bad} bad{warned}; "
        f"{options.dir} holds {entries} entries, {size / 1e9:.2f} GB",
        markup=False,
    )
    if filled.num_bad:
        raise typer.Exit(1)


def _cores() -> int:
    """Return the cores that this process may use, which a batch system limits."""
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _merge_cache(sources: Sequence[Any], prepared: Mapping[str, Any], folder: Path) -> None:
    """Write the manifest of a cache, and list what is not in it."""
    from medm.data.cache_shards import FAILED, MANIFEST, merge_shards

    merged = merge_shards(sources, prepared, folder)
    for row in merged.failed[:LISTED]:
        place = row["record"]
        out.print(
            f"{place['file']}: record {place['index']}: {row.get('path', '')} {row['error']}",
            markup=False,
        )
    out.print(
        f"{folder / MANIFEST}: {merged.entries} files, {merged.bytes / 1e9:.2f} GB, "
        f"{len(merged.failed)} bad",
        markup=False,
    )
    if merged.failed:
        note(f"every bad one, with its reason: {folder / FAILED}")
        raise typer.Exit(1)


@app.command()
def answers(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="File to write: .json.")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Files of studies to TRAIN on, whose answers become the classes."),
    ] = None,
    maps: Annotated[
        Path | None,
        typer.Option(
            help="Folder of published lists (close_label2ans, open_label2ans), in place of files. "
            "They may hold answers of test questions too."
        ),
    ] = None,
) -> None:
    """Write the lists of closed and open answers that a model of kind blip chooses from.

    A recipe names the file as model.answers.file. Answers that differ in case, articles or
    punctuation alone are one class. Take training records alone: a list with answers of test
    questions tells the model what is asked there.
    """
    from medm.data.answers import branch_of, collect_answers, write_answers
    from medm.data.record_files import RecordFile
    from medm.data.studies import Studies
    from medm.errors import DataError
    from medm.tasks.answer_classes import AnswerMaps
    from medm.types import ANSWER_BRANCHES

    if bool(files) == (maps is not None):
        raise typer.BadParameter("name files of studies, or --maps FOLDER")
    if maps is not None:
        lists = AnswerMaps(maps).lists
        note("published lists may hold answers of test questions too")
    else:
        found: list[tuple[str, str]] = []
        for file in files or []:
            for index, record in enumerate(RecordFile(file)):
                try:
                    study = Studies().read(record, file=file, index=index)
                    if study.answer is not None:
                        branch = branch_of(study.answer_type or "")
                        found.append((ANSWER_BRANCHES[branch], study.answer))
                except DataError as error:
                    raise error.at(file=file, index=index) from None
        lists = collect_answers(found)
    write_answers(output, lists)
    out.print(
        f"{output}: {len(lists['closed'])} closed and {len(lists['open'])} open answers",
        markup=False,
    )
    note(f"train with them: medm train RECIPE model.answers.file={output}")


@app.command()
def triplets(
    file: Annotated[Path, typer.Argument(help="Annotation file of reports: JSON array or JSONL.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="File to write: .json or .jsonl.")],
    radgraph: Annotated[
        Path | None,
        typer.Option(
            help="RadGraph file whose triplets are taken, by the record's id or else its report; "
            "without it rules extract them."
        ),
    ] = None,
    field: Annotated[str, typer.Option(help="Field of a record that holds the report.")] = "report",
) -> None:
    """Add triplets, [finding, relation, location], to the records of reports.

    The rules read English reports of the chest, offline. Records without a report stay as they are.
    """
    from medm.data.record_files import RecordFile
    from medm.data.triplets import TripletCounts, read_radgraph, with_triplets
    from medm.data.writing import write_records

    counts = TripletCounts()
    known = read_radgraph(radgraph) if radgraph is not None else None
    records = with_triplets(
        RecordFile(file), file=file, report_field=field, radgraph=known, counts=counts
    )
    write_records(output, records)
    out.print(
        f"{output}: {counts.records} records, {counts.reports} reports, {counts.triplets} "
        f"triplets; {counts.empty} reports without any",
        markup=False,
    )
    if counts.unknown:
        listed = ", ".join(counts.unknown[:LISTED])
        more = ", ..." if len(counts.unknown) > LISTED else ""
        out.print(
            f"warning: {radgraph} has {len(counts.unknown)} of the reports neither by id nor by "
            f"text: {listed}{more}",
            markup=False,
        )
    note(f"look at them: medm data check {output} --pipeline studies")


@app.command()
def shards(
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Manifest to write: NAME.shards.json.")
    ],
    files: Annotated[
        list[Path],
        typer.Argument(help="Annotation files of pairs (JSON, JSONL, CSV); or tar shards."),
    ],
    root: Annotated[
        Path | None,
        typer.Option(help="Folder that image paths are relative to, or that the shards lie in."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples of a shard.")] = 1000,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad records out; otherwise stop at one.")
    ] = False,
) -> None:
    """Write image-text pairs into WebDataset tar shards, and their manifest with checksums.

    Where the files are tar shards already, or folders of them, only the manifest and its index
    are written, and the shards stay as they are. A recipe names the manifest as `path` of a source.
    The exit status is 1 where a record was left out or a shard is damaged.
    """
    from medm.data.options import SourceOptions
    from medm.data.shard_writing import shards_in, write_manifest, write_shards

    if existing := shards_in(files):
        written = write_manifest(
            output,
            existing,
            root=root,
            progress=lambda done, total: note(f"{done} of {total} shards"),
        )
    else:
        written = write_shards(
            output,
            [SourceOptions(path=str(file), root=str(root) if root else None) for file in files],
            samples=samples,
            bad_records="skip" if skip_bad else "stop",
            progress=_show_progress,
        )
    for error in written.bad:
        out.print(str(error), markup=False)
    out.print(
        f"{output}: shards {written.shards}, samples {written.samples}, bad {written.num_bad}",
        markup=False,
    )
    note(f"check them: medm data check {output} --pipeline pairs --decode")
    if written.num_bad:
        raise typer.Exit(1)


def _kind_of(file: Path, known: Mapping[str, Any]) -> Literal["image", "volume"]:
    """Return the kind of a file: the model's if it takes one kind, else by the file's name."""
    if len(known) == 1:
        return known[next(iter(known))].kind
    flat = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom")
    return "image" if file.suffix.lower() in flat and not file.is_dir() else "volume"


def _load(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    from medm.cli.recipes import find
    from medm.training.recipe import load_recipe

    return load_recipe(find(recipe), overrides)


def _sources(files: list[Path], root: Path | None, recipe: Recipe | None) -> list[SourceOptions]:
    """Return the files that were named as sources, else the sources of the recipe."""
    from medm.data.options import SourceOptions

    if files:
        return [SourceOptions(path=str(file), root=str(root) if root else None) for file in files]
    sources = [*recipe.data.train, *recipe.data.eval] if recipe else []
    if not sources:
        raise typer.BadParameter("name an annotation file, or a recipe that has data")
    return sources


def _pipeline(
    recipe: Recipe | None,
    model: Path | None,
    *,
    inference: bool = False,
    name: str = "conversations",
) -> AnyPipeline:
    """Return the data pipeline of a model, with its processor.

    Without a model, records of the named pipeline are read and files are checked.
    """
    from medm.data.pipelines import PIPELINES, pipeline_for

    if model is not None:
        from medm.models import kind_of_config, load_config, load_processor

        folder = str(model)
        return pipeline_for(
            kind_of_config(load_config(folder)), load_processor(folder), inference=inference
        )
    if recipe is None:
        return PIPELINES.get(name)(inference=inference)
    from medm.models import kind_of, processor_of

    processor = processor_of(recipe.model, init_from=_trained(recipe))
    return pipeline_for(kind_of(recipe.model), processor, inference=inference)


def _preprocess(recipe: Recipe | None, model: Path | None) -> dict[str, Any]:
    """The preprocessing of a model by branch; empty without one. No language model is needed."""
    from medm.models import load_processor, preprocess_of

    if model is not None:
        return dict(load_processor(str(model)).preprocess)
    return preprocess_of(recipe.model, init_from=_trained(recipe)) if recipe is not None else {}


def _trained(recipe: Recipe) -> str | None:
    """The folder that a recipe starts from, where that stage is trained already."""
    return (
        recipe.init_from
        if recipe.init_from is not None and Path(recipe.init_from).is_dir()
        else None
    )


def _show_progress(done: int, total: int) -> None:
    note(f"{done} of {total} records")
