"""The command line: commands parse arguments, call the package, and print.

Nothing is decided here.

Exit status: 0 done; 2 wrong usage or recipe; 1 any other failure; 75 `train`, `infer` or `eval` was
stopped by SIGTERM or SIGINT, and the same command (`train` with `--resume`) continues (sysexits'
EX_TEMPFAIL, which batch systems requeue); 130 and 143 another command was stopped by SIGINT or
SIGTERM.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from medm.children import safe_path
from medm.cli.running import CONTINUED, LAUNCHER, command_of, plugins_first, run
from medm.launcher import LINK
from medm.stopping import RESUMABLE, STOP_SIGNALS, Stopped


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status.

    Args:
        arguments: what follows `medm`; the process's own arguments without it.
    """
    given = plugins_first(sys.argv[1:] if arguments is None else arguments)
    command = command_of(given)
    try:
        with STOP_SIGNALS.handled(resumable=command in (*CONTINUED, LAUNCHER)), safe_path():
            LINK.join()
            run(_program, given)
    except Stopped as stop:
        # Under a launcher another rank's error may be what stopped this one: the launcher speaks.
        if stop.code == RESUMABLE and not LINK.connected:
            _note(
                f"stopped by {stop.number.name}; the same command starts again (train: with "
                "--resume)"
            )
        raise
    except SystemExit as end:
        if (distributed := sys.modules.get("medm.distributed")) is not None:
            distributed.end_rank(end.code if isinstance(end.code, int) else 0)
        raise


def _program(arguments: Sequence[str], *, prog_name: str) -> None:
    from medm.cli.app import app  # here, where an error of a wrong setting becomes a message

    app(arguments, prog_name=prog_name)


def _note(message: str) -> None:
    from medm.cli.console import is_rank_zero, note

    if is_rank_zero():
        note(message)
