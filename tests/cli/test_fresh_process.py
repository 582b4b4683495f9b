"""Every documented command, run as people run it: in a process of its own, where nothing was
imported before.

Commands run in one process with the tests find classes registered that nobody registered for them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pydicom
import pytest
import torch
import yaml
from transformers import SiglipVisionConfig, SiglipVisionModel
from typer.core import TyperGroup
from typer.main import get_command

import medm.models
from medm.cli.app import app
from medm.config import validate
from medm.models.lvlm.options import LVLMOptions
from tests import tiny
from tests.data.archive import small_archive
from tests.encoders.tiny import TINY_ENCODERS
from tests.imaging.tiny import phantom, write_series
from tests.models.dual_encoder import tiny as dual_tiny
from tests.tasks.layouts import LAYOUTS

ROOT = Path(__file__).parents[2]
SHORT = ["--max-new-tokens", "2", "--workers", "0", "--device", "cpu"]

CASES: list[tuple[str, list[str]]] = [
    ("list", ["encoders"]),
    ("list", ["connectors", "mlp"]),
    ("recipes list", []),
    ("recipes show", ["medm-vl-2d/finetune", "train.learning_rate=1e-5"]),
    ("reference", ["commands"]),
    ("data check", ["docs/example_finetune.json", "--decode"]),
    ("data check", ["docs/example_finetune.json", "--model", "model"]),
    ("data check", ["--recipe", "second.yaml"]),
    ("data preview", ["docs/examples_media/bars.jpg", "bare.png", "size=[32,32]"]),
    ("data preview", ["docs/examples_media/disc_left.png", "of-model.png", "--model", "model", "--branch", "image"]),
    ("data preview", ["docs/examples_media/ball_left.nii.gz", "of-recipe.png", "--recipe", "second.yaml"]),
    ("data cache", ["volumes.yaml", "init_from=model", "--workers", "0"]),
    ("data convert published", ["converted.jsonl", "--task", "m3d-cap", "--data", "benchmark"]),
    ("data convert csv", ["pictures.csv", "csv.jsonl", "--image-column", "file", "--text-column", "text",
                          "--root", "docs/examples_media"]),
    ("data convert folder", ["docs/examples_media", "folder.jsonl", "--kind", "image"]),
    ("data convert dicom", ["studies", "studies.jsonl", "--reports", "reports.csv", "--val", "0.5"]),
    ("data convert rows", ["alpaca.json", "rows.jsonl"]),
    ("data split", ["patients.jsonl", "--by", "patient", "--val", "0.5", "--root", "docs/examples_media"]),
    ("data leaks", ["patients.jsonl", "docs/example_finetune.json"]),
    ("data clean", ["studies", "cleaned"]),
    ("data fetch-dicomweb", ["ARCHIVE", "fetched", "--study", "1.2.3"]),
    ("data store-dicomweb", ["ARCHIVE", "studies"]),
    ("data triplets", ["pairs.jsonl", "triplets.json", "--field", "caption"]),
    ("data answers", ["answers.json", "docs/example_study_questions.json"]),
    ("data shards", ["pairs.shards.json", "pairs.jsonl", "--root", "docs/examples_media"]),
    ("train", ["second.yaml"]),
    ("launch", ["--processes", "1", "infer", "--model", "model", "--data", "docs/example_inference.json", *SHORT,
                "--output", "launched.jsonl"]),
    ("launch slurm", ["volumes.yaml", "--nodes", "2", "--output", "volumes.sbatch"]),
    ("infer", ["--model", "model", "--data", "docs/example_inference.json", "--output", "a.jsonl", *SHORT]),
    ("eval", ["--model", "model", "--task", "custom", "--data", "docs", "--option", "path=example_finetune.json",
              "--option", "metrics=[exact-match]", "--output", "scores", *SHORT]),
    ("chat", ["--model", "model", "--image", "docs/examples_media/disc_left.png", "--device", "cpu",
              "--max-new-tokens", "2"]),
    ("zero-shot", ["docs/examples_media/bars.jpg", "--model", "dual", "--labels", "knee; brain",
                   "--heatmap", "maps"]),
    ("embed", ["docs/examples_media", "--model", "dual", "--output", "vectors.npz"]),
    ("estimate", ["second.yaml"]),
    ("doctor", ["--json"]),
    ("export", ["merged", "--model", "model", "--format", "merged", "--max-new-tokens", "2"]),
    ("import", ["siglip", "imported", "--kind", "siglip"]),
]  # fmt: skip
"""Commands and arguments, in a folder made by `world`. No two of them write to one place."""

RUN_ELSEWHERE = {
    "serve": "tests/serving/test_page.py starts it, asks it and ends it",
    "playground": "tests/serving/test_playground_page.py does the same in a browser",
}
"""Commands that do not end by themselves."""
TYPED = {"chat": "Where is the disc?\n/quit\n"}
FREE_OF_TORCH = [
    "list", "recipes list", "recipes show", "reference", "data convert published", "data convert csv",
    "data convert folder", "data convert dicom", "data convert rows", "data split", "data leaks", "launch slurm",
]  # fmt: skip


def leaves(command: Any, path: str = "") -> Iterator[str]:
    """Every command below one, by its words."""
    members = getattr(command, "commands", {})
    if not isinstance(command, TyperGroup):
        yield path
    for name, member in members.items():
        yield from leaves(member, f"{path} {name}".strip())


def test_every_command_is_run() -> None:
    """A new command needs a line in CASES."""
    assert {command for command, _ in CASES} | {*RUN_ELSEWHERE} == set(leaves(get_command(app)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of images and volumes, a second stage on it, a benchmark, a published encoder,
    the docs."""
    folder = tmp_path_factory.mktemp("fresh")
    (folder / "docs").symlink_to(ROOT / "docs")
    section = tiny.lvlm_section(
        tiny.save_llm("qwen2.5", folder / "llm", max_position_embeddings=2048)
    )
    volume = TINY_ENCODERS["m3d-clip"]
    section["branches"]["volume"] = {
        "encoder": {key: value for key, value in volume.block.items() if key != "image_size"},
        "connector": {"name": "mlp"},
        "preprocess": {"size": list(volume.pixels[1:]), "scale": "minmax"},
    }
    torch.manual_seed(1)
    model, processor = medm.models.build(validate(LVLMOptions, section, source="test"))
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text('{"id": "1", "image": "bars.jpg", "caption": "bars"}\n')
    dual, dual_processor = dual_tiny.make(
        dual_tiny.section(dual_tiny.save_tokenizer(folder / "tokenizer"))
    )
    dual.save_pretrained(folder / "dual")
    dual_processor.save_pretrained(folder / "dual")
    second: dict[str, Any] = {
        "model": section, "init_from": "model", "data": {"train": [{"path": "docs/example_finetune.json"}]},
        "parts": {"image.connector": "full"}, "output_dir": "trained",
        "train": {"max_steps": 1, "use_cpu": True, "per_device_train_batch_size": 1, "dataloader_num_workers": 0},
    }  # fmt: skip
    (folder / "second.yaml").write_text(yaml.safe_dump(second))
    volumes = second | {
        "data": {"train": [{"path": "docs/example_finetune_3d.json"}], "cache": {"dir": "cache"}},
        "init_from": None,
    }
    (folder / "volumes.yaml").write_text(yaml.safe_dump(volumes))
    LAYOUTS["m3d-cap"].build(folder / "benchmark")
    SiglipVisionModel(SiglipVisionConfig(**tiny.VIT)).save_pretrained(folder / "siglip")
    write_hospital(folder)
    return folder


