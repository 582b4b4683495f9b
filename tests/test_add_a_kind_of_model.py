"""docs/add-a-kind-of-model.md, followed to the letter: a kind of model that lives in a plug-in file
alone is checked, trained, stopped, resumed and opened."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests.test_docs import ask, blocks
from tests.test_readme import run

PAGE = "add-a-kind-of-model.md"
SIDES = ("left", "right")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the page says to write, and images that are bright on the side their caption
    names."""
    folder = tmp_path_factory.mktemp("kind")
    (pipeline,) = blocks("add-a-pipeline.md", "python")
    (folder / "captioned_images.py").write_text(pipeline)
    kind, _ = blocks(PAGE, "python")
    (folder / "two_towers.py").write_text(kind)
    (recipe,) = blocks(PAGE, "yaml")
    (folder / "towers.yaml").write_text(recipe)
    records = []
    for index in range(16):
        pixels = np.random.default_rng(index).integers(0, 60, (64, 64), np.uint8)
        half = slice(0, 32) if index % 2 == 0 else slice(32, 64)
        pixels[:, half] += 150
        Image.fromarray(pixels).save(folder / f"{index}.png")
        records.append({"image": f"{index}.png", "caption": f"Bright on the {SIDES[index % 2]}."})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def commands() -> list[str]:
    return [line for block in blocks(PAGE, "") for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The model of the page's recipe."""
    *_, train, _ = commands()
    done = run(train, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "towers"


def test_the_page_lists_checks_and_estimates(folder: Path) -> None:
    listed, check, estimate, train, resume = commands()
    assert [line.split()[5] for line in (listed, check, estimate, train, resume)] == [
        "list", "data", "estimate", "train", "train",
    ]  # fmt: skip
    assert resume == f"{train} --resume"
    assert "image and caption to vectors in one space" in run(listed, folder).stdout
    checked = run(check, folder)
    assert checked.returncode == 0, checked.stderr[-4000:]
    assert "16 records" in checked.stdout
    assert "16 captions" in checked.stdout
    estimated = run(estimate, folder)
    assert estimated.returncode == 0, estimated.stderr[-4000:]
    assert "image.encoder" in estimated.stdout
    assert "text.encoder" in estimated.stdout


def test_a_bad_record_is_named(folder: Path, tmp_path: Path) -> None:
    plugins = commands()[0].removesuffix(" list models")
    (tmp_path / "bad.jsonl").write_text('{"image": "0.png", "caption": " "}\n')
    checked = run(
        f"{plugins} data check {tmp_path}/bad.jsonl --root . --recipe towers.yaml", folder
    )
    assert checked.returncode == 1
    assert "bad.jsonl" in checked.stdout
    assert "record 0, field 'caption': expected text" in checked.stdout


def test_the_plugin_trains_and_opens(folder: Path, trained: Path) -> None:
    losses = [json.loads(line) for line in (trained / "loss.jsonl").read_text().splitlines()]
    curve = [entry["loss"] for entry in losses if "loss" in entry]
    assert len(curve) == 20
    assert sum(curve[-4:]) < 0.9 * sum(curve[:4])
    assert yaml.safe_load((trained / "recipe.yaml").read_text())["model"]["kind"] == "two-towers"
    card = (trained / "README.md").read_text()
    assert "tags: [medical]" in card
    assert "A medical model trained with medm." in card
    assert "## Use" not in card
    _, opening = blocks(PAGE, "python")
    found = ask(
        folder,
        folder / "two_towers.py",
        opening + "print(json.dumps([type(model).__module__ + ' ' + type(processor).__name__, "
        "model.training, list(processor.preprocess)]))",
    )
    assert found[0].startswith("medm_plugin_two_towers_")
    assert found[0].endswith(" TwoTowersProcessor")
    assert found[1:] == [False, ["image"]]
    evaluated = run(
        commands()[0].removesuffix("list models") + "infer --model towers --data pairs.jsonl "
        "--output replies.jsonl",
        folder,
    )
    assert evaluated.returncode != 0
    assert "medm infer writes text; model towers gives nothing" in evaluated.stderr


def test_a_stopped_run_continues_bit_for_bit(folder: Path, trained: Path) -> None:
    again = folder / "again"
    shutil.copytree(trained / "checkpoint-10", again / "checkpoint-10")
    done = run(f"{commands()[-1]} output_dir=again", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (load_file(place / "model.safetensors") for place in (trained, again))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    assert [path.name for path in again.glob("checkpoint-*")].count("checkpoint-20") == 1


def test_objects_of_a_plugin_pass_between_processes(tmp_path: Path) -> None:
    (tmp_path / "shape.py").write_text("class Shape:\n    side = 3\n")
    load = f"from medm.registry import load_plugin; load_plugin({str(tmp_path / 'shape.py')!r})"
    code = {
        "dump": f"{load}; import pickle, sys; name = next(n for n in sys.modules if 'shape' in n); "
        "sys.stdout.buffer.write(pickle.dumps(sys.modules[name].Shape()))",
        "load": f"{load}; import pickle, sys; print(pickle.load(sys.stdin.buffer).side)",
    }
    dumped = subprocess.run(
        [sys.executable, "-c", code["dump"]], capture_output=True, check=True
    ).stdout
    loaded = subprocess.run(
        [sys.executable, "-c", code["load"]], input=dumped, capture_output=True, check=True
    )
    assert loaded.stdout.strip() == b"3"
