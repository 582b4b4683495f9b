"""Batch script of a training under Slurm: one plain file that sbatch takes. Torch-free.

srun starts one task for each rank, so that the early signal reaches every rank and its exit status
survives (docs/decisions/021-ranks-started-by-srun.md). The script resumes, requeues itself after
status 75 and stops where several starts in a row bring no newer checkpoint. Options and exit codes
are those of `man sbatch` and `man srun`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medm.errors import RecipeError

MARK = "# Written by `medm launch slurm`"
"""Beginning of the second line of every script."""

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>\d\d)(?::(?P<seconds>\d\d))?")
_NODE_PATH = re.compile(r"[/$][\w/$.{}-]*")
"""A path with variables of the shell, and nothing that would run a command."""
_VARIABLE = re.compile(r"[A-Za-z_]\w*=")


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """A training as a job of Slurm."""

    command: str
    """The command that wrote the script, for its reader."""
    name: str
    program: Sequence[str]
    """Program and options in front of `train`."""
    arguments: Sequence[str]
    """Recipe and overrides."""
    output_dir: Path
    """Absolute; the checkpoints are in it."""
    working_dir: Path
    """Absolute; relative paths of the recipe start here."""
    nodes: int
    gpus_per_node: int
    """GPUs and tasks of each node."""
    cpus_per_task: int
    time: str
    """Time limit, `HH:MM:SS` or `D-HH:MM:SS`."""
    save_seconds: int
    """Seconds between the early signal and the time limit."""
    partition: str | None = None
    account: str | None = None
    options: Sequence[str] = ()
    """Further options of sbatch."""
    setup: str = ""
    """Lines of bash that prepare the environment."""
    variables: Sequence[str] = ()
    """NAME=VALUE for the environment of every rank."""
    interface: str | None = None
    """Network interface of NCCL and gloo."""
    node_cache: str | None = None
    """Folder on a disk of each node; variables in it are expanded there."""
    has_data_cache: bool = False
    """The recipe has `data.cache`, whose folder is then in `node_cache`."""
    chained: bool = False
    """The job is one of a chain and is not requeued."""
    resume: bool = False
    """The first start resumes, too."""
    max_starts: int = 3
    """Starts from one checkpoint before the job gives up."""

    @property
    def logs(self) -> Path:
        """Folder of the logs and of the state of the job."""
        return self.output_dir / "slurm"


def script(job: SlurmJob) -> str:
    """Return the batch script.

    Raises:
        RecipeError: a value that cannot stand in a script, or a time limit that leaves no time
            between the start and the early signal.
    """
    _check(job)
    return "\n".join([*_header(job), *_settings(job), _BODY])


def _check(job: SlurmJob) -> None:
    seconds = seconds_of(job.time)
    if seconds <= job.save_seconds:
        raise RecipeError(
            f"--time {job.time}: expected more than the {job.save_seconds} s of --save-seconds, "
            "which a run has to save before the limit"
        )
    texts = {
        "--option": job.options,
        "--env": job.variables,
        "--partition": [job.partition or ""],
        "--account": [job.account or ""],
        "the recipe": [job.name],
        "the command": [job.command.replace('"', "")],
        "the working folder": [str(job.working_dir)],
        "output_dir": [str(job.output_dir)],
    }
    for name, values in texts.items():
        for value in values:
            if "\n" in value or '"' in value:
                raise RecipeError(
                    f"{name} {value!r}: line breaks and double quotes cannot stand in a batch "
                    "script"
                )
    for option in job.options:
        if not option.startswith("-"):
            raise RecipeError(
                f"--option {option!r}: expected an option of sbatch, such as --constraint=a100"
            )
    for variable in job.variables:
        if not _VARIABLE.match(variable):
            raise RecipeError(f"--env {variable!r}: expected NAME=VALUE, such as NCCL_IB_HCA=mlx5")
    if job.node_cache is not None and not _NODE_PATH.fullmatch(job.node_cache):
        raise RecipeError(
            f"--node-cache {job.node_cache!r}: expected an absolute path, or one that begins with "
            "a variable of the node, such as '/scratch/$USER' or '$TMPDIR'"
        )


def seconds_of(time: str) -> int:
    """Return the seconds of a time limit.

    Raises:
        RecipeError: it is written in another way.
    """
    found = _TIME.fullmatch(time)
    if found is None or (found["days"] is None and found["seconds"] is None):
        # Slurm reads 24:00 as minutes and seconds.
        raise RecipeError(f"--time {time!r}: expected HH:MM:SS or D-HH:MM:SS, such as 24:00:00")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _header(job: SlurmJob) -> list[str]:
    """Return the options of sbatch, which reads them from comments."""
    gpus = [f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []
    if any(option.startswith(("--gres", "--gpus")) for option in job.options):
        gpus = []
    options = [
        f'--job-name="{job.name}"',
        f'--chdir="{job.working_dir}"',
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={max(1, job.gpus_per_node)}",
        *gpus,
        f"--cpus-per-task={job.cpus_per_task}",
        f"--time={job.time}",
        *([f"--partition={job.partition}"] if job.partition else []),
        *([f"--account={job.account}"] if job.account else []),
        f"--signal=TERM@{job.save_seconds}",
        "--no-requeue" if job.chained else "--requeue",
        "--open-mode=append",
        f'--output="{job.logs}/%j.log"',
        *job.options,
    ]
    return [
        "#!/usr/bin/env bash",
        f"{MARK}: {job.command}",
        "# Not for clinical use.",
        *(f"#SBATCH {option}" for option in options),
        "",
    ]


def _settings(job: SlurmJob) -> list[str]:
    """Return the lines that differ from job to job: variables of the shell, and the setup."""
    ranks = max(1, job.gpus_per_node)
    lines = [
        "set -eo pipefail",
        f"MEDM=({shlex.join(job.program)})",
        f"RECIPE=({shlex.join(job.arguments)})",
        f"OUTPUT={shlex.quote(str(job.output_dir))}  # checkpoints are in it",
        f"SAVE_SECONDS={job.save_seconds}  # between the early signal and the time limit",
        f"MAX_STARTS={job.max_starts}  # from one checkpoint; then the job gives up",
        f"CHAINED={'yes' if job.chained else ''}  # one of several jobs in a row, not requeued",
        f"RESUME={'yes' if job.resume else ''}  # also at the first start",
        "PREFIX=()  # of the command of each rank, such as (apptainer exec --nv medm.sif)",
        "",
    ]
    if job.setup:
        lines += ["# Setup of this site", job.setup.rstrip("\n"), "# End of the setup", ""]
    lines += [
        "export HF_HUB_OFFLINE=1  # compute nodes reach no hub; the recipe names local files",
        f"export LOCAL_WORLD_SIZE={ranks}",
    ]
    if job.interface:
        name = shlex.quote(job.interface)
        lines.append(f"export NCCL_SOCKET_IFNAME={name} GLOO_SOCKET_IFNAME={name}")
    lines += [
        f"export {name}={shlex.quote(value)}"
        for name, _, value in (variable.partition("=") for variable in job.variables)
    ]
    lines += ["", *_rank_start(job)]
    return lines


def _rank_start(job: SlurmJob) -> list[str]:
    """Return the lines that each rank runs before medm: its folder on a disk of the node."""
    if job.node_cache is None:
        return ["ON_NODE=", ""]
    lines = [
        "ON_NODE=$(cat <<'END'  # what each rank runs before medm",
        f'NODE_CACHE="{job.node_cache}"',
        ': "${NODE_CACHE:?--node-cache is empty on this node}"',
        'mkdir -p "$NODE_CACHE"',
        'export TORCH_EXTENSIONS_DIR="$NODE_CACHE/torch_extensions"',
        'export TRITON_CACHE_DIR="$NODE_CACHE/triton"',
    ]
    if job.has_data_cache:
        lines.append('set -- "$@" data.cache.dir="$NODE_CACHE/volumes"')
    return [*lines, "END", ")", ""]


_BODY = r"""# From here on the script is the same for every job.
LOGS="$OUTPUT/slurm" STATE="$OUTPUT/slurm/state"
JOB=${1:-$SLURM_JOB_ID}  # of a chain: its first job
STOPPED="$LOGS/$SLURM_JOB_ID.stopped"
export STOPPED
mkdir -p "$LOGS"

