"""Notebooks of the documentation, run cell by cell with tiny models, and their commands."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

import medm as medm_api
from tests.cli.runner import medm
from tests.inference.grounded import answering, save_grounded
from tests.inference.tiny import awaken
from tests.models import plain_head
from tests.models.dual_encoder.tiny import make, save_tokenizer, section
from tests.models.test_lvlm_volume import build as build_both
from tests.tiny import save_llm

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOKS = DOCS / "notebooks"
MEDIA = DOCS / "examples_media"
ALL = sorted(file.name for file in NOTEBOOKS.glob("*.ipynb"))
REPLY = "It is a <p>bright disc</p>[SEG]."


def cells(name: str, kind: str) -> list[str]:
    """The source of the cells of one kind."""
    content = json.loads((NOTEBOOKS / name).read_text("utf-8"))
    assert content["nbformat"] == 4
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


def run_cells(name: str) -> dict[str, Any]:
    """Run the code of a notebook; returns its variables."""
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(cells(name, "code")):
        exec(compile(source, f"{name}, code cell {number}", "exec"), space)
    return space


def commands(text: str, verbs: str) -> list[list[str]]:
    """The arguments of the lines of a text that run medm."""
    return [
        shlex.split(line)[1:] for line in text.splitlines() if re.match(f"medm ({verbs}) ", line)
    ]


@pytest.fixture(scope="module")
def dual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dual encoder."""
    folder = tmp_path_factory.mktemp("model")
    for part in make(section(save_tokenizer(folder / "tokenizer"))):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    with plain_head.registered():
        yield save_grounded(tmp_path_factory.mktemp("grounded"))


