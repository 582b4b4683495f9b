"""`medm launch`: one command in several processes."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from medm.cli import slurm
from medm.cli.running import CONTINUED, LAUNCHER, command_of, plugins_first, run
from medm.errors import RecipeError
from medm.launcher import Launcher, Place


class LaunchCommand(TyperCommand):
    """The command, and those that write its launch for a batch system."""

    @property
    def commands(self) -> dict[str, Any]:
        """Commands by the word that takes the place of train, infer, eval or embed."""
        return {slurm.NAME: typer.main.get_command(slurm.app)}


def launch(
    context: typer.Context,
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND...",
            help="train, infer, eval or embed, with its arguments; or slurm, which has a page of "
            "its own: medm launch slurm --help.",
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
    if command[0] == slurm.NAME:
        if any(
            (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
            for name in ("processes", "nodes", "node_rank", "master_addr", "master_port")
        ):
            raise RecipeError(
                f"medm {LAUNCHER}: options of '{slurm.NAME}' stand behind it: "
                f"medm {LAUNCHER} {slurm.NAME} RECIPE --nodes N --gpus-per-node G"
            )
        _run_below(context, slurm.NAME, command[1:])
        return
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


def _run_below(context: typer.Context, name: str, words: list[str]) -> None:
    """Run one of the commands below `launch`."""
    command = context.command.commands[name]  # type: ignore[attr-defined]
    context.meta[name] = list(words)
    shown = f"{LAUNCHER} {name}"
    with command.make_context(shown, list(words), parent=context.parent) as inner:
        command.invoke(inner)


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
