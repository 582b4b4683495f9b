"""`medm data convert`: published sets, and files of one's own, to records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer
from typer.core import TyperGroup

from medm.cli.console import note, out, rows

if TYPE_CHECKING:
    from medm.data.convert.dicom import Reports
    from medm.data.convert.rows import Row
    from medm.data.left_out import LeftOut
    from medm.imaging.dicom_index import DicomIndex
    from medm.tasks.mask_sources.base import MaskSet
    from medm.tasks.pair_sources.base import PairSource
    from medm.tasks.study_sources.base import StudySource
    from medm.types import JsonObject

LISTED = 20
"""Rows, files and series that are listed for each reason to leave them out."""
_DEFAULT = "published"
"""The command that is meant where none is named."""

Output: TypeAlias = Annotated[
    Path, typer.Argument(metavar="OUT", help="File to write: .json or .jsonl.")
]
To: TypeAlias = Annotated[
    Literal["conversations", "pairs", "studies"],
    typer.Option(help="Form of the records; see `medm list pipelines`."),
]
Prompt: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        help="Question of conversations; several are a pool. {classes} stands for the classes of "
        "a folder."
    ),
]
Prompts: TypeAlias = Annotated[
    Path | None, typer.Option(help="File of further questions, one a line.")
]
Seed: TypeAlias = Annotated[
    int | None,
    typer.Option(
        help="Draw the question of each record from the pool; without it all have the first."
    ),
]
Salt: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--salt-file",
        help="Key of the pseudonyms, 16 bytes or more; with the same one further runs give the "
        "same names. Without it they are random.",
    ),
]


class _Sources(TyperGroup):
    """The sources; what begins with no name of one belongs to `published`, as before they had
    names.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        from medm.errors import suggest

        own = {*self.commands, *ctx.help_option_names}
        if args and args[0] not in own:
            if not any(word.partition("=")[0] == "--task" for word in args):
                ctx.fail(
                    f"expected a source{suggest(args[0], self.commands)}, or --task for a "
                    "published set"
                )
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Sources,
    help="Turn published sets, tables, folders, DICOM and rows of other programs into records.",
    no_args_is_help=True,
)


