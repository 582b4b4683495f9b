"""`medm train`: one run of one recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from medm.cli.console import is_rank_zero, out
from medm.stopping import RESUMABLE


def train(
    recipe: Annotated[
        str, typer.Argument(help="A file, or a name that `medm list recipes` prints.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value ...")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Resume from the newest complete checkpoint; start if there is none."
        ),
    ] = False,
) -> None:
    """Train what a recipe describes. Not for clinical use.

    One process; several GPUs or machines: `medm launch train`, which the launchers in scripts/train
    use. SIGTERM or SIGINT (Ctrl-C) finishes the step, writes a checkpoint and exits with status 75:
    the same command with --resume continues. Further signals change nothing; SIGQUIT ends the run
    at once, without that checkpoint.
    """
    from medm.cli.recipes import find, refuse_options
    from medm.training.recipe import load_recipe

    refuse_options("train", [recipe, *(overrides or [])], known=["--resume", "--help"])
    checked = load_recipe(find(recipe), overrides or [])

    from medm.distributed import leave_group
    from medm.training.run import train as run

    outcome = run(checked, resume=resume)
    leave_group()
    if not outcome.finished:
        raise typer.Exit(RESUMABLE)
    if is_rank_zero():
        out.print(str(outcome.output_dir), markup=False)