def write_hospital(folder: Path) -> None:
    """Two DICOM studies with reports, a table, rows of another program, records of patients."""
    for number in (1, 2):

        def named(dataset: Any, z: int, number: int = number) -> None:
            dataset.StudyInstanceUID, dataset.PatientID = f"1.2.{number}", str(number)

        for file in write_series(folder / "studies" / str(number), phantom(), change=named):
            file.rename(file.with_suffix(".dcm"))
    (folder / "reports.csv").write_text("StudyInstanceUID,report\n1.2.1,Clear.\n1.2.2,Effusion.\n")
    (folder / "pictures.csv").write_text("file;text\nbars.jpg;Bars.\n")
    (folder / "alpaca.json").write_text('[{"instruction": "Say A.", "output": "A"}]')
    pairs = ('{"patient": 1, "image": "bars.jpg", "caption": "bars"}',
             '{"patient": 2, "image": "disc_left.png", "caption": "disc"}')  # fmt: skip
    (folder / "patients.jsonl").write_text("\n".join(pairs) + "\n")


@pytest.fixture(scope="module")
def archive(world: Path) -> Iterator[str]:
    """Address of a DICOMweb archive that holds the study 1.2.3."""
    with small_archive() as server:
        one = pydicom.dcmread(next((world / "studies" / "1").iterdir()))
        one.StudyInstanceUID = "1.2.3"
        server.stored.append(one)
        yield server.url


