"""The wheel: it holds what runs need and nothing else, and works where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from medm.cli.recipes import shipped

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves its traces in the source folder."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("medm", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(target),
    ]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = target.glob("medm-*.whl")
    return file


def test_the_wheel_holds_every_file_of_the_package_and_no_other_folder(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        notes = {Path(name).name for name in archive.namelist() if ".dist-info/" in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "medm").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected | {f"medm/recipes/{name}.yaml" for name in shipped()}
    assert {"LICENSE", "NOTICE"} <= notes


def test_it_works_without_a_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import medm, sys; print(medm.__file__); sys.argv = ['medm', 'recipes', 'show', "
            "'medm-vl-2d/pretrain']; from medm.cli import main; main()",
        ],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert "siglip-base-patch16-256-multilingual" in done.stdout
