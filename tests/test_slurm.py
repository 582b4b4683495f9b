"""The batch script of `medm launch slurm`, executed with stand-ins for the programs of Slurm."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import yaml

from medm.errors import RecipeError
from medm.slurm import SlurmJob, script, seconds_of
from medm.training import checkpoints
from tests import tiny
from tests.cli.runner import medm
from tests.launch import environment
from tests.slurm_stubs import Cluster

SLOW = """
import os, time
from medm.training import run
from transformers import TrainerCallback

class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < 9 and os.environ.get("SLOW"): time.sleep(0.3)

run._callbacks = lambda recipe, known=run._callbacks: [*known(recipe), Slow()]
"""
"""Steps that take long enough to be met by a signal."""


def recipe(folder: Path, output: str) -> Path:
    """A recipe of a tiny language model and twelve different records."""
    if not (folder / "llm").exists():
        tiny.save_llm("smollm2", folder / "llm")
    texts = [f"There are {n * 7} nodules of {n} mm." for n in range(12)]
    records = [
        {"conversations": [{"from": "human", "value": "Report?"}, {"from": "gpt", "value": text}]}
        for text in texts
    ]
    (folder / "train.json").write_text(json.dumps(records))
    content = {
        "model": {"llm": {"name": "smollm2", "path": str(folder / "llm")}},
        "data": {"train": [{"path": str(folder / "train.json")}]},
        "parts": {"llm": {"tune": "full", "lr": 1e-3}},
        "train": {
            "use_cpu": True, "per_device_train_batch_size": 2, "max_steps": 10,
            "save_strategy": "no", "logging_steps": 1,
        },
        "output_dir": str(folder / output),
    }  # fmt: skip
    file = folder / f"{output}.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def written(folder: Path, *arguments: str) -> Path:
    """Write a script from the command line."""
    output = folder / "job.sbatch"
    done = medm("launch", "slurm", *arguments, "--output", str(output))
    assert done.code == 0, done.err
    subprocess.run(["bash", "-n", str(output)], check=True)
    return output


def test_a_job_that_is_stopped_early_ends_with_the_weights_of_one_that_was_not(
    tmp_path: Path,
) -> None:
    """Two ranks: the early signal, status 75, the requeue, `--resume`, and the same bits."""
    cluster = Cluster(tmp_path / "cluster")
    cluster.environment |= {**environment(), "PATH": cluster.environment["PATH"], "SLOW": "1"}
    plugin = tmp_path / "slow.py"
    plugin.write_text(SLOW)
    cut = written(
        tmp_path, str(recipe(tmp_path, "cut")), "--gpus-per-node", "2", "--plugin", str(plugin)
    )
    first = cluster.start(cut, stop=tmp_path / "cut" / "loss.jsonl")
    logs = sorted((tmp_path / "cut" / "slurm").glob("*.log"))
    assert first.returncode == 75, first.stderr + logs[0].read_text()
    assert cluster.requeued.read_text() == "requeue 17\n"
    assert [log.name for log in logs] == ["17-rank0.log", "17-rank1.log"]
    (checkpoint,) = checkpoints.folders(tmp_path / "cut")
    assert int(checkpoint.name.partition("-")[2]) < 10
    second = cluster.start(cut)
    assert second.returncode == 0, second.stderr + logs[0].read_text()
    assert f"continuing from {checkpoint}" in logs[0].read_text()
    assert cluster.requeued.read_text() == "requeue 17\n", "a finished job is not queued again"
    assert (tmp_path / "cut" / "slurm" / "state").read_text().endswith(" finished\n")

    del cluster.environment["SLOW"]
    whole = written(tmp_path, str(recipe(tmp_path, "whole")), "--gpus-per-node", "2")
    assert cluster.start(whole, job=18).returncode == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster, and a job whose `medm` is lines of bash."""
    cluster = Cluster(tmp_path / "cluster")
    monkeypatch.setenv("PATH", cluster.environment["PATH"])
    program, output = tmp_path / "program", tmp_path / "out"

    def make(lines: str, **changes: Any) -> Path:
        program.write_text(f'#!/bin/bash\necho "$RANK $LOCAL_RANK $WORLD_SIZE $*" >&2\n{lines}\n')
        program.chmod(0o755)
        given: dict[str, Any] = {
            "command": "medm", "name": "job", "program": [str(program)], "arguments": ["recipe"],
            "output_dir": output, "working_dir": tmp_path, "nodes": 1, "gpus_per_node": 2,
            "cpus_per_task": 1, "time": "01:00:00", "save_seconds": 60,
        }  # fmt: skip
        file = tmp_path / "job.sbatch"
        file.write_text(script(SlurmJob(**given | changes)))
        return file

    yield cluster, make, output