newest_step() {  # of the complete checkpoints; 0 without one
  local folder step newest=0
  for folder in "$OUTPUT"/checkpoint-*; do
    step=${folder##*-}
    if [[ -d $folder && $step =~ ^[0-9]+$ ]] && ((10#$step > newest)); then newest=$((10#$step)); fi
  done
  echo "$newest"
}

remember() {  # the outcome of this start: running, stopped, finished or failed
  printf '%s %s %s %s\n' "$JOB" "$step" "$starts" "$1" >"$STATE.tmp"
  mv "$STATE.tmp" "$STATE"
}

# Starts from the same checkpoint are counted, also those after the failure of a node, when Slurm
# itself requeues the job.
step=$(newest_step) starts=1 job="" before="" count=0 outcome=""
if [ -e "$STATE" ]; then read -r job before count outcome <"$STATE" || true; fi
if [ -n "$job" ] && [ "$outcome" != finished ]; then RESUME=yes; fi
if [ "$job" = "$JOB" ]; then
  case $outcome in
    finished) echo "job $JOB has finished" && exit 0 ;;
    failed) echo "job $JOB has failed; see the logs in $LOGS" >&2 && exit 1 ;;
  esac
  if [ "$before" = "$step" ]; then starts=$((count + 1)); fi
fi
if [ "$starts" -gt "$MAX_STARTS" ]; then
  remember failed
  echo "gave up: $MAX_STARTS starts from step $step brought no newer checkpoint; raise --time or" \
    "--save-seconds, or lower train.save_steps, and submit again" >&2
  exit 1
fi
remember running
rm -f "$STOPPED"

read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}"

