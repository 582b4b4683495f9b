"""Notebooks of the documentation, run cell by cell with a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.cli.runner import medm
from tests.models.dual_encoder.tiny import make, save_tokenizer, section

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"
ALL = sorted(file.name for file in NOTEBOOKS.glob("*.ipynb"))


def cells(name: str, kind: str) -> list[str]:
    """The source of the cells of one kind."""
    content = json.loads((NOTEBOOKS / name).read_text("utf-8"))
    assert content["nbformat"] == 4
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dual encoder."""
    folder = tmp_path_factory.mktemp("model")
    for part in make(section(save_tokenizer(folder / "tokenizer"))):
        part.save_pretrained(folder)
    return folder


def test_there_is_a_notebook() -> None:
    assert "zero_shot.ipynb" in ALL


@pytest.mark.parametrize("name", ALL)
def test_every_cell_runs(
    name: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODEL", str(model))
    monkeypatch.chdir(NOTEBOOKS.parents[1])
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(cells(name, "code")):
        exec(compile(source, f"{name}, code cell {number}", "exec"), space)
    text = capsys.readouterr().out
    assert "(1, 20) (2, 20)" in text
    assert text.count(".png: ") == 2
    assert "grid: (2, 2)" in text
    rows = space["probabilities"].sum(dim=1)
    assert rows.tolist() == pytest.approx([1.0] * 3, abs=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_the_commands_of_its_text_run(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(NOTEBOOKS.parents[1])
    text = "\n".join(cells(name, "markdown"))
    lines = [line for line in text.splitlines() if re.match("medm (zero-shot|embed) ", line)]
    assert len(lines) == 2
    for line in lines:
        line = line.replace("models/unimed-b16", str(model)).replace("work_dirs", str(tmp_path))
        done = medm(*shlex.split(line)[1:])
        assert done.code == 0, done.err
    assert len(list((tmp_path / "maps").iterdir())) == 4
    assert (tmp_path / "vectors.npz").is_file()


@pytest.mark.parametrize("name", ALL)
def test_it_is_committed_without_outputs(name: str) -> None:
    content = json.loads((NOTEBOOKS / name).read_text("utf-8"))
    for cell in content["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
