"""`medm launch slurm`: a training as a batch script of Slurm."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from medm.cli.console import note, out
from medm.errors import MedmError, RecipeError
from medm.files import atomic_write_text
from medm.slurm import MARK, SlurmJob, script

NAME = "slurm"


def slurm(
    context: typer.Context,
    recipe: Annotated[
        str, typer.Argument(help="A file, or a name that `medm list recipes` prints.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value ...")] = None,
    nodes: Annotated[int, typer.Option(min=1, envvar="NODES", help="Machines.")] = 1,
    gpus_per_node: Annotated[
        int,
        typer.Option(
            min=0,
            envvar="GPUS",
            help="GPUs of each machine, with one rank each; 0 for one rank on the CPU.",
        ),
    ] = 1,
    cpus_per_task: Annotated[int, typer.Option(min=1, help="Cores of each rank.")] = 8,
    time: Annotated[str, typer.Option(help="Time limit: HH:MM:SS or D-HH:MM:SS.")] = "24:00:00",
    save_seconds: Annotated[
        int,
        typer.Option(
            min=30, max=65535, help="Seconds before the limit at which the run stops and saves."
        ),
    ] = 300,
    partition: Annotated[str | None, typer.Option(help="Partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Account.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="Further option of sbatch, such as --option=--constraint=a100; may be given "
            "several times. One that begins with --gres or --gpus replaces --gpus-per-node.",
        ),
    ] = None,
    setup: Annotated[
        Path | None,
        typer.Option(
            help="File of bash lines for the environment: module load, conda activate, or "
            "PREFIX=(apptainer exec --nv medm.sif). They become a part of the script."
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE for every rank, such as NCCL_IB_HCA=mlx5; may be given several times."
        ),
    ] = None,
    interface: Annotated[
        str | None, typer.Option(help="Network interface of NCCL and gloo, such as ib0.")
    ] = None,
    node_cache: Annotated[
        str | None,
        typer.Option(
            help="Folder on a disk of each node, such as '/scratch/$USER' or '$TMPDIR': of "
            "compiled extensions, and of data.cache where the recipe has one."
        ),
    ] = None,
    chain: Annotated[
        int,
        typer.Option(
            min=1,
            help="Jobs that run one after another, for sites where jobs may not be requeued.",
        ),
    ] = 1,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue a run that was not started by such a script."),
    ] = False,
    plugin: Annotated[
        list[Path] | None,
        typer.Option(
            help="Python file that registers parts of your own; may be given several times.",
            metavar="FILE",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Script to write.  [default: the recipe's name, .sbatch]")
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Hand the script to sbatch.")] = False,
) -> None:
    """Write a training as one batch script of Slurm, and submit it with --submit.

    Before the time limit the run writes a checkpoint, and the job is queued again and resumes.
    Several starts without a newer checkpoint end the job, and so does an error. How to use it:
    docs/clusters.md.
    """
    from medm.cli.recipes import find, refuse_options
    from medm.registry import load_plugin
    from medm.training.recipe import load_recipe

    before = [*(context.obj or []), *(f"--plugin={file}" for file in plugin or [])]
    plugins = [Path(word.removeprefix("--plugin=")) for word in before if word != "--verbose"]
    for path in plugins:
        load_plugin(path)
    known = [name for parameter in context.command.params for name in parameter.opts]
    refuse_options(f"launch {NAME}", [recipe, *(overrides or [])], known=known)
    found = find(recipe)
    read = load_recipe(found, overrides or [])
    name = Path(recipe).stem
    file = output or Path(f"{name}.sbatch")
    job = SlurmJob(
        command=shlex.join(["medm", "launch", NAME, *context.meta.get(NAME, [])]),
        name=name,
        program=[
            *_program(setup),
            *(["--verbose"] if "--verbose" in before else []),
            *(f"--plugin={path.resolve()}" for path in plugins),
        ],
        arguments=[str(found.resolve()) if Path(recipe).is_file() else recipe, *(overrides or [])],
        output_dir=Path(read.output_dir).resolve(),
        working_dir=Path.cwd(),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        cpus_per_task=cpus_per_task,
        time=time,
        save_seconds=save_seconds,
        partition=partition,
        account=account,
        options=option or (),
        setup=_read(setup),
        variables=env or (),
        interface=interface,
        node_cache=node_cache,
        has_data_cache=read.data.cache is not None,
        chained=chain > 1,
        resume=resume,
    )
    text = script(job)
    _require_own(file)
    job.logs.mkdir(parents=True, exist_ok=True)  # sbatch fails without a word where it is missing
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, text)
    out.print(str(file), markup=False)
    if submit:
        _submit(file, chain)
    else:
        note(f"submit it: {' && '.join(_commands(file, chain))}")


def _program(setup: Path | None) -> list[str]:
    """Return the medm of this environment; with a setup the one that it prepares."""
    own = Path(sys.executable).with_name("medm")
    return [str(own)] if setup is None and own.exists() else ["medm"]


def _read(setup: Path | None) -> str:
    if setup is None:
        return ""
    try:
        return setup.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"--setup {setup}: expected a text file of bash lines ({error})"
        ) from None


def _require_own(file: Path) -> None:
    """Raise `RecipeError` for a file that this command did not write."""
    if not file.exists():
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        lines.readline()
        if not lines.readline().startswith(MARK):
            raise RecipeError(
                f"{file}: exists, and `medm launch {NAME}` did not write it; choose another "
                "--output"
            )


def _commands(file: Path, chain: int) -> list[str]:
    """Return the commands that submit a script."""
    name = shlex.quote(str(file))
    if chain == 1:
        return [f"sbatch {name}"]
    return [
        f"first=$(sbatch --parsable {name}) last=$first",
        f"for _ in $(seq {chain - 1}); do last=$(sbatch --parsable --dependency=afterany:$last "
        f"{name} $first); done",
    ]


def _submit(file: Path, chain: int) -> None:
    """Submit a script; of a chain each job after the one before it, whatever became of that.

    Raises:
        MedmError: sbatch is missing or refuses the script.
    """
    if shutil.which("sbatch") is None:
        raise MedmError(
            f"sbatch: no such program here; {file} is written: submit it on a machine of the "
            "cluster"
        )
    first = last = ""
    for number in range(chain):
        after = [f"--dependency=afterany:{last}"] if last else []
        command = ["sbatch", "--parsable", *after, str(file), *([first] if first else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise MedmError(
                f"sbatch: {done.stderr.strip() or f'ended with status {done.returncode}'}; "
                f"{number} of {chain} jobs were submitted"
            )
        last = done.stdout.strip().partition(";")[0]  # "ID;CLUSTER" where there are several
        first = first or last
        out.print(f"job {last}", markup=False)


app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command(
    NAME,
    context_settings={
        "ignore_unknown_options": True,
        "help_option_names": ["-h", "--help"],
    },
)(slurm)
