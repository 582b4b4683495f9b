"""Every command that writes says in one message why a place cannot be written, before long work
where it can."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from medm.models import checkpoint
from tests import tiny
from tests.cli.runner import medm
from tests.inference.tiny import questions, save_image, save_tiny, write_records


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an image, records, a projector and a recipe."""
    folder = tmp_path_factory.mktemp("places")
    save_tiny(folder)
    save_image(folder / "a.png", 1)
    write_records(folder, questions(folder, 2))
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]
    (folder / "train.json").write_text(json.dumps([{"conversations": turns}] * 4))
    recipe = {
        "model": tiny.lvlm_section(folder / "llm"), "data": {"train": [{"path": str(folder / "train.json")}]},
        "parts": {"image.connector": {"tune": "full", "lr": 1e-3}}, "train": {"use_cpu": True, "max_steps": 1},
        "output_dir": "x",
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


COMMANDS: dict[str, Callable[[Path, str], tuple[str, ...]]] = {
    "infer": lambda world, out: (
        "infer",
        "--model",
        str(world / "model"),
        "--data",
        str(world / "in.json"),
        "--output",
        out,
    ),
    "infer --json": lambda world, out: (
        "infer",
        "--model",
        str(world / "model"),
        "--data",
        str(world / "in.json"),
        "--json",
        out,
        "--output",
        str(world / "out.jsonl"),
    ),
    "export": lambda world, out: (
        "export",
        out,
        "--model",
        str(world / "model"),
        "--format",
        "encoder",
    ),
    "import": lambda world, out: ("import", str(world / "llm"), out, "--kind", "clip"),
    "data preview": lambda world, out: ("data", "preview", str(world / "a.png"), out),
    "train": lambda world, out: ("train", str(world / "recipe.yaml"), f"output_dir={out}"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_place_below_a_file_is_an_error_message(
    name: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        checkpoint.AutoModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were read")
    )
    done = medm(*COMMANDS[name](world, str(world / "a.png" / "out.png")))
    assert done.code in (1, 2), done.out + done.err
    assert done.err.count("error: ") == 1
    assert str(world / "a.png") in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("name", ["infer", "infer --json", "export", "import", "train"])
def test_a_folder_that_cannot_be_made_is_an_error_message(
    name: str, code: int, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the system refuses it on a read-only or full file system; root may write anywhere else."""
    real = os.mkdir

    def refused(path: str, *arguments: int) -> None:
        if "/refused/" in f"{path}/":
            raise OSError(code, os.strerror(code), str(path))
        real(path, *arguments)

    monkeypatch.setattr(os, "mkdir", refused)
    done = medm(
        *COMMANDS[name](world, str(world / "refused" / "out")),
        *(["--device", "cpu"] if "infer" in name else []),
    )
    assert done.code == 1, done.out + done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert str(world / "refused") in line
    assert os.strerror(code) in line
    assert "Traceback" not in done.err