@app.command()
def published(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="File to write: .json or .jsonl.")],
    task: Annotated[
        str,
        typer.Option(
            help="A benchmark that `medm list tasks` prints (m3d-cap, m3d-vqa-closed ...), a "
            "source of image-text pairs that `medm list pair_sources` prints (unimed/chexpert "
            "...), one of studies that `medm list study_sources` prints (studies/annotation ...), "
            "or one of grounded records that `medm list mask_sources` prints (biomedparse, "
            "decathlon ...). A name of both a benchmark and a grounded source is the latter."
        ),
    ],
    data: Annotated[Path, typer.Option(help="Folder of the data as it is distributed.")],
    split: Annotated[str, typer.Option(help="Which split.")] = "train",
    seed: Annotated[
        int | None,
        typer.Option(
            help="Draw each instruction, and the replies of grounded sources, from their own "
            "wordings; without it all are worded alike."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N records.")] = None,
    exclude: Annotated[
        Path | None,
        typer.Option(
            help="Pairs: files that are left out, such as the test images of a benchmark. One path "
            "a line, or the column Path or image of a CSV."
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="Studies: key=value of the source, such as uncertain=u-one; may be repeated."
        ),
    ] = None,
) -> None:
    """Turn a published data folder into records to train on; the word `published` may be left out.

    They are conversations, with masks or regions where the source has them, image-text pairs, or
    studies.

    Files stay where they are.

    Paths in the records are relative to the folder, which is the `root` of the source in a recipe.
    Rows without a file or a text are left out, counted and named, as are files without a row.
    """
    from itertools import islice

    from medm.data.writing import write_records
    from medm.tasks import TASKS
    from medm.tasks.base import task_to_records
    from medm.tasks.mask_sources import MASK_SOURCES
    from medm.tasks.pair_sources import PAIR_SOURCES
    from medm.tasks.study_sources import STUDY_SOURCES

    if task in STUDY_SOURCES or task.partition("/")[0] == "studies":
        if seed is not None or exclude is not None:
            raise typer.BadParameter("--seed and --exclude are not for studies")
        _convert_studies(output, STUDY_SOURCES.get(task), data, split, limit, option or [])
        return
    if option:
        raise typer.BadParameter("--option is for studies")
    families = {name.partition("/")[0] for name in MASK_SOURCES.names() if "/" in name}
    if task in MASK_SOURCES or task.partition("/")[0] in families:
        if exclude is not None:
            raise typer.BadParameter("--exclude is for image-text pairs")
        _convert_masks(output, MASK_SOURCES.get(task), data, split, seed, limit)
        return
    if "/" in task or task in PAIR_SOURCES:
        if seed is not None:
            raise typer.BadParameter("--seed is for questions; captions are drawn in training")
        _convert_pairs(output, PAIR_SOURCES.get(task), data, split, limit, exclude)
        return
    if exclude is not None:
        raise typer.BadParameter("--exclude is for image-text pairs")
    options = TASKS.entry(task).options
    if needed := [
        name
        for name, field in options.model_fields.items()
        if field.is_required() and name != "name"
    ]:
        raise typer.BadParameter(
            f"task {task!r} needs {', '.join(needed)}: its file is in the training format already"
        )
    records = task_to_records(TASKS.get(task)(), data, split, seed=seed)
    count = write_records(output, islice(records, limit))
    out.print(f"{output}: {count} records of {task}, {split}", markup=False)
    note(f"look at them: medm data check {output} --root {data}")


def _convert_studies(
    output: Path,
    source_class: type[StudySource],
    data: Path,
    split: str,
    limit: int | None,
    options: Sequence[str],
) -> None:
    """Write a source of studies, say what was left out and which patients other splits have."""
    from itertools import islice

    from medm.config import parse_value
    from medm.data.left_out import LeftOut
    from medm.data.writing import write_records

    given = {}
    for item in options:
        key, equals, value = item.partition("=")
        if not equals:
            raise typer.BadParameter(f"--option {item!r}: expected key=value")
        given[key] = parse_value(value)
    source, left_out = source_class.with_options(given), LeftOut()
    records = source.records(data, split, left_out=left_out)
    count = write_records(output, islice(records, limit))
    out.print(f"{output}: {count} studies of {source.source}, {split}", markup=False)
    for line in left_out.lines():
        out.print(line, markup=False)
    for other, patients in source.shared_patients(data, split).items():
        out.print(
            f"warning: {len(patients)} patients of {split} are in {other}, too, so that scores of "
            "one are too good after training on the other",
            markup=False,
        )
    note(f"look at them: medm data check {output} --pipeline studies --root {data}")


def _convert_masks(
    output: Path,
    source: MaskSet,
    data: Path,
    split: str,
    seed: int | None,
    limit: int | None,
) -> None:
    """Write a source of grounded records, and list what was left out."""
    from itertools import islice

    from medm.data.left_out import LeftOut
    from medm.data.writing import write_records

    left_out = LeftOut(keep=LISTED)
    records = source.records(data, split, left_out=left_out, seed=seed)
    count = write_records(output, islice(records, limit))
    out.print(f"{output}: {count} records of {source.source}, {split}", markup=False)
    for line in left_out.lines():
        out.print(line, markup=False)
    note(f"look at them: medm data check {output} --root {data}")


def _convert_pairs(
    output: Path,
    source: PairSource,
    data: Path,
    split: str,
    limit: int | None,
    exclude: Path | None,
) -> None:
    """Write a source of pairs, and say which rows were left out."""
    from itertools import islice

    from medm.data.left_out import LeftOut
    from medm.data.writing import write_records
    from medm.tasks.pair_sources.base import read_paths

    left_out = LeftOut()
    excluded = read_paths(exclude) if exclude is not None else []
    records = source.records(data, split, left_out=left_out, exclude=excluded)
    count = write_records(output, islice(records, limit))
    out.print(f"{output}: {count} pairs of {source.source}, {split}", markup=False)
    for line in left_out.lines():
        out.print(line, markup=False)
    if exclude is not None and not left_out.counts.get("excluded"):
        out.print(f"warning: none of the {len(excluded)} paths of {exclude} is in the set")
    note(f"look at them: medm data check {output} --pipeline pairs --root {data}")


@app.command("csv")
def table(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV or TSV with a header row.")],
    output: Output,
    image_column: Annotated[
        list[str] | None, typer.Option(help="Paths of images; several columns: several images.")
    ] = None,
    volume_column: Annotated[list[str] | None, typer.Option(help="Paths of volumes.")] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Report or caption, the reply to a question of the pool.")
    ] = None,
    question_column: Annotated[str | None, typer.Option(help="A question for each row.")] = None,
    answer_column: Annotated[
        str | None, typer.Option(help="Its reply; without it the records are for inference.")
    ] = None,
    label_columns: Annotated[
        str | None,
        typer.Option(
            help="Findings of studies, by commas: 1, 0, or blank for unknown. For pairs one "
            "column, the class."
        ),
    ] = None,
    id_column: Annotated[str | None, typer.Option(help="Name of the record.")] = None,
    patient_column: Annotated[
        str | None, typer.Option(help="Patient; a pseudonym is written, to split by.")
    ] = None,
    to: To = "conversations",
    prompt: Prompt = None,
    prompts: Prompts = None,
    seed: Seed = None,
    root: Annotated[
        Path | None,
        typer.Option(help="Folder that the paths are relative to.  [default: that of FILE]"),
    ] = None,
    salt_file: Salt = None,
) -> None:
    """Turn a table into records, a row each.

    Rows without a file or a text are left out, counted and named by their number from 0. Cells
    are never printed.
    """
    from medm.data.convert.tables import TableColumns, table_rows
    from medm.data.left_out import LeftOut
    from medm.data.tables import TableFile
    from medm.imaging.pseudonyms import Pseudonyms, read_salt

    columns = TableColumns(
        image=image_column or [],
        volume=volume_column or [],
        text=text_column,
        question=question_column,
        answer=answer_column,
        labels=[name.strip() for name in (label_columns or "").split(",") if name.strip()],
        id=id_column,
        patient=patient_column,
    )
    left_out, base = LeftOut(keep=LISTED), root or file.parent
    found = table_rows(
        TableFile(file),
        columns,
        root=base,
        pseudonyms=Pseudonyms(read_salt(salt_file)),
        left_out=left_out,
        pairs=to == "pairs",
    )
    _write(output, found, file, to, left_out, prompt, prompts, seed, root=base)