# Slurm signals the first process of a task, which passes TERM on to the process group of medm.
# 75 (stopped with a checkpoint) becomes 0 and a file: --kill-on-bad-exit would kill the ranks that
# still write. An error behind another rank's stop is a lost neighbor, not a failure.
RANK_SCRIPT=$(cat <<'END'
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID GROUP_RANK=$SLURM_NODEID
export WORLD_SIZE=$SLURM_NTASKS
run="" told=""
stop() {  # may come before the command has its process group
  told=yes
  if [ -z "$run" ]; then return; fi
  until kill -TERM -- "-$run" 2>/dev/null || ! kill -0 "$run" 2>/dev/null; do sleep 0.05; done
}
trap stop TERM INT
setsid "$@" & run=$!  # a process group of its own
if [ -n "$told" ]; then stop; fi
until wait "$run"; ! kill -0 "$run" 2>/dev/null; do :; done
wait "$run"
status=$?
if [ "$status" -eq 143 ] && [ -n "$told" ]; then status=75; fi  # before medm took signals
if [ "$status" -eq 75 ]; then touch "$STOPPED"; fi
if [ "$status" -ne 0 ] && [ -e "$STOPPED" ]; then exit 0; fi
exit "$status"
END
)

# --wait: seconds that the other ranks have after the first one ended. --gpu-bind: every rank sees
# the GPUs of its node and takes the one of LOCAL_RANK.
status=0
srun --kill-on-bad-exit=1 --wait="$SAVE_SECONDS" --gpu-bind=none --open-mode=append \
  --output="$LOGS/$SLURM_JOB_ID-rank%t.log" \
  bash -c "$ON_NODE
$RANK_SCRIPT" rank "${PREFIX[@]}" "${MEDM[@]}" train "${RECIPE[@]}" ${RESUME:+--resume} || status=$?

if [ "$status" -ne 0 ]; then
  remember failed
  echo "failed with status $status; see $LOGS/$SLURM_JOB_ID-rank*.log" >&2
  exit "$status"
fi
if [ ! -e "$STOPPED" ]; then
  remember finished
  exit 0
fi
remember stopped
rm -f "$STOPPED"
if [ -z "$CHAINED" ] && ! scontrol requeue "$SLURM_JOB_ID"; then
  echo "cannot be requeued here: write the script with --chain, or submit it again" >&2
fi
exit 75
"""
