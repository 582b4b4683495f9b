"""`medm data split` and `medm data leaks`: splits without a patient in two of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medm.cli.console import note, out

if TYPE_CHECKING:
    from medm.data.leaks import RecordFacts

_Root = Annotated[
    Path | None, typer.Option(help="Folder of the paths.  [default: that of each file]")
]
_Pipeline = Annotated[
    str | None,
    typer.Option(help="Kind of records.  [default: the one that the first record shows]"),
]
_SkipContent = Annotated[
    bool, typer.Option("--skip-content", help="Compare files by their paths alone.")
]
_NearDuplicates = Annotated[
    bool,
    typer.Option(
        "--near-duplicates", help="Also look for images that look the same; each is decoded."
    ),
]


def split(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Records: JSON or JSONL.")],
    by: Annotated[
        str, typer.Option(help="Field whose equal values stay together: patient, study, ...")
    ],
    val: Annotated[float, typer.Option(min=0, max=0.9, help="Fraction of the records.")] = 0.1,
    test: Annotated[float, typer.Option(min=0, max=0.9, help="Fraction of the records.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the order of the groups.")] = 0,
    root: _Root = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the splits.  [default: that of FILE]")
    ] = None,
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing",
            help="A record without the field stays with those of its patient and study.",
        ),
    ] = False,
    skip_content: _SkipContent = False,
    near_duplicates: _NearDuplicates = False,
    pipeline: _Pipeline = None,
) -> None:
    """Split records into NAME.train, NAME.val and NAME.test, with no group in two of them.

    Groups that share a file, or the content of one, stay together. NAME.split.json counts what
    the splits still have in common, and duplicates.
    """
    write_split(
        file,
        by=by,
        val=val,
        test=test,
        seed=seed,
        root=root,
        output=output,
        allow_missing=allow_missing,
        contents=not skip_content,
        near_duplicates=near_duplicates,
        pipeline=pipeline,
    )


def write_split(
    file: Path,
    *,
    by: str,
    val: float,
    test: float,
    seed: int,
    root: Path | None = None,
    output: Path | None = None,
    allow_missing: bool = False,
    contents: bool = True,
    near_duplicates: bool = False,
    pipeline: str | None = None,
) -> None:
    """Split a file and print what came of it; see `split_file`."""
    from medm.data.leaks import LEAKS
    from medm.data.splitting import split_file

    done = split_file(
        file,
        by=by,
        val=val,
        test=test,
        seed=seed,
        root=root,
        output=output,
        allow_missing=allow_missing,
        contents=contents,
        near_duplicates=near_duplicates,
        pipeline=pipeline,
    )
    for name, path in done.files.items():
        out.print(f"{path}: {done.counts[name]} records, {done.groups[name]} by {by}", markup=False)
    if done.missing:
        out.print(
            f"{done.missing} records without {by!r}, each on its own or with its patient or study",
            markup=False,
        )
    if done.joined:
        what = "file or content" + (", or patient or study" if done.missing else "")
        out.print(f"{done.joined} groups stay with another one: same {what}")
    total = sum(done.counts.values())
    for name, wanted in done.large.items():
        out.print(
            f"warning: {name} has {done.counts[name] / total:.0%} of the records, {wanted:.0%} "
            f"were asked for: no smaller set of whole groups by {by!r} was found",
            markup=False,
        )
    for kind, shared in done.shared.items():
        word = "leak" if kind in LEAKS else "look at"
        out.print(f"{word}: in two splits: {shared.line()}", markup=False)
    for shared in done.duplicates.values():
        out.print(f"duplicates: {shared.line()}", markup=False)
    if done.unreadable:
        out.print(f"{done.unreadable} files could not be compared; medm data check names them")
    note(f"report: {done.report}")


def leaks(
    files: Annotated[list[Path], typer.Argument(help="Two or more splits: JSON or JSONL.")],
    root: _Root = None,
    skip_content: _SkipContent = False,
    near_duplicates: _NearDuplicates = False,
    pipeline: _Pipeline = None,
) -> None:
    """Name what splits have in common: patients, studies, files, contents; also equal texts.

    The exit status is 1 when two splits share a patient, a study, a file or its content.
    """
    from medm.data.leaks import LEAKS, find_shared, read_contents, read_facts

    if len(files) < 2:
        raise typer.BadParameter("expected two files or more, one a split")
    splits: dict[str, list[RecordFacts]] = {
        str(file): read_facts(file, root=root, pipeline=pipeline) for file in files
    }
    facts = [record for records in splits.values() for record in records]
    contents = read_contents(facts, contents=not skip_content, near_duplicates=near_duplicates)
    found = find_shared(splits, contents)
    for kind, shared in found.items():
        word = "leak" if kind in LEAKS else "look at"
        out.print(f"{word}: {shared.line()}", markup=False)
    without = sum(record.patient is None for record in facts)
    if without:
        note(f"{without} of {len(facts)} records have no field 'patient' to compare")
    if contents.unreadable:
        out.print(f"{contents.unreadable} files could not be compared; medm data check names them")
    if any(kind in LEAKS for kind in found):
        raise typer.Exit(1)
    out.print(f"no leak between {len(files)} files of {len(facts)} records", markup=False)
