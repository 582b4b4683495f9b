"""`medm eval`: scores on benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medm.cli.console import note, out, rows
from medm.cli.infer import CalmProgress
from medm.cli.option_flags import Flag, Typed, flags_of
from medm.types import JsonObject

if TYPE_CHECKING:
    from medm.evaluation.task_report import TaskReport


_TASK = "tasks.0."
"""Beginning of the keys of the task that flags describe."""


def flags() -> list[Flag]:
    """Return the flags that are fields: of the run, and of one task.

    No flag is required, because a recipe may give its value.
    """
    from medm.evaluation.options import EvalOptions, EvalTaskOptions

    beside = (
        "tasks",
        "seed",
        "generation.top_k",
        "generation.top_p",
        "generation.seed",
        "generation.compile",
        "studies.answers",
    )
    names = {"output_dir": "--output"}
    return [
        *flags_of(EvalTaskOptions, place=_TASK, leave_out=[f"{_TASK}task"], optional=True),
        *flags_of(EvalOptions, names=names, leave_out=beside, optional=True),
    ]


def evaluate(
    typed: Typed,
    recipe: Annotated[
        str | None, typer.Argument(help="YAML with `tasks`, `model`, `output_dir` ...")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="dotted.key=value ... of the recipe")
    ] = None,
    task: Annotated[str | None, typer.Option(help="A name that `medm list tasks` prints.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="key=value of the task; may be repeated.")
    ] = None,
) -> None:
    """Score a model, or any program's predictions, on benchmarks.

    Gives numbers with intervals, tables, and examples with images.

    One task by --task and --data, or several by a recipe. A run that was stopped resumes with the
    same command. Items without a reply count as wrong; the exit status is 1 where a task has no
    reply at all.
    """
    from medm.config import apply_overrides, read_yaml, validate
    from medm.errors import MedmError, RecipeError
    from medm.evaluation.options import EvalOptions
    from medm.evaluation.runner import evaluate as run

    section: JsonObject = read_yaml(recipe) if recipe is not None else {}
    block = typed.block(_TASK)
    shown = dict(typed.shown)
    if task is not None:
        if "data" not in block:
            raise RecipeError(
                f"--data: missing; give the folder with the files of {task!r} (docs/benchmarks.md)"
            )
        section["tasks"] = [{"task": _task_block(task, option or []), **block}]
        shown |= {f"{_TASK}task.name": "--task", f"{_TASK}task": "--task, --option"}
    elif recipe is None:
        raise RecipeError(
            "expected a recipe, or --task and --data; 'medm list tasks' prints the tasks"
        )
    elif block.keys() - {"against"} or option:
        raise RecipeError("--data, --split, --option, --predictions and --limit belong to --task")
    else:
        section["tasks"] = [{**other, **block} for other in section.get("tasks", [])]
        shown = {key: flag for key, flag in shown.items() if not key.startswith("tasks")}
    section = apply_overrides(typed.beside(_TASK).under(section), overrides or [])
    if task is not None and "predictions" not in block and section.get("model") is None:
        raise RecipeError(
            "--model: missing; give a model folder that medm saved, or --predictions of another "
            "program"
        )
    checked = validate(EvalOptions, section, source=recipe or "medm eval", shown=shown)
    reports = run(checked, progress=CalmProgress())
    for report in reports or []:
        _print(report)
    if reports:
        note("Not for clinical use.")
    silent = [report for report in reports or [] if report.answered == 0]
    if silent:
        names = ", ".join(f"{report.task} ({report.n} items)" for report in silent)
        raise MedmError(
            f"nothing was answered in {names}: the scores above are those of no reply at all"
        )


def _task_block(name: str, options: Sequence[str]) -> JsonObject:
    """The block of a task from its name and `--option key=value`."""
    from medm.config import parse_value
    from medm.errors import RecipeError

    block: JsonObject = {"name": name}
    for item in options:
        key, equals, value = item.partition("=")
        if not equals:
            raise RecipeError(f"--option {item!r}: expected key=value")
        block[key] = parse_value(value)
    return block


def _print(report: TaskReport) -> None:
    from medm.evaluation.report import comparison_table, results_table

    out.print(f"\n{report.task}: {report.n} items", style="bold")
    for title, results in (
        ("", report.scores.results),
        ("original scoring", report.scores.original),
    ):
        if results:
            header, lines = results_table(results)
            rows([line[:4] for line in lines], header=[title or header[0], *header[1:4]])
    if report.comparisons:
        header, lines = comparison_table(report.comparisons)
        rows(lines, header=[f"against {report.against}", *header[1:]])
    for remark in report.scores.notes:
        note(remark)
    note(f"{Path(report.folder) / 'report.html'}")
