"""The three jobs of the README, run as they are written, with tiny parts in place of the published
ones."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from medm.cli.recipes import find, shipped
from medm.connectors import CONNECTORS
from medm.encoders import ENCODERS
from medm.heads import HEADS
from medm.knowledge import KNOWLEDGE
from medm.llms import LLMS
from medm.registry import Registry
from medm.tasks.pair_sources import PAIR_SOURCES
from medm.text_encoders import TEXT_ENCODERS
from medm.training.recipe import load_recipe
from tests import shrink
from tests.cli.runner import medm
from tests.inference.tiny import questions, read_output, save_tiny, write_records
from tests.models.dual_encoder import tiny as dual_encoder
from tests.tasks.layouts import put_csv, put_image

ROOT = Path(__file__).parents[1]
RECIPES = {
    "scripts/train/MedM-VL-2D-3B-en/pretrain.sh": "medm-vl-2d/pretrain",
    "scripts/train/MedM-VL-2D-3B-en/finetune.sh": "medm-vl-2d/finetune",
    "scripts/train/finetune.sh": "medm-vl-2d/finetune_lora",
}
"""Launchers that train, and the recipe that each of them runs."""


def commands() -> list[str]:
    """Every line of the README's bash blocks."""
    blocks = re.findall(
        r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def environment() -> dict[str, str]:
    """This one, with the tests' own Python in front, without a GPU and without a hub."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "GPUS": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """One command in a folder."""
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like a checkout, for runs to write in."""
    for name in ("scripts", "docs", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.timeout(1500)  # six processes that import torch, on a machine that may be busy
def test_the_three_jobs(checkout: Path) -> None:
    lines = commands()
    assert len(lines) >= 5
    trained = set()
    for line in lines:
        launcher = next((path for path in RECIPES if path in line), None)
        if launcher is not None:
            trained.add(launcher)
            tiny = shrink.overrides(RECIPES[launcher], checkout, steps=1)
            line += "".join(f" '{override}'" for override in tiny)
        if "inference.sh" in line:
            line += " --max-new-tokens 4 --workers 0"
        done = run(line, checkout)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert trained == set(RECIPES)
    records = json.loads((ROOT / "docs" / "example_inference.json").read_text("utf-8"))
    answers = [
        json.loads(line)
        for line in (checkout / "work_dirs" / "inference.jsonl").read_text().splitlines()
    ]
    assert len([answer for answer in answers if "reply" in answer]) == len(records)
    written = json.loads((checkout / "work_dirs" / "inference.json").read_text("utf-8"))
    assert [record["id"] for record in written] == [record["id"] for record in records]
    assert all(record["conversations"][-1]["from"] == "gpt" for record in written)
    assert written[1]["answer"] == "Two."


CT = {
    "scripts/train/MedM-VL-CT-3B-en/pretrain.sh": "medm-vl-ct/pretrain",
    "scripts/train/MedM-VL-CT-3B-en/finetune.sh": "medm-vl-ct/finetune",
    "scripts/train/MedM-VL-CT-Chest-3B-en/pretrain.sh": "medm-vl-ct-chest/pretrain",
    "scripts/train/MedM-VL-CT-Chest-3B-en/finetune.sh": "medm-vl-ct-chest/finetune",
}
"""Launchers of volumes, and the recipe that each of them runs; stage 2 takes what stage 1 left."""

PAIRS = {
    "scripts/train/UniMed-CLIP/vit_b16.sh": "unimed-clip/vit-b16",
    "scripts/train/UniMed-CLIP/vit_b32.sh": "unimed-clip/vit-b32",
    "scripts/train/UniMed-CLIP/vit_l14_336.sh": "unimed-clip/vit-l14-336",
    "scripts/train/UniMed-CLIP/vit_l14_336_large_text.sh": "unimed-clip/vit-l14-336-large-text",
    "scripts/train/UniMed-CLIP/small.sh": "unimed-clip/small",
    "scripts/train/M3D-CLIP/pretrain.sh": "m3d-clip/pretrain",
}
"""Launchers of dual encoders, and the recipe that each of them runs."""


@pytest.fixture
def stub(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `medm` that appends its words to a file, in place of the command."""
    file = checkout / "bin" / "medm"
    file.parent.mkdir()
    file.write_text(
        '#!/bin/sh\nfor word in "$@"; do printf \'%s\\0\' "$word"; done >> command.txt\n'
    )
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{file.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("GPUS", "1")
    monkeypatch.setenv("NODES", "1")
    monkeypatch.chdir(checkout)
    return file


def words_of(line: str, checkout: Path) -> list[str]:
    """The words of the `medm` commands that a line runs."""
    file = checkout / "command.txt"
    file.unlink(missing_ok=True)
    subprocess.run(["bash", "-c", line], check=True, timeout=60)
    return file.read_text().split("\0")[:-1]


def test_every_launcher_of_pairs_runs_its_recipe(checkout: Path, stub: Path) -> None:
    folders = ("UniMed-CLIP", "M3D-CLIP")
    launchers = {
        f"scripts/train/{folder}/{path.name}"
        for folder in folders
        for path in (ROOT / "scripts/train" / folder).glob("*.sh")
    }
    others = {f"scripts/train/UniMed-CLIP/{name}.sh" for name in ("convert", "slurm")}
    assert launchers - others == set(PAIRS)
    for launcher, recipe in PAIRS.items():
        words = words_of(f"bash {launcher} train.max_steps=3", checkout)
        assert words[:2] == ["launch", "train"]
        name, *overrides = words[words.index(recipe) :]
        loaded = load_recipe(find(name), [word for word in overrides if "=" in word])
        assert loaded.train.max_steps == 3
        assert loaded.output_dir == f"work_dirs/{recipe}"
        # What the launcher writes is what the recipe says.
        assert loaded.model == load_recipe(find(name)).model
        assert loaded.data == load_recipe(find(name)).data


def test_every_launcher_of_motor_runs_its_recipe(checkout: Path, stub: Path) -> None:
    folder = ROOT / "scripts/train/MOTOR"
    launchers = {path.stem.replace("_", "-") for path in folder.glob("*.sh")} - {"convert"}
    assert {f"motor/{name}" for name in launchers} == {
        name for name in shipped() if name.startswith("motor/")
    }
    for name in launchers:
        line = f"bash scripts/train/MOTOR/{name.replace('-', '_')}.sh train.max_steps=3"
        words = words_of(line, checkout)
        recipe = load_recipe(find(f"motor/{name}"))
        loaded = load_recipe(find(f"motor/{name}"), words[words.index(f"motor/{name}") + 1 :])
        assert loaded.train.max_steps == 3
        assert (loaded.model, loaded.output_dir) == (recipe.model, recipe.output_dir)


def test_the_sets_of_motor_are_converted_and_scored_by_one_script_each(
    checkout: Path, stub: Path
) -> None:
    """The files that the recipes train on are those that convert.sh writes."""
    words = words_of("bash scripts/train/MOTOR/convert.sh 2>/dev/null || true", checkout)
    assert {word for word in words if word.startswith("studies/")} == {"studies/annotation"}
    written = set()
    for name in ("mimic-cxr-labels", "nih-chest-xray14", "vqa-rad", "slake"):
        words = words_of(f"SETS={name} bash scripts/train/MOTOR/convert.sh", checkout)
        written |= {word for word in words if word.startswith("data/motor/")}
    for name in ("mimic-cxr", "iu-xray"):
        written |= {f"data/motor/{name}-{split}.jsonl" for split in ("train", "val")}
    recipes = [load_recipe(find(name)) for name in shipped() if name.startswith("motor/")]
    for recipe in recipes:
        named = {source.path for source in [*recipe.data.train, *recipe.data.eval]}
        answers = recipe.model.answers
        assert named | ({answers.file} if answers else set()) <= written
    jobs = words_of("bash scripts/eval/motor.sh --limit 3", checkout)
    models = [jobs[place + 1] for place, word in enumerate(jobs) if word == "--model"]
    outputs = {recipe.output_dir for recipe in recipes}
    assert len(models) == 8 and set(models) <= outputs
    assert [word for word in jobs if word.startswith("rerank")] == ["rerank=256"] * 2


def test_a_launcher_of_pairs_trains(checkout: Path, stub: Path) -> None:
    recipe = "unimed-clip/small"
    data = shrink.records(recipe)
    tiny = [*shrink.overrides(recipe, checkout, steps=1), f'data.train=[{{"path": "{data}"}}]']
    line = "bash scripts/train/UniMed-CLIP/small.sh" + "".join(f" '{word}'" for word in tiny)
    done = medm(*words_of(line, checkout))
    assert done.code == 0, f"{done.out[-2000:]}\n{done.err[-4000:]}"
    assert (checkout / "work_dirs" / recipe / "model.safetensors").is_file()


def test_the_sources_of_unimed_are_converted_by_one_script(checkout: Path, stub: Path) -> None:
    words = words_of("bash scripts/train/UniMed-CLIP/convert.sh", checkout)
    tasks = {words[index + 1] for index, word in enumerate(words) if word == "--task"}
    published = {name for name in PAIR_SOURCES.names() if name.startswith("unimed/")}
    assert tasks == {name for name in published if not name.endswith("-labels")}
    words = words_of("SOURCES='rocov2 pmc-oa' bash scripts/train/UniMed-CLIP/convert.sh", checkout)
    assert words.count("convert") == 2
    assert words[2:][:5] == [
        "data/unimed/pmc-oa.jsonl",
        "--task",
        "unimed/pmc-oa",
        "--data",
        "data/pmc_oa",
    ]


def test_the_sets_of_unimed_clip_are_scored_by_one_launcher(checkout: Path, stub: Path) -> None:
    """Two of the 21 here: what is made for one set is made for each."""
    model = checkout / "model"
    for part in dual_encoder.make(dual_encoder.section(dual_encoder.save_tokenizer(model / "t"))):
        part.save_pretrained(model)
    for name, labels in (("breast-us", ("benign", "malignant")), ("meniscus-mri", ("0", "1"))):
        folder = checkout / "data" / "zero-shot" / name
        rows = [{"image": f"{n}.png", "label": label} for n, label in enumerate(labels * 2)]
        for row in rows:
            put_image(folder / row["image"], (20, 16))
        put_csv(folder / "test.csv", rows)
    line = f"MODEL={model} bash scripts/eval/unimed-clip.sh"
    words = words_of(line, checkout)
    refused = medm(*words)
    assert refused.code != 0
    assert "chexpert-5x200" in refused.err
    only = "'tasks.0.task.only=[breast-us,meniscus-mri]'"
    done = medm(*words_of(f"{line} tasks.0.task.rounds=20 {only}", checkout))
    assert done.code == 0, done.err
    assert "accuracy-mean-of-2-sets" in done.out
    report = next((checkout / "work_dirs" / "eval").rglob("report.html")).read_text()
    for word in ("breast-us", "meniscus-mri", "ultrasound", "mri"):
        assert word in report


def test_a_job_of_slurm_is_written_by_its_launcher(
    checkout: Path, stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tests/test_slurm.py` executes such a job."""
    monkeypatch.setenv("NODES", "4")
    monkeypatch.setenv("GPUS", "4")
    line = "bash scripts/train/UniMed-CLIP/slurm.sh --partition=gpu train.max_steps=3"
    words = words_of(line, checkout)
    assert words[:3] == ["launch", "slurm", "unimed-clip/vit-b16"]
    done = medm(*words)
    assert done.code == 0, done.err
    text = (checkout / "unimed-clip.sbatch").read_text()
    for option in ("--nodes=4", "--gpus-per-node=4", "--time=1-24:00:00", "--partition=gpu"):
        assert f"#SBATCH {option}\n" in text
    (recipe,) = (line for line in text.splitlines() if line.startswith("RECIPE="))
    name, *overrides = shlex.split(recipe.removeprefix("RECIPE=(").removesuffix(")"))
    loaded = load_recipe(find(name), overrides)
    assert (loaded.train.max_steps, loaded.output_dir) == (3, "work_dirs/unimed-clip/vit-b16")
    assert loaded.model == load_recipe(find(name)).model


def test_the_launchers_of_volumes_train(checkout: Path, stub: Path) -> None:
    """As they are, but that the command of `medm` is written down and run in this process, to save
    four starts."""
    for launcher, recipe in CT.items():
        data = shrink.records(recipe)
        tiny = shrink.overrides(recipe, checkout, steps=1)
        line = f"DATA={data} VOLUMES={data.parent} bash {launcher}" + "".join(
            f" '{override}'" for override in tiny
        )
        words = words_of(line, checkout)
        assert words[:2] == ["launch", "train"]
        done = medm(*words)
        assert done.code == 0, f"{line}\n{done.out[-2000:]}\n{done.err[-4000:]}"
        assert (checkout / "work_dirs" / recipe / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("row", "registries"),
    [
        ("vision encoders", [ENCODERS]),
        ("connectors", [CONNECTORS]),
        ("language models", [LLMS]),
        ("text encoders, knowledge", [TEXT_ENCODERS, KNOWLEDGE]),
        ("mask heads", [HEADS]),
    ],
)
def test_the_table_of_components_is_that_of_the_registries(
    row: str, registries: list[Registry[Any]]
) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    [line] = [line for line in readme.splitlines() if line.startswith(f"| {row} |")]
    names = [name for registry in registries for name in registry.names()]
    assert sorted(re.findall(r"`([^`]+)`", line)) == sorted(names)


def test_the_table_of_systems_names_recipes() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    table = readme[readme.index("| system |") : readme.index("| component |")]
    folders = {path.parent.name for path in (ROOT / "recipes").glob("*/*.yaml")}
    named = set(re.findall(r"`([^`]+)`", table))
    assert named <= folders
    # Demonstrations, and a model for comparison with another code base.
    own = {"motor-demo", "uni-med-demo", "tinyllava-phi2-siglip"}
    assert {name for name in folders - named if not name.startswith("quickstart")} == own


def test_the_version_to_cite_is_that_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["version"] == version
    assert f"version = {{{version}}}" in (ROOT / "README.md").read_text("utf-8")


def test_what_the_readme_points_to_is_there() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    missing = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not missing, "\n".join(missing)


def test_launchers_are_short_valid_and_have_their_paths_on_top() -> None:
    other = {
        "launch.sh",
        "convert.sh",
    }  # what launchers share, and the preparation of twelve data sets
    launchers = [path for path in (ROOT / "scripts").rglob("*.sh") if path.name not in other]
    assert launchers
    for path in [*launchers, ROOT / "scripts" / "launch.sh"]:
        subprocess.run(["bash", "-n", str(path)], check=True)
    for path in launchers:
        lines = path.read_text("utf-8").splitlines()
        assert os.access(path, os.X_OK), path
        assert len(lines) <= 15, path
        assert lines[1].startswith("# "), f"{path}: its second line says what it does"
        assert any(line.startswith("GPUS=") for line in lines), path
        # no path stands below the variables, but those of the recipe and of launch.sh
        body = "\n".join(lines[lines.index("set -euo pipefail") :])
        assert not re.search(r"work_dirs|data/", body), path


def test_two_machines_find_each_other(tmp_path: Path) -> None:
    """The same launcher on two nodes; here both are this machine, and they meet to answer two
    records."""
    model = save_tiny(tmp_path)
    data = write_records(tmp_path, questions(tmp_path, 2))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output = tmp_path / "out.jsonl"
    script = (
        f"source scripts/launch.sh; launch infer --model {model} --data {data} --output {output}"
        " --max-new-tokens 2 --device cpu --workers 0"
    )
    nodes = [
        subprocess.Popen(
            ["bash", "-c", script],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment()
            | {
                "NODES": "2",
                "NODE_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(2)
    ]
    printed = []
    for node in nodes:
        out, err = node.communicate(timeout=240)
        assert node.returncode == 0, err
        printed.append(out)
    assert [read_output(output)[index]["index"] for index in range(2)] == [0, 1]
    assert "2 records: 2 answered" in printed[0]
    assert printed[1] == "", "the machine of rank 0 speaks"


def test_a_launcher_trains_nothing_by_a_misspelt_word() -> None:
    done = subprocess.run(
        ["bash", "scripts/train/finetune.sh"],
        cwd=ROOT,
        env=environment() | {"TUNE": "lroa"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "TUNE=lroa: expected lora or full\n",
    )