@app.command()
def folder(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of images or volumes.")],
    output: Output,
    answers: Annotated[
        Literal["texts", "classes", "none"] | None,
        typer.Option(
            help="What is learned: the text beside each file (a.png, a.txt), the class by its "
            "first folder, or nothing.  [default: what the folder has]"
        ),
    ] = None,
    kind: Annotated[
        Literal["image", "volume"] | None,
        typer.Option(help="Only images, or only volumes; a .npy file may be either."),
    ] = None,
    to: To = "conversations",
    prompt: Prompt = None,
    prompts: Prompts = None,
    seed: Seed = None,
) -> None:
    """Turn a folder of images or volumes into records, a file each.

    A folder of DICOM files (.dcm) is a volume; for studies and reports see `dicom`.
    """
    from medm.data.convert.folders import answers_of, class_names, folder_files, folder_rows
    from medm.data.left_out import LeftOut

    files = folder_files(source, ["image", "volume"] if kind is None else [kind])
    answers = answers or answers_of(source, files)
    left_out = LeftOut(keep=LISTED)
    note(f"answers: {answers}; {len(files)} files")
    classes = class_names(files) if answers == "classes" else []
    found = folder_rows(source, files, answers, left_out=left_out)
    _write(output, found, source, to, left_out, prompt, prompts, seed, root=source, classes=classes)