def rank_log(output: Path, rank: int = 0, *, number: int = 17) -> str:
    return (output / "slurm" / f"{number}-rank{rank}.log").read_text()


def test_a_failure_ends_all_ranks_and_is_not_queued_again(job: Any) -> None:
    cluster, make, output = job
    file = make("if [ $RANK = 1 ]; then exit 1; else sleep 60; fi")
    done = cluster.start(file)
    assert done.returncode not in (0, 75)
    assert "see " in done.stderr and "17-rank*.log" in done.stderr
    assert not cluster.requeued.exists()
    assert rank_log(output, 1) == "1 1 2 train recipe\n"
    again = cluster.start(file)
    assert again.returncode == 1, "a chain ends with its first failure"
    assert rank_log(output, 1) == "1 1 2 train recipe\n", "nothing was started"
    assert cluster.start(file, job=18).returncode not in (0, 75)
    assert rank_log(output, 1, number=18) == "1 1 2 train recipe --resume\n", "a new submission"


def test_starts_without_a_newer_checkpoint_end_after_three(job: Any) -> None:
    cluster, make, output = job
    file = make("exit 75")
    (output / "checkpoint-4").mkdir(parents=True)
    (output / ".tmp-checkpoint-9").mkdir()
    for _ in range(3):
        assert cluster.start(file).returncode == 75
    (output / "checkpoint-12").mkdir()
    for _ in range(3):
        assert cluster.start(file).returncode == 75
    assert cluster.requeued.read_text() == "requeue 17\n" * 6
    last = cluster.start(file)
    assert last.returncode == 1
    assert "3 starts from step 12 brought no newer checkpoint" in last.stderr
    assert cluster.requeued.read_text() == "requeue 17\n" * 6
    assert len(rank_log(output).splitlines()) == 6
    assert cluster.start(file, job=18).returncode == 75, "a new submission counts from one"


def test_a_rank_that_still_writes_is_not_killed_by_one_that_stopped(job: Any) -> None:
    """`--kill-on-bad-exit` acts on any status but 0, also on 75."""
    cluster, make, output = job
    file = make(
        f'cd {output}\nif [ "$RANK" = 0 ]; then trap "sleep 1; touch saved; exit 75" TERM; '
        'else trap "exit 75" TERM; fi\ntouch up.$RANK\n'
        "if [ -e up.0 ] && [ -e up.1 ]; then echo up >up; fi\n"
        "while true; do sleep 0.1; done"
    )
    done = cluster.start(file, stop=output / "up")
    assert done.returncode == 75, done.stderr
    assert (output / "saved").exists()


@pytest.mark.parametrize("trapped", [True, False])
def test_a_signal_before_the_command_has_begun_is_not_lost(job: Any, trapped: bool) -> None:
    """It is sent while `setsid` has not made the process group yet, or before medm takes it."""
    cluster, make, output = job
    output.mkdir(exist_ok=True)
    slow = cluster.folder / "programs" / "setsid"
    slow.write_text(
        f"#!/bin/sh\ncd {output}\ntouch asked.$RANK\n"
        "if [ -e asked.0 ] && [ -e asked.1 ]; then echo up >up; fi\n"
        f'sleep 1\nexec {which("setsid")} "$@"\n'
    )
    slow.chmod(0o755)
    trap = 'trap "exit 75" TERM\n' if trapped else ""
    done = cluster.start(make(f"{trap}while true; do sleep 0.1; done"), stop=output / "up")
    assert done.returncode == 75, done.stderr
    assert cluster.requeued.exists()


def test_an_error_behind_the_stop_of_another_rank_is_not_a_failure(job: Any) -> None:
    cluster, make, _ = job
    file = make("if [ $RANK = 0 ]; then exit 75; else sleep 1; exit 1; fi")
    assert cluster.start(file).returncode == 75
    assert cluster.requeued.exists()


def test_a_site_without_requeue_runs_a_chain(job: Any, tmp_path: Path) -> None:
    cluster, make, output = job
    file = make(f"if [ -e {output}/checkpoint-5 ]; then exit 0; fi\nmkdir -p {output}/checkpoint-5\nexit 75", chained=True)  # fmt: skip
    assert cluster.start(file, job=101).returncode == 75
    assert cluster.start(file, "101", job=102).returncode == 0
    assert rank_log(output, number=102).startswith("0 0 2 train recipe --resume\n")
    assert cluster.start(file, "101", job=103).returncode == 0
    assert not (output / "slurm" / "103-rank0.log").exists(), "the chain has finished"
    assert not cluster.requeued.exists()
    assert "#SBATCH --no-requeue" in file.read_text()