@pytest.fixture
def grounded(saved: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model with a mask head that always replies `REPLY`."""
    folder, processor = saved
    answering(monkeypatch, processor, REPLY)
    return folder


def test_every_notebook_has_a_test_of_its_own() -> None:
    assert ALL == ["ask.ipynb", "grounded.ipynb", "zero_shot.ipynb"]


@pytest.mark.parametrize("name", ALL)
def test_it_is_committed_without_outputs(name: str) -> None:
    content = json.loads((NOTEBOOKS / name).read_text("utf-8"))
    for cell in content["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_zero_shot_runs(
    dual: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODEL", str(dual))
    monkeypatch.chdir(DOCS.parent)
    space = run_cells("zero_shot.ipynb")
    text = capsys.readouterr().out
    assert "(1, 20) (2, 20)" in text
    assert text.count(".png: ") == 2
    assert "grid: (2, 2)" in text
    rows = space["probabilities"].sum(dim=1)
    assert rows.tolist() == pytest.approx([1.0] * 3, abs=1e-5)


def test_the_commands_of_zero_shot_run(
    dual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(DOCS.parent)
    lines = commands("\n".join(cells("zero_shot.ipynb", "markdown")), "zero-shot|embed")
    assert len(lines) == 2
    for line in lines:
        named = [part.replace("models/unimed-b16", str(dual)) for part in line]
        done = medm(*(part.replace("work_dirs", str(tmp_path)) for part in named))
        assert done.code == 0, done.err
    assert len(list((tmp_path / "maps").iterdir())) == 4
    assert (tmp_path / "vectors.npz").is_file()


def test_ask_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    both = tmp_path / "model"
    llm = save_llm("qwen2.5", tmp_path / "llm", max_position_embeddings=2048)
    for part in build_both(llm):
        if isinstance(part, torch.nn.Module):
            awaken(part)
        part.save_pretrained(both)
    monkeypatch.setenv("IMAGE_MODEL", str(both))
    monkeypatch.setenv("VOLUME_MODEL", str(both))
    monkeypatch.setenv("OUTPUT", str(tmp_path))
    monkeypatch.chdir(DOCS.parent)
    space = run_cells("ask.ipynb")
    text = capsys.readouterr().out
    assert "reads: image volume" in text
    model = medm_api.load(str(both))
    asked = {
        "reply": ("Where is the disc?", {"image": MEDIA / "disc_left.png"}),
        "found": ("Describe the findings of this CT.", {"volume": MEDIA / "ball_left.nii.gz"}),
    }
    for name, (question, files) in asked.items():
        assert space[name] and space[name] == model.ask(question, **files, max_new_tokens=32)
        assert space[name] != model.ask(question, max_new_tokens=32), "the file is looked at"
        assert space[name] in text
    for name in ("image", "volume"):
        with Image.open(tmp_path / f"{name}.png") as sheet:
            assert sheet.format == "PNG"


def test_the_imports_of_ask_are_those_of_the_tutorials() -> None:
    """`tests/test_tutorials.py` runs them."""
    pages = "".join(page.read_text("utf-8") for page in (DOCS / "tutorials").glob("*.md"))
    shown = "\n".join(cells("ask.ipynb", "markdown")).replace("\\\n    ", "")
    found = commands(shown, "import")
    assert len(found) == 2
    for words in found:
        assert shlex.join(["medm", *words]) in pages.replace("\\\n    ", "")


def test_grounded_runs(
    grounded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MODEL", str(grounded))
    monkeypatch.setenv("OUTPUT", str(tmp_path))
    monkeypatch.chdir(DOCS.parent)
    space = run_cells("grounded.ipynb")
    text = capsys.readouterr().out
    assert "control tokens: [SEG] <p> </p>" in text
    assert text.count("It is a bright disc.\n") == 3
    assert "(96, 96) bool" in text
    assert f"with marks: {REPLY}" in text
    assert "characters 8 to 19: 'bright disc'" in text
    with Image.open(tmp_path / "masks" / "000-bright-disc.png") as file:
        assert file.size == (96, 96)
    with Image.open(tmp_path / "overlay.png") as sheet:
        assert sheet.format == "PNG"
    (mask,) = space["found"].masks
    written = sitk.ReadImage(str(tmp_path / "ball_0.nii.gz"))
    volume = sitk.ReadImage(str(MEDIA / "ball_left.nii.gz"))
    assert written.GetSpacing() == pytest.approx(volume.GetSpacing())
    assert (sitk.GetArrayFromImage(written).astype(bool) == mask.mask).all()
    assert mask.mask.shape == (20, 32, 32)
    assert np.unique(mask.mask).tolist() != [False]


def place_media(folder: Path, **files: tuple[str, ...]) -> None:
    for name, found in files.items():
        (folder / name).mkdir()
        for file in found:
            shutil.copy(MEDIA / file, folder / name)


def replies(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_the_commands_of_grounded_run(
    grounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_media(tmp_path, examples=("disc_left.png", "bars.jpg"), volumes=("ball_left.nii.gz",))
    monkeypatch.chdir(tmp_path)
    lines = commands("\n".join(cells("grounded.ipynb", "markdown")), "infer")
    assert len(lines) == 2
    for line in lines:
        done = medm(*(part.replace("models/unibiomed", str(grounded)) for part in line))
        assert done.code == 0, done.err
    images = replies(tmp_path / "work_dirs" / "segmentation.jsonl")
    assert [line["id"] for line in images] == ["bars.jpg", "disc_left.png"]
    for line in images:
        (span,) = line["spans"]
        assert span["phrase"] == "bright disc"
        assert (tmp_path / "work_dirs" / span["mask"]).suffix == ".png"
        assert (tmp_path / "work_dirs" / line["overlay"]).is_file()
    (volume,) = replies(tmp_path / "work_dirs" / "volumes.jsonl")
    assert (tmp_path / "work_dirs" / volume["spans"][0]["mask"]).name.endswith(".nii.gz")


def test_the_demos_in_the_table_of_unibiomed_run(
    grounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_media(tmp_path, examples=("disc_left.png",))
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "unibiomed.md").read_text("utf-8")
    lines = commands("\n".join(re.findall(r"`(medm infer [^`]*--folder[^`]*)`", page)), "infer")
    assert len(lines) == 3
    assert len({line[line.index("--prompt") + 1] for line in lines}) == 3
    for line in lines:
        done = medm(*(part.replace("models/unibiomed", str(grounded)) for part in line))
        assert done.code == 0, done.err
        (found,) = replies(tmp_path / line[line.index("--output") + 1])
        assert found["spans"][0]["mask"]
        assert (tmp_path / "work_dirs" / "demos" / found["overlay"]).is_file()