@app.command()
def dicom(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="DICOM files at any depth.")],
    output: Output,
    reports: Annotated[
        Path | None,
        typer.Option(help="Table of reports; without it the records are questions for inference."),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Its column of reports.")] = "report",
    join: Annotated[
        str | None,
        typer.Option(
            help="DICOM keyword to join by.  [default: AccessionNumber, StudyInstanceUID or "
            "SeriesInstanceUID, the first that is a column]"
        ),
    ] = None,
    join_column: Annotated[
        str | None, typer.Option(help="Column with its values.  [default: named as the keyword]")
    ] = None,
    per: Annotated[
        Literal["series", "study", "largest"],
        typer.Option(
            help="A record for each series, each study with all its series, or the series of each "
            "study with the most slices."
        ),
    ] = "series",
    min_slices: Annotated[int, typer.Option(min=2, help="Fewest slices of a volume.")] = 8,
    keep_tag: Annotated[
        list[str] | None,
        typer.Option(help="DICOM keyword whose value is written; may be given several times."),
    ] = None,
    val: Annotated[
        float, typer.Option(min=0, max=0.9, help="Also split: this fraction, by patient.")
    ] = 0.0,
    to: To = "conversations",
    prompt: Prompt = None,
    prompts: Prompts = None,
    seed: Seed = None,
    salt_file: Salt = None,
) -> None:
    """Turn the series of DICOM studies into records, joined to a table of reports.

    Every series is listed in NAME.series.csv beside OUT, with the reason where it is not used. Of
    the headers nothing is written but pseudonyms of patient and study, and what --keep-tag names.
    """
    from medm.data.convert.dicom import (
        check_keywords,
        open_reports,
        study_rows,
        write_series_list,
    )
    from medm.data.left_out import LeftOut
    from medm.imaging.dicom_index import index_series
    from medm.imaging.pseudonyms import Pseudonyms, read_salt

    keep = keep_tag or []
    check_keywords(keep)
    table = None
    if reports is not None:
        table = open_reports(reports, text=text_column, element=join, column=join_column)
    elif join or join_column:
        raise typer.BadParameter("--join and --join-column are for --reports")
    index = index_series(
        source,
        min_slices=min_slices,
        uids_in_paths="SeriesInstanceUID" in keep,
        progress=lambda done: note(f"{done} files") if done % 5000 == 0 else None,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    listing = output.with_name(f"{output.stem}.series.csv")
    write_series_list(listing, index)
    _show_series(index)
    note(f"all series: {listing}")
    left_out = LeftOut(keep=LISTED)
    found = study_rows(
        index,
        per=per,
        reports=table,
        keep=keep,
        pseudonyms=Pseudonyms(read_salt(salt_file)),
        left_out=left_out,
    )
    without_patient = 0

    def counted() -> Iterator[tuple[int, Row]]:
        nonlocal without_patient
        for number, row in found:
            without_patient += "patient" not in row.extra
            yield number, row

    _write(output, counted(), source, to, left_out, prompt, prompts, seed, root=source)
    if table is not None:
        _show_unjoined(table)
    if val:
        from medm.cli.split import write_split
        from medm.errors import DataError

        if without_patient:
            raise DataError(
                f"{without_patient} records are of files without PatientID: there is no split "
                f"by patient; medm data split {output} --by study --val {val:g} --root {source}",
                file=output,
            )
        write_split(output, by="patient", val=val, test=0.0, seed=seed or 0, root=source)


@app.command("rows")
def foreign(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Rows in the form of Alpaca, ms-swift (query, response), ShareGPT or OpenAI; or a "
            "registry of sources in the manner of LLaMA-Factory's dataset_info.json.",
        ),
    ],
    output: Output,
    source: Annotated[
        str | None, typer.Option(help="Source of a registry; FILE is the registry then.")
    ] = None,
) -> None:
    """Turn rows of other programs into conversations.

    What medm does not train (preferences, tools, video, audio) is left out and named. Nothing is
    downloaded.
    """
    from medm.data.convert.foreign import foreign_records, plain_source, registered_source
    from medm.data.left_out import LeftOut

    described = plain_source(file) if source is None else registered_source(file, source)
    left_out = LeftOut(keep=LISTED)
    count = _written(output, foreign_records(described, left_out=left_out), left_out)
    out.print(f"{output}: {count} conversations, {described.formatting}", markup=False)
    for line in left_out.lines():
        out.print(line, markup=False)
    note(f"look at them: medm data check {output} --root {described.path.parent}")


