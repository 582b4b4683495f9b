"""The pages on adding parts, followed to the letter from outside the package; and what the other
pages promise."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import yaml
from packaging.version import Version

from tests import shrink
from tests.imaging.tiny import phantom, write_series
from tests.test_readme import run
from tests.test_versions import pins

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    """Fenced blocks of one language on a page of docs/."""
    fences = re.finditer(
        r"^```(\w*)\n(.*?)^```$", (DOCS / page).read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    return [fence[2] for fence in fences if fence[1] == language]


def ask(folder: Path, plugin: Path, code: str) -> Any:
    """The JSON that `code` prints in a fresh process outside the checkout, with the plug-in
    loaded."""
    script = (
        f"import json\nfrom medm.registry import load_plugin\nload_plugin({str(plugin)!r})\n{code}"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(900)
def test_add_a_connector(tmp_path: Path) -> None:
    (source,) = blocks("add-a-connector.md", "python")
    (tmp_path / "gated_connector.py").write_text(source)
    (tmp_path / "docs").symlink_to(DOCS)
    lines = [line for block in blocks("add-a-connector.md", "") for line in block.splitlines()]
    assert [line.split()[3] for line in lines] == ["list", "list", "train", "infer"]
    listed, options, train, infer = lines
    assert "linear layer, gated by the mean token" in run(listed, tmp_path).stdout
    assert "Width of the gate's hidden layer." in run(options, tmp_path).stdout

    small = [
        *shrink.overrides("medm-vl-2d/pretrain", tmp_path, steps=1),
        "data.train=[{path: docs/example_pretrain.json}]",
    ]
    done = run(train + "".join(f" '{override}'" for override in small), tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    model = tmp_path / "work_dirs" / "medm-vl-2d" / "pretrain"
    connector = json.loads((model / "config.json").read_text())["branches"]["image"]["connector"]
    assert connector == {"name": "gated", "hidden": 128}

    done = run(f"{infer} --max-new-tokens 3 --workers 0", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3
    without = run(
        infer.replace("--plugin gated_connector.py ", "").replace("answers", "others"), tmp_path
    )
    assert without.returncode != 0
    assert "unknown connector 'gated'" in without.stderr


def test_add_an_encoder(tmp_path: Path) -> None:
    (source,) = blocks("add-an-encoder.md", "python")
    plugin = tmp_path / "patches.py"
    plugin.write_text(source)
    shapes = ask(
        tmp_path,
        plugin,
        "import torch\nfrom medm.encoders import ENCODERS\nencoder = "
        "ENCODERS.get('patches')(architecture={'patch': 8, 'dim': 12})\nseen = "
        "encoder(torch.zeros(2, 3, 32, 16))\nprint(json.dumps([list(seen.tokens.shape), "
        "list(seen.grid), encoder.dim, encoder.prefix]))",
    )
    assert shapes == [[2, 8, 12], [4, 2], 12, 0]


def test_add_a_mask_head(tmp_path: Path) -> None:
    (source,) = blocks("add-a-mask-head.md", "python")
    plugin = tmp_path / "patch_head.py"
    plugin.write_text(source)
    lines = [line for block in blocks("add-a-mask-head.md", "") for line in block.splitlines()]
    assert [line.split()[2:5] for line in lines] == [["patch_head.py", "list", "heads"]] * 2
    listed, options = lines
    assert "dot product of the prompt with patches" in run(listed, tmp_path).stdout
    assert "Factor of the logits." in run(options, tmp_path).stdout
    shapes = ask(
        tmp_path,
        plugin,
        "import torch\nfrom medm.heads import HEADS\nhead = "
        "HEADS.get('patches')(architecture={'patch': 8, 'dim': 12})\nmasks = "
        "head(torch.zeros(2, 3, 32, 16), torch.ones(3, 12), torch.tensor([1, 1, 0]))\n"
        "print(json.dumps([[list(t.shape) for t in masks], list(head.grid((32, 16)))]))",
    )
    assert shapes == [[[3, 4, 2], [3], [3]], [4, 2]]


@pytest.mark.timeout(900)
def test_add_an_objective(tmp_path: Path) -> None:
    (source,), (section,) = (
        blocks("add-an-objective.md", "python"),
        blocks("add-an-objective.md", "yaml"),
    )
    (tmp_path / "reply_likelihood.py").write_text(source)
    (tmp_path / "docs").symlink_to(DOCS)
    lines = [line for block in blocks("add-an-objective.md", "") for line in block.splitlines()]
    assert [line.split()[3] for line in lines] == ["list", "list", "train"]
    listed, options, train = lines
    assert "likelihood of whole replies" in run(listed, tmp_path).stdout
    assert "long reports do not dominate" in run(options, tmp_path).stdout

    given = train.partition("'objective=")[2].removesuffix("'")
    assert yaml.safe_load(given) == yaml.safe_load(section)["objective"], (
        "the page shows two forms of one block"
    )
    small = [
        *shrink.overrides("medm-vl-2d/pretrain", tmp_path, steps=2),
        "data.train=[{path: docs/example_pretrain.json}]",
        "train.logging_steps=1",
    ]
    done = run(train + "".join(f" '{override}'" for override in small), tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    model = tmp_path / "work_dirs" / "medm-vl-2d" / "pretrain"
    logged = [json.loads(line) for line in (model / "loss.jsonl").read_text().splitlines()]
    entries = [entry for entry in logged if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert entry["loss"] == pytest.approx(
            entry["loss/tokens"] + entry["loss/replies"], rel=1e-5
        )
        assert entry["loss/replies"] > 0


def test_add_an_llm(tmp_path: Path) -> None:
    (source,) = blocks("add-an-llm.md", "python")
    plugin = tmp_path / "some_family.py"
    plugin.write_text(source)
    family = ask(
        tmp_path,
        plugin,
        "from medm.llms import LLMS\nf = "
        "LLMS.get('some-family')\nprint(json.dumps([f.model_types, f.template]))",
    )
    assert family == [["llama"], "vicuna"]


def test_the_example_of_the_geometry_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = phantom()
    monkeypatch.chdir(tmp_path)
    sitk.WriteImage(image, "ct.nii.gz")
    sitk.WriteImage(sitk.Cast(image > 200, sitk.sitkUInt8), "organs.nii.gz")
    source, _ = blocks("geometry.md", "python")
    assert len(source.strip().splitlines()) <= 10
    names: dict[str, Any] = {}
    exec(source, names)
    assert names["target"].shape == (32, 64, 64) and names["target"].any()
    # The phantom grows to the left, the back and the head: axes SPL, so that the first voxels are
    # the same corner.
    assert np.abs(names["corner"] - [[-0.3125, -0.34375, -0.296875]]).max() < 1e-9
    drawn, bone = sitk.ReadImage("drawn.nii.gz"), sitk.GetArrayFromImage(image) > 200
    assert drawn.GetSpacing() == image.GetSpacing() and drawn.GetOrigin() == image.GetOrigin()
    assert (sitk.GetArrayFromImage(drawn).astype(bool) & bone).sum() > 0.7 * bone.sum()


def test_the_dicom_example_of_the_geometry_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("highdicom", reason="highdicom comes with the extra 'dicom'")
    monkeypatch.chdir(tmp_path)
    frame = pydicom.uid.generate_uid()

    def complete(dataset: pydicom.Dataset, z: int) -> None:
        dataset.FrameOfReferenceUID = frame

    write_series(tmp_path / "ct_series", phantom(), change=complete)
    _, source = blocks("geometry.md", "python")
    names: dict[str, Any] = {}
    exec(source, names)
    seg = pydicom.dcmread("seg.dcm")
    assert seg.pixel_array.sum() == names["mask"].sum() > 0
    assert seg.FrameOfReferenceUID == frame


def test_add_a_pipeline(tmp_path: Path) -> None:
    (source,) = blocks("add-a-pipeline.md", "python")
    plugin = tmp_path / "captioned_images.py"
    plugin.write_text(source)
    (listed,) = [line for line in blocks("add-a-pipeline.md", "")[0].splitlines() if line]
    assert "an image and its caption" in run(listed, tmp_path).stdout
    (tmp_path / "a.jsonl").write_text(
        '{"image": "gone.png", "caption": "Clear."}\n{"caption": "Clear."}\n'
    )
    found = ask(
        tmp_path,
        plugin,
        "import sys\nfrom medm.data.check import check\nfrom medm.data.options import "
        "SourceOptions\nfrom medm.data.pipelines import PIPELINES\nreport = "
        "check([SourceOptions(path='a.jsonl')], "
        "PIPELINES.get('captioned-images')())\nprint(json.dumps([[error.field for error in report.bad], "
        "report.lines()[-1], 'torch' in sys.modules]))",
    )
    assert found == [
        ["image", "image"],
        "2 records, 2 bad; the good ones have 0 captions, no images or volumes, 0 text only",
        False,
    ]


def test_the_recipe_of_the_recipes_page_is_one() -> None:
    from medm.config import validate
    from medm.training.recipe import Recipe

    (text,) = blocks("recipes.md", "yaml")
    validate(Recipe, yaml.safe_load(text), source="docs/recipes.md")


def test_the_page_of_commands_is_current() -> None:
    from typer.main import get_command

    from medm.cli.app import app
    from medm.cli.pages import commands_page

    if (installed := Version(version("typer"))) < (locked := pins("locked")["typer"]):
        pytest.skip(
            f"typer {installed} describes arguments differently; the page is written with {locked}"
        )

    assert (DOCS / "cli.md").read_text("utf-8") == commands_page(get_command(app)), "run: make docs"
