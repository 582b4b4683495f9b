"""`medm infer`: batch inference from the command line."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medm.cli.console import err, note, out


def infer(
    model: Annotated[str, typer.Option(help="Model folder that medm saved.")],
    data: Annotated[str, typer.Option(help="JSON or JSONL of records; the last reply may be missing.")],
    output: Annotated[str, typer.Option(help="JSONL to append to; the same command resumes where it stopped.")],
    root: Annotated[str | None, typer.Option(help="Folder of images and volumes.  [default: that of --data]")] = None,
    json_output: Annotated[
        str | None, typer.Option("--json", help="At the end, all records with their replies as one JSON array.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts answered at once.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply in tokens.")] = 256,
    num_beams: Annotated[int, typer.Option(help="Beams; 1 for none.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 for the likeliest reply; above it, replies are drawn.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of drawing.")] = 0,
    processes: Annotated[int, typer.Option(help="Processes with the model each; on GPUs one each.")] = 1,
    workers: Annotated[int | None, typer.Option(help="Processes that read images.  [default: by cores]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        Literal["saved", "float32", "bfloat16", "float16"], typer.Option(help="Precision of the weights.")
    ] = "saved",
    compile: Annotated[bool, typer.Option("--compile", help="Compile decoding: a slow start, faster replies.")] = False,
    limit: Annotated[int | None, typer.Option(help="Only the first N records.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete earlier replies and start over.")] = False,
) -> None:
    """Answer every record of an annotation file. Not for clinical use.

    A run that was stopped resumes with the same command, which also tries every record again that has no reply.
    The exit status is 1 while a record has no reply. Several GPUs: --processes, or `medm launch infer`.
    """
    from medm.config import validate
    from medm.errors import MedmError
    from medm.inference.batch import infer as run
    from medm.inference.options import InferOptions

    generation = {
        "max_new_tokens": max_new_tokens, "num_beams": num_beams, "temperature": temperature, "top_p": top_p,
        "seed": seed, "compile": compile,
    }  # fmt: skip
    options = validate(
        InferOptions,
        {
            "model": model, "data": data, "root": root, "output": output, "json_output": json_output,
            "generation": generation, "batch_size": batch_size, "processes": processes, "workers": workers,
            "device": device, "dtype": dtype, "limit": limit, "overwrite": overwrite,
        },
        source="medm infer",
    )  # fmt: skip
    summary = run(options, progress=CalmProgress())
    if summary is None:
        return
    out.print(f"{summary.records} records: {summary.answered} answered, {summary.errors} without a reply")
    if summary.resumed:
        note(f"{summary.resumed} of them by earlier runs")
    if summary.unfinished:
        note(f"{summary.unfinished} replies were cut at {max_new_tokens} tokens")
    pace = f"{summary.seconds:.1f} s, {summary.per_second:.2f} records/s, " if summary.new else ""
    out.print(f"{pace}{summary.tokens} tokens  {Path(json_output or output)}", markup=False)
    note("Not for clinical use.")
    if summary.errors:
        raise MedmError(
            f"no reply to {summary.errors} of {summary.records} records; the 'error' of their lines in {output} says "
            "why. Replies are kept: correct the cause and run the same command again, which tries these records again"
        )


class CalmProgress:
    """A line now and then: soon at first, every half minute later. On a terminal the line is rewritten in place."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self._live: Any = err.is_terminal
        self._said = ""

    def __call__(self, done: int, total: int, errors: int) -> None:
        """Told how far the work is."""
        now = time.monotonic()
        pause = 0.5 if self._live else min(30.0, max(2.0, now - self._started))
        if now - self._last < pause and done < total:
            return
        self._last = now
        rate = done / max(now - self._started, 1e-9)
        left = (total - done) / max(rate, 1e-9)
        refused = f", {errors} without a reply" if errors else ""
        line = f"{done} of {total}{refused}, {rate:.1f}/s, {duration(left)} left"
        if line == self._said:  # at the end, when records are tried once more
            return
        self._said = line
        err.print(line, end="\r" if self._live and done < total else "\n", style="dim")


def duration(seconds: float) -> str:
    """`50 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
