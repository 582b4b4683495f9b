"""Parsing of the command line, and the run of one command."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Sequence

from medm.errors import MedmError, RecipeError
from medm.launcher import LINK
from medm.os_errors import explain

logger = logging.getLogger(__name__)

USAGE, FAILURE = 2, 1

LAUNCHER = "launch"
CONTINUED = ("train", "infer", "eval", "embed")
"""Commands that continue when they are started again; `medm launch` runs these."""


def run(program: Callable[..., object], arguments: Sequence[str]) -> None:
    """Run one command, and say what went wrong; by `main`, which handles signals.

    Args:
        program: all commands, as typer or click calls them.
        arguments: what follows `medm`, with plug-ins in front.
    """
    from medm.cli.console import report

    try:
        program(arguments, prog_name="medm")
    except Exception as error:
        message = str(error) if isinstance(error, MedmError) else explain(error)
        explained = message is not None and not os.environ.get("MEDM_TRACEBACK")
        text = f"error: {message}" if explained else traceback.format_exc()
        if not LINK.report(text, traceback=not explained):
            if message is None or not explained:
                raise
            if not isinstance(error, MedmError):
                logger.debug("the place of the error below", exc_info=error)
            report(message)
        raise SystemExit(USAGE if isinstance(error, RecipeError) else FAILURE) from None


def command_of(arguments: Sequence[str]) -> str | None:
    """Return the name of the command: the first word that is no option and no plug-in file."""
    words = iter(plugins_first(arguments))
    for word in words:
        if word == "--plugin":
            next(words, None)
        elif not word.startswith("-"):
            return word
    return None


def plugins_first(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with every `--plugin FILE` in front of the command.

    There stand the options of all commands.

    What follows `launch` is another command with options of its own, and stays as it is.
    """
    plugins: list[str] = []
    rest: list[str] = []
    items = iter(arguments)
    for item in items:
        if item == "--" or (item == LAUNCHER and all(word.startswith("-") for word in rest)):
            rest += [item, *items]
        elif item == "--plugin":
            plugins += [item, *[value for value in [next(items, None)] if value is not None]]
        elif item.startswith("--plugin="):
            plugins.append(item)
        else:
            rest.append(item)
    return plugins + rest