@pytest.fixture(scope="module")
def done(world: Path, archive: str) -> list[subprocess.CompletedProcess[str]]:
    """Every case, two at a time: most of a case is importing torch on one core."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "120",
        "PYTHONWARNINGS": "default",
    }

    def run(case: tuple[str, list[str]]) -> subprocess.CompletedProcess[str]:
        command, arguments = case
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "medm",
                *command.split(),
                *(archive if word == "ARCHIVE" else word for word in arguments),
            ],
            cwd=world,
            env=environment,
            input=TYPED.get(command, ""),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, CASES))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=[" ".join([c, *a])[:60] for c, a in CASES]
)
def test_it_works_in_a_process_of_its_own(
    number: int, done: list[subprocess.CompletedProcess[str]]
) -> None:
    found = done[number]
    told = f"{found.args}\n{found.stdout[-2000:]}\n{found.stderr[-4000:]}"
    assert found.returncode == 0, told
    assert "Traceback" not in found.stdout + found.stderr, told
    # Neither a warning that medm says, nor one of Python's about a line of medm.
    assert not re.search(r"^(\d\d:\d\d:\d\d  )?(warning|error): ", found.stderr, re.MULTILINE), told
    assert not re.search(r"/medm/\S+\.py:\d+: \w*Warning", found.stderr), told


def test_they_did_what_they_say(world: Path, done: list[subprocess.CompletedProcess[str]]) -> None:
    by_case = {
        " ".join([command, *arguments]): run
        for (command, arguments), run in zip(CASES, done, strict=True)
    }
    checked = by_case["data check docs/example_finetune.json --model model"].stdout
    assert " 0 bad;" in checked
    assert "tokens" in checked
    assert "tokens" in by_case["data check --recipe second.yaml"].stdout
    for name in ("bare.png", "of-model.png", "of-recipe.png"):
        assert (world / name).stat().st_size > 1000
    assert "3 files, 0 bad" in by_case["data cache volumes.yaml init_from=model --workers 0"].stdout
    assert (world / "trained" / "model.safetensors").is_file()
    assert len((world / "a.jsonl").read_text().splitlines()) == len(
        (world / "launched.jsonl").read_text().splitlines()
    )
    assert (world / "scores" / "custom").is_dir()
    assert (world / "merged" / "model.safetensors").is_file()
    assert (world / "imported" / "config.json").is_file()
    assert (world / "studies.val.jsonl").is_file() and (world / "patients.train.jsonl").is_file()
    assert len(list((world / "cleaned").rglob("*.dcm"))) == 24
    assert (world / "fetched" / "study-0001" / "series-0001" / "000001.dcm").is_file()
    assert "24 files stored" in next(
        run.stdout for case, run in by_case.items() if "store-dicomweb" in case
    )


def test_commands_that_need_no_torch_import_none(world: Path) -> None:
    """One process for all of them; each answers at once."""
    calls = [
        [*command.split(), *arguments] for command, arguments in CASES if command in FREE_OF_TORCH
    ]
    script = (
        "import json, sys\nfrom medm.cli import main\nfor call in json.loads(sys.argv[1]):\n    "
        "try:\n        main(call)\n    except SystemExit as stop:\n        assert not stop.code, "
        "call\n    assert 'torch' not in sys.modules, call\n"
    )
    calls = [
        ["again.jsonl" if word == "converted.jsonl" else word for word in call] for call in calls
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(calls)],
        cwd=world,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