def _write(
    output: Path,
    found: Iterator[tuple[int, Row]],
    source: Path,
    to: Literal["conversations", "pairs", "studies"],
    left_out: LeftOut,
    prompt: Sequence[str] | None,
    prompts: Path | None,
    seed: int | None,
    *,
    root: Path,
    classes: Sequence[str] = (),
) -> None:
    """Write the records of rows, and say which rows were left out."""
    from medm.data.convert.rows import PromptPool, RecordMaker, read_prompts
    from medm.errors import DataError

    pool = read_prompts(prompt or [], prompts)
    if pool is not None and to != "conversations":
        raise typer.BadParameter("--prompt and --prompts are for conversations")
    if pool is None and classes:
        pool = ["Which of these does the image show: {classes}?"]
    maker = RecordMaker(to, PromptPool(pool, seed=seed, classes=classes))

    def records() -> Iterator[JsonObject]:
        for index, row in found:
            try:
                yield maker.make(row, file=source, index=index)
            except DataError as error:
                left_out.add(f"no record of the form {to}", error)

    count = _written(output, records(), left_out)
    out.print(f"{output}: {count} {to}", markup=False)
    for line in left_out.lines():
        out.print(line, markup=False)
    pipeline = "" if to == "conversations" else f" --pipeline {to}"
    note(f"look at them: medm data check {output}{pipeline} --root {root}")


def _written(output: Path, records: Iterator[JsonObject], left_out: LeftOut) -> int:
    """Write records and return their number; where there are none, say why before the error."""
    from medm.data.writing import write_records
    from medm.errors import DataError

    try:
        return write_records(output, records)
    except DataError:
        for line in left_out.lines():
            out.print(line, markup=False)
        raise


def _show_series(index: DicomIndex) -> None:
    """Print how many series there are of each kind, and those that are not used."""
    from collections import Counter

    kinds = Counter(
        (series.modality, series.body_part or "-", series.kind) for series in index.usable
    )
    header = ("modality", "body part", "kind", "series")
    rows(([*kind, str(count)] for kind, count in sorted(kinds.items())), header=header)
    problems = [series for series in index.series if series.problem is not None]
    out.print(
        f"{len(index.series)} series, {len(problems)} not used; {index.without_image} DICOM files "
        f"without an image, {index.not_dicom} other files, {len(index.unreadable)} not readable",
        markup=False,
    )
    if index.links:
        out.print(f"{index.links} links not followed")
    for series in problems[:LISTED]:
        place = f"{series.place} ({series.modality}, {series.slices} slices)"
        out.print(f"  {place}: {series.problem}", markup=False)
    for name, reason in list(index.unreadable.items())[:LISTED]:
        out.print(f"  {reason if reason.startswith(name) else f'{name}: {reason}'}", markup=False)
    if len(problems) > LISTED:
        out.print(f"  ... and {len(problems) - LISTED} more series", markup=False)


def _show_unjoined(reports: Reports) -> None:
    """Print how many reports belong to no series."""
    unused = len(reports.table) - len(reports.used)
    if unused:
        out.print(
            f"{unused} of {len(reports.table)} rows of {reports.table.path} belong to no series",
            markup=False,
        )
