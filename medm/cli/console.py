"""Console output: results to standard output, everything else to standard error."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from medm.launcher import launched_rank

out = Console(soft_wrap=True, highlight=False)
"""Results. Never wrapped: a line stays a line when it is piped into another program."""
err = Console(stderr=True, soft_wrap=True, highlight=False)
"""Errors, progress and log lines."""


def report(message: str) -> None:
    """Print an error that the user can fix: its message, and no traceback."""
    err.print(Text("error: ", style="bold red").append(message, style="not bold default"))


def note(message: str) -> None:
    """A line beside the result."""
    err.print(Text(message, style="dim"))


def rows(items: Iterable[Sequence[str]], *, header: Sequence[str] | None = None) -> None:
    """Print aligned columns, the first one bold.

    A row stays one line, however narrow the terminal or the pipe is.
    """
    listed = [[Text(cell) for cell in item] for item in ([header] if header else []) + list(items)]
    widths = [max(cell.cell_len for cell in column) for column in zip(*listed, strict=True)]
    for position, item in enumerate(listed):
        for cell, width in zip(item[:-1], widths, strict=False):
            cell.pad_right(width - cell.cell_len + 2)
        item[0].stylize("bold")
        out.print(Text.assemble(*item, style="dim" if header and position == 0 else ""))


def is_rank_zero() -> bool:
    """Return whether this process speaks for all of a launch: rank 0, or the only one."""
    return launched_rank() == 0


def start_logging(*, verbose: bool = False) -> None:
    """Send log lines of medm to standard error.

    Other libraries log from warnings on, other ranks from errors on.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file name that is no UTF-8 must not end a command when its result is printed.
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    # transformers has a handler of its own; where the variable CI is set, it passes its records on
    # as well.
    handler.addFilter(lambda record: not record.name.startswith("transformers."))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    usual = logging.INFO if is_rank_zero() else logging.ERROR
    logging.getLogger("medm").setLevel(logging.DEBUG if verbose else usual)
    logging.getLogger(
        "huggingface_hub"
    ).propagate = False  # has a handler of its own, and would say everything twice
    # transformers loads DeepSpeed wherever it is installed, which then says this on standard
    # output, among the results.
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: "Setting accelerator to CPU" not in record.getMessage()
    )


class _Lines(logging.Formatter):
    """Formatter of log lines: `07:36:10  message`, further lines under the first.

    The level is named where it is not the usual one.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s  %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            time, _, message = text.partition("  ")
            text = f"{time}  {record.levelname.lower()}: {message}"
        return text.replace("\n", "\n" + " " * len("07:36:10  "))