def test_a_refused_requeue_says_what_to_do(job: Any) -> None:
    cluster, make, _ = job
    cluster.environment["SCONTROL_STATUS"] = "1"
    done = cluster.start(make("exit 75"))
    assert done.returncode == 75
    assert "--chain" in done.stderr


def test_setup_prefix_variables_and_node_cache_reach_each_rank(job: Any, tmp_path: Path) -> None:
    cluster, make, output = job
    cluster.environment["SCRATCH"] = str(tmp_path / "scratch of node")
    file = make(
        'echo "$SITE $HF_HUB_OFFLINE $NCCL_SOCKET_IFNAME $GLOO_SOCKET_IFNAME $NCCL_IB_HCA" >&2\n'
        'echo "$TRITON_CACHE_DIR $MASTER_ADDR $MASTER_PORT" >&2',
        setup="export SITE=north\nPREFIX=(env SITE=inside)\n",
        interface="ib0",
        variables=["NCCL_IB_HCA=mlx5 1"],
        node_cache="$SCRATCH/medm",
        has_data_cache=True,
        options=["--constraint=a100", "--gres=gpu:a100:2"],
    )
    assert cluster.start(file).returncode == 0
    scratch = tmp_path / "scratch of node" / "medm"
    assert rank_log(output).splitlines() == [
        f"0 0 2 train recipe data.cache.dir={scratch}/volumes",
        "inside 1 ib0 ib0 mlx5 1",
        f"{scratch}/triton 127.0.0.1 20017",
    ]
    assert scratch.is_dir()
    text = file.read_text()
    assert "#SBATCH --gres=gpu:a100:2" in text and "--gpus-per-node" not in text


def test_the_command_submits_one_job_or_a_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(tmp_path / "cluster")
    for name in ("PATH", "SUBMITTED"):
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.chdir(tmp_path)
    arguments = ["launch", "slurm", "unimed-clip/vit-b16", "--nodes", "4", "--time", "1-00:00:00"]
    one = medm(*arguments, "--submit", "--partition", "gpu")
    assert one.code == 0, one.err
    assert one.out.split() == ["vit-b16.sbatch", "job", "101"]
    assert cluster.submitted.read_text() == "--parsable vit-b16.sbatch\n"
    text = (tmp_path / "vit-b16.sbatch").read_text()
    for line in ("--nodes=4", "--time=1-00:00:00", "--partition=gpu", "--signal=TERM@300"):
        assert f"#SBATCH {line}\n" in text
    assert (tmp_path / "work_dirs" / "unimed-clip" / "vit-b16" / "slurm").is_dir()
    chained = medm(*arguments, "--chain", "3", "--submit")
    assert chained.code == 0, chained.err
    assert cluster.submitted.read_text().splitlines()[1:] == [
        "--parsable vit-b16.sbatch",
        "--parsable --dependency=afterany:102 vit-b16.sbatch 102",
        "--parsable --dependency=afterany:103 vit-b16.sbatch 102",
    ]
    cluster.submitted.unlink()
    said = medm(*arguments, "--chain", "3").err.partition("submit it: ")[2]
    subprocess.run(["bash", "-ec", " ".join(said.split())], check=True, cwd=tmp_path)
    assert cluster.submitted.read_text().splitlines()[2].endswith("afterany:102 vit-b16.sbatch 101")


def test_wrong_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = "unimed-clip/vit-b16"
    (tmp_path / "own.sh").write_text("#!/bin/bash\necho mine\n")
    cases = {
        (known, "--time", "tomorrow"): "expected HH:MM:SS",
        (known, "--time", "24:00"): "expected HH:MM:SS",  # minutes and seconds to Slurm
        (known, "--time", "00:05:00"): "expected more than the 300 s",
        (known, "--option", "a100"): "an option of sbatch",
        (known, "--env", "NCCL"): "expected NAME=VALUE",
        (known, "--node-cache", "$(rm x)"): "expected an absolute path",
        (known, "--setup", "none.sh"): "expected a text file",
        (known, "--output", "own.sh"): "did not write it",
        (known, "--partitoin", "x"): "did you mean '--partition'",
        (known, "train.max_stepz=3"): "max_stepz",
        ("nope",): "no such file, and no recipe",
    }
    for arguments, words in cases.items():
        done = medm("launch", "slurm", *arguments)
        assert done.code == 2, arguments
        assert words in done.err, done.err
    before = medm("launch", "--nodes", "2", "slurm", known)
    assert before.code == 2 and "stand behind it" in before.err
    assert [file.name for file in tmp_path.iterdir()] == ["own.sh"]


def test_time_limits() -> None:
    assert seconds_of("00:30:00") == 1800
    assert seconds_of("2-01:00") == 49 * 3600
    with pytest.raises(RecipeError):
        seconds_of("24h")
