"""The examples for clusters and clouds, as far as they can be checked without the programs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from medm.cli.recipes import find
from tests.cli.runner import medm
from tests.examples.scripts import EXAMPLES
from tests.slurm_stubs import Cluster

ROOT = EXAMPLES.parent
CLUSTER = EXAMPLES / "cluster"
ECHO = '#!/bin/bash\nprintf "%s\\n" "$*" >&2\n'
"""A `medm` that prints its words."""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.chdir(tmp_path)
    found = Cluster(tmp_path / "cluster", tasks=1)
    found.environment["SLURM_ARRAY_TASK_ID"] = "3"
    return found


def program(cluster: Cluster, lines: str) -> None:
    """Put a `medm` of these lines on the path."""
    file = cluster.folder / "programs" / "medm"
    file.write_text(ECHO + lines)
    file.chmod(0o755)


def test_a_task_of_inference_is_queued_again_where_it_was_stopped(cluster: Cluster) -> None:
    script = CLUSTER / "infer.sbatch"
    program(cluster, 'trap "exit 75" TERM\necho up >up\nwhile true; do sleep 0.1; done')
    assert cluster.start(script, "--data", "in.json", stop=Path("up")).returncode == 75
    assert cluster.requeued.read_text() == "requeue 17\n"
    log = Path("medm-infer-17-task0.log").read_text()
    assert log == "infer --data in.json --shard 3/16\n"
    cluster.environment["SLURM_RESTART_COUNT"] = "20"
    program(cluster, "exit 75")
    assert cluster.start(script).returncode == 75
    program(cluster, "exit 1")
    assert cluster.start(script).returncode == 1
    assert cluster.requeued.read_text() == "requeue 17\n"


def test_a_task_of_the_cache_takes_its_shard(cluster: Cluster, tmp_path: Path) -> None:
    program(cluster, "")
    cluster.environment |= {"RECIPE": "my.yaml", "SLURM_CPUS_PER_TASK": "4"}
    done = cluster.start(CLUSTER / "cache.sbatch", "data.cache.dir=/c", "--only-failed")
    assert done.returncode == 0
    expected = "data cache my.yaml data.cache.dir=/c --only-failed --shard 3/64 --workers 4"
    assert done.stderr.strip() == expected
    words = expected.split()
    # The command takes these words; the recipe is missing.
    assert f"{words[2]}: no such file" in medm(*words).err


def sections(text: str) -> dict[str, str]:
    """Header and sections of an Apptainer definition file."""
    found: dict[str, str] = {"header": ""}
    name = "header"
    for line in text.splitlines():
        if line.startswith("%"):
            name = line.removeprefix("%").strip()
            assert name not in found, f"{name}: twice"
            found[name] = ""
        else:
            found[name] += line.strip() + "\n"
    return found


def test_the_image_is_built_from_files_that_exist(tmp_path: Path) -> None:
    found = sections((CLUSTER / "medm.def").read_text())
    assert set(found) == {
        "header", "files", "post", "environment", "test", "runscript", "labels", "help",
    }  # fmt: skip
    header = [line for line in found["header"].splitlines() if line and line[0] != "#"]
    assert [line.partition(":")[0] for line in header] == ["Bootstrap", "From"]
    copied = [line.split() for line in found["files"].splitlines() if line]
    for source, target in copied:
        assert (ROOT / source).exists(), source
        assert target == f"/opt/medm/{source}"
    needed = {"medm", "recipes", "pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"}
    assert needed < {source for source, _ in copied}, "what tests/test_package.py builds a wheel of"
    for name in ("post", "environment", "test", "runscript"):
        subprocess.run(["sh", "-n", "-c", found[name]], check=True)

    # The installation, with a pip that prints its words.
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\necho "pip $*"\n')
    pip.chmod(0o755)
    lines = found["post"].partition("cd /opt/medm\n")[2]
    lines = lines.replace("/tmp/constraints.txt", str(tmp_path / "constraints.txt"))
    done = subprocess.run(
        ["sh", "-euc", lines.replace("rm ", "cat ")],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    torch, package, *constraints = done.stdout.splitlines()
    assert torch.startswith("pip install --no-cache-dir torch==2.")
    assert package.endswith("constraints.txt .")
    assert any(line.startswith("transformers==") for line in constraints)
    assert not any(line.startswith("torch==") for line in constraints)


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_cloud_job_launches_a_training(nodes: int, cluster: Cluster) -> None:
    job: dict[str, Any] = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert set(job) == {
        "name", "workdir", "num_nodes", "resources", "envs", "file_mounts", "setup", "run",
    }  # fmt: skip
    assert job["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    find(job["envs"]["RECIPE"])
    program(cluster, 'env | grep -E "^(GPUS|NODES|NODE_RANK|MASTER_ADDR)=" | sort >&2')
    given = {
        "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NUM_NODES": str(nodes),
        "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }  # fmt: skip
    kept = {k: v for k, v in cluster.environment.items() if k not in ("NODES", "NODE_RANK")}
    done = subprocess.run(
        ["bash", "-c", job["run"]],
        env=kept | job["envs"] | given | {"OVERRIDES": "train.max_steps=3 train.bf16=true"},
        capture_output=True,
        text=True,
        check=True,
    )
    words, *environment = done.stderr.splitlines()
    overrides = "output_dir=/runs/medm train.max_steps=3 train.bf16=true"
    assert words == f"launch train medm-vl-2d/finetune_lora {overrides} --resume"
    several = ["GPUS=8", "MASTER_ADDR=10.0.0.1", "NODES=2", "NODE_RANK=1"]
    assert environment == (["GPUS=8"] if nodes == 1 else several)
