"""The command line. Commands parse what a person typed, call the package, and print; nothing is decided here.

Exit status: 0 done; 2 wrong usage or recipe; 1 any other failure; 75 stopped, and the same command with
`--resume` goes on (sysexits' EX_TEMPFAIL, which batch systems requeue); 130 interrupted from the keyboard.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from medm.errors import MedmError, RecipeError

USAGE, FAILURE, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status.

    Args:
        arguments: what follows `medm`; the process's own arguments without it.
    """
    from medm.cli.app import app
    from medm.cli.console import report

    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(plugins_first(given), prog_name="medm")
    except MedmError as error:
        if os.environ.get("MEDM_TRACEBACK"):
            raise
        report(error)
        raise SystemExit(USAGE if isinstance(error, RecipeError) else FAILURE) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def plugins_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with every `--plugin FILE` in front of the command, where the options of all commands stand."""
    plugins: list[str] = []
    rest: list[str] = []
    items = iter(arguments)
    for item in items:
        if item == "--":
            rest += [item, *items]
        elif item == "--plugin":
            plugins += [item, *[value for value in [next(items, None)] if value is not None]]
        elif item.startswith("--plugin="):
            plugins.append(item)
        else:
            rest.append(item)
    return plugins + rest
