"""`medm launch`: one command in several processes."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Annotated

import typer

from medm.cli.running import CONTINUED, LAUNCHER, command_of, plugins_first, run
from medm.errors import RecipeError
from medm.launcher import Launcher, Place


def launch(
    context: typer.Context,
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND...", help="train, infer, eval or embed, with its arguments."
        ),
    ],
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            envvar="GPUS",
            help="Processes on this machine; one for each GPU, or one on the CPU.",
        ),
    ] = None,
    nodes: Annotated[
        int,
        typer.Option(
            min=1, envvar="NODES", help="Machines, each with the same number of processes."
        ),
    ] = 1,
    node_rank: Annotated[
        int | None, typer.Option(min=0, envvar="NODE_RANK", help="Number of this machine, from 0.")
    ] = None,
    master_addr: Annotated[
        str | None, typer.Option(envvar="MASTER_ADDR", help="Address of machine 0.")
    ] = None,
    master_port: Annotated[
        int,
        typer.Option(envvar="MASTER_PORT", help="A free port of machine 0; with several machines."),
    ] = 29500,
) -> None:
    """Run train, infer, eval or embed in several processes, on one machine or several.

    A stop (SIGTERM or SIGINT, to this process or to its group) reaches every process. All of them
    end, a checkpoint is written however long it takes, and the exit status is 75. An error is
    printed once and keeps its exit status. With one process the command runs in this one.
    """
    arguments = [*(context.obj or []), *command]
    _check(arguments, context)
    if nodes > 1 and (node_rank is None or master_addr is None):
        raise RecipeError(
            f"medm launch --nodes {nodes}: expected --node-rank and --master-addr too, or "
            "NODE_RANK (the number of this machine, from 0) and MASTER_ADDR (the address of "
            "machine 0) in the environment"
        )
    if node_rank is not None and node_rank >= nodes > 1:
        raise RecipeError(
            f"medm launch --node-rank {node_rank}: expected a number from 0 to {nodes - 1}, since "
            f"there are {nodes} machines"
        )
    processes = processes or max(1, _gpus())
    if nodes > 1:
        place = Place(processes, nodes, node_rank or 0, str(master_addr), master_port)
    elif processes > 1:
        place = Place(processes)
    else:
        run(context.find_root().command, plugins_first(arguments))
        return
    raise typer.Exit(Launcher(arguments, place).run())


def _check(arguments: list[str], context: typer.Context) -> None:
    """Find wrong usage here, where it is said once."""
    name = command_of(arguments)
    if name not in CONTINUED:
        raise RecipeError(
            f"medm {LAUNCHER} {name or ''}: expected {', '.join(CONTINUED[:-1])} or "
            f"{CONTINUED[-1]}, with its arguments; other commands run in one process"
        )
    ordered = plugins_first(arguments)
    rest = ordered[ordered.index(name) + 1 :]
    root = context.find_root().command
    root.commands[name].make_context(name, rest, parent=context.parent)  # type: ignore[attr-defined]


def _gpus() -> int:
    """The number of GPUs that CUDA shows to a process, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    listed = subprocess.run([program, "--list-gpus"], capture_output=True, text=True, check=False)
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0
