"""`medm infer`: batch inference from the command line."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from medm.cli.console import err, note, out
from medm.cli.option_flags import Flag, Typed, flags_of
from medm.types import JsonObject


def flags() -> list[Flag]:
    """Return the flags of the command: every field of its options."""
    from medm.inference.options import InferOptions

    names = {"json_output": "--json", "csv_output": "--csv"}
    return [
        replace(flag, required=False) if flag.key == "output" else flag  # printed for --image
        for flag in flags_of(InferOptions, names=names, leave_out={"image", "volume"})
    ]


def infer(
    typed: Typed,
    image: Annotated[
        list[str] | None,
        typer.Option(
            help="In place of --data: an image that is asked about with --prompt; several are "
            "asked about together. The reply is printed, and --output may be left out."
        ),
    ] = None,
    volume: Annotated[
        list[str] | None, typer.Option(help="A volume that is asked about, likewise.")
    ] = None,
) -> None:
    """Generate a reply to every record of an annotation file, to a question about every file of a
    folder, or to one question. Models with a mask head also write masks. Not for clinical use.

    A run that was stopped resumes with the same command, which also tries every record again that
    has no reply. The exit status is 1 while a record has no reply. Several GPUs: --processes, or
    `medm launch infer`. Many machines: --shard in each task of a job array, then --merge.
    """
    section = typed.under({})
    if image or volume:
        section |= {"image": image or [], "volume": volume or []}
    elif "output" not in section:
        raise typer.BadParameter("Missing option '--output'; only --image and --volume need none")
    if "output" in section:
        _run(section, typed.shown)
        return
    if section.get("report_format", "none") != "none" and "reports" not in section:
        raise typer.BadParameter("--report-format needs --reports or --output, where reports stay")
    with TemporaryDirectory() as folder:
        lines = Path(folder) / "reply.jsonl"
        _run({**section, "output": str(lines)}, typed.shown, kept=False)


def _run(section: JsonObject, shown: Mapping[str, str], *, kept: bool = True) -> None:
    """Run inference and print what it did, or the reply to one question.

    Args:
        section: the options.
        shown: see `Typed`.
        kept: the output stays; else the reply is printed, and the output is removed.
    """
    from medm.config import validate
    from medm.errors import MedmError
    from medm.inference.batch import infer as run
    from medm.inference.options import InferOptions

    options = validate(InferOptions, section, source="medm infer", shown=shown)
    summary = run(options, progress=CalmProgress() if kept else None)
    if summary is None:
        return
    if not kept:
        _print_reply(Path(options.output))
        if summary.masks is not None and options.masks is None and summary.masks.masks:
            note("its masks were not kept: give --masks FOLDER or --output FILE")
        note("Not for clinical use.")
        return
    out.print(
        f"{summary.records} records: {summary.answered} answered, {summary.errors} without a reply"
    )
    if summary.resumed:
        note(f"{summary.resumed} of them by earlier runs")
    if summary.unfinished:
        length = "the model's length" if summary.longest is None else f"{summary.longest} tokens"
        note(f"{summary.unfinished} replies were cut at {length}")
    for line in summary.masks.notes if summary.masks is not None else ():
        note(line)
    pace = ""
    if summary.new:
        pace = f"{summary.seconds:.1f} s, {summary.per_second:.2f} records/s, "
    written = Path(options.json_output or options.lines_file)
    out.print(f"{pace}{summary.tokens} tokens  {written}", markup=False)
    note("Not for clinical use.")
    if summary.errors:
        raise MedmError(
            f"no reply to {summary.errors} of {summary.records} records; the 'error' of their "
            f"lines in {options.lines_file} says why. Replies are kept: correct the cause and run "
            "the same command again, which tries these records again"
        )


def _print_reply(lines: Path) -> None:
    """Print the reply of an output of one line.

    Raises:
        MedmError: there is none; the message is its error.
    """
    from medm.errors import MedmError

    line = json.loads(lines.read_text(encoding="utf-8"))
    if "error" in line:
        raise MedmError(str(line["error"]))
    out.print(line["reply"], markup=False)
    if not line.get("finished", True):
        note(f"cut at {line['tokens']} tokens")


class CalmProgress:
    """Progress lines: frequent at first, every half minute later.

    On a terminal the line is rewritten in place.
    """

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self._live = err.is_terminal
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
