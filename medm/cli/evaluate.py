"""`medm eval`: scores on benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medm.cli.console import note, out, rows
from medm.cli.infer import CalmProgress


def evaluate(
    recipe: Annotated[str | None, typer.Argument(help="YAML with `tasks`, `model`, `output_dir` ...")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value ... of the recipe")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder that medm saved.")] = None,
    task: Annotated[str | None, typer.Option(help="A name that `medm list tasks` prints.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder with the benchmark as it is distributed.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder for results.  [default: work_dirs/eval]")] = None,
    split: Annotated[str | None, typer.Option(help="Split.  [default: the one that is scored]")] = None,
    option: Annotated[list[str] | None, typer.Option(help="key=value of the task; may be repeated.")] = None,
    predictions: Annotated[str | None, typer.Option(help="Answers of any program, in place of a model's.")] = None,
    against: Annotated[str | None, typer.Option(help="Results folder or predictions to compare with.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N items.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest reply in tokens.  [default: 256]")] = None,
    num_beams: Annotated[int | None, typer.Option(help="Beams.  [default: 1]")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 for the likeliest reply.  [default: 0]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts answered at once.  [default: 8]")] = None,
    processes: Annotated[int | None, typer.Option(help="Processes with the model each.  [default: 1]")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that read images.  [default: by cores]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.  [default: auto]")] = None,
    dtype: Annotated[
        Literal["saved", "float32", "bfloat16", "float16"] | None, typer.Option(help="Precision of the weights.")
    ] = None,
    cases: Annotated[int | None, typer.Option(help="Worst and random items in the report.  [default: 8]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Answer again what was answered before.")] = False,
) -> None:
    """Score a model, or any program's predictions, on benchmarks: numbers with intervals, tables, cases with images.

    One task by --task and --data, or several by a recipe. A run that was stopped resumes with the same command. Items
    without a reply count as wrong; the exit status is 1 where a task has no reply at all.
    """
    from medm.config import apply_overrides, parse_value, read_yaml, validate
    from medm.errors import MedmError, RecipeError
    from medm.evaluation.options import EvalOptions
    from medm.evaluation.runner import evaluate as run

    section: dict[str, Any] = read_yaml(recipe) if recipe is not None else {}
    if task is not None:
        if data is None:
            raise RecipeError(f"--data: missing; give the folder with the files of {task!r} (docs/benchmarks.md)")
        settings: dict[str, Any] = {"name": task}
        for item in option or []:
            key, equals, value = item.partition("=")
            if not equals:
                raise RecipeError(f"--option {item!r}: expected key=value")
            settings[key] = parse_value(value)
        section["tasks"] = [
            {
                "task": settings,
                "data": data,
                "split": split,
                "limit": limit,
                "predictions": predictions,
                "against": against,
            }
        ]
    elif recipe is None:
        raise RecipeError("expected a recipe, or --task and --data; 'medm list tasks' prints the tasks")
    elif data or split or option or predictions or limit:
        raise RecipeError("--data, --split, --option, --predictions and --limit belong to --task")
    elif against is not None:
        section["tasks"] = [{**block, "against": against} for block in section.get("tasks", [])]
    given = {
        "model": model, "output_dir": output, "batch_size": batch_size, "processes": processes, "workers": workers,
        "device": device, "dtype": dtype, "cases": cases, "overwrite": overwrite or None,
    }  # fmt: skip
    section |= {key: value for key, value in given.items() if value is not None}
    section.setdefault("output_dir", "work_dirs/eval")
    generation = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "temperature": temperature}
    chosen = {key: value for key, value in generation.items() if value is not None}
    if chosen:
        section["generation"] = {**section.get("generation", {}), **chosen}
    section = apply_overrides(section, overrides or [])
    if task is not None and predictions is None and section.get("model") is None:
        raise RecipeError("--model: missing; give a model folder that medm saved, or --predictions of another program")
    shown = _TYPED if task is not None else {}
    checked = validate(EvalOptions, section, source=recipe or "medm eval", shown=shown)
    reports = run(checked, progress=CalmProgress())
    for report in reports or []:
        _print(report)
    if reports:
        note("Not for clinical use.")
    silent = [report for report in reports or [] if report.answered == 0]
    if silent:
        names = ", ".join(f"{report.task} ({report.n} items)" for report in silent)
        raise MedmError(f"nothing was answered in {names}: the scores above are those of no reply at all")


_TYPED = {
    "tasks.0.task.name": "--task", "tasks.0.task": "--task, --option", "tasks.0.data": "--data",
    "tasks.0.split": "--split", "tasks.0.limit": "--limit", "tasks.0.predictions": "--predictions",
    "tasks.0.against": "--against", "generation.max_new_tokens": "--max-new-tokens",
    "generation.num_beams": "--num-beams", "generation.temperature": "--temperature", "output_dir": "--output",
    "batch_size": "--batch-size", "processes": "--processes", "workers": "--workers", "cases": "--cases",
}  # fmt: skip
"""Keys of the section that the options write, as they were typed."""


def _print(report: Any) -> None:
    from medm.evaluation.report import comparison_table, results_table

    out.print(f"\n{report.task}: {report.n} items", style="bold")
    for title, results in (("", report.scores.results), ("published scoring", report.scores.published)):
        if results:
            header, lines = results_table(results)
            rows([line[:4] for line in lines], header=[title or header[0], *header[1:4]])
    if report.comparisons:
        header, lines = comparison_table(report.comparisons)
        rows(lines, header=[f"against {report.against}", *header[1:]])
    for remark in report.scores.notes:
        note(remark)
    note(f"{Path(report.folder) / 'report.html'}")
