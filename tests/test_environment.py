"""Versions, extras and known incompatibilities of an environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medm.environment import Package, folder, incompatibilities, packages
from tests.cli.runner import medm


@pytest.mark.parametrize(
    ("installed", "state"),
    [("2.0", "ok"), ("2.4.9", "ok"), ("2.5", "untested"), ("1.9", "untested"), (None, "missing")],
)
def test_a_version_is_compared_with_the_tested_range(installed: str | None, state: str) -> None:
    assert Package("numpy", ">=2.0,<2.5", installed).state == state


def test_the_requirements_are_those_of_the_package() -> None:
    found = {(one.extra, one.name): one for one in packages()}
    assert found[None, "torch"].wanted == ">=2.10,<2.14"
    assert found["dicom", "highdicom"].wanted == ">=0.27,<0.29"
    assert not any(extra == "dev" for extra, _ in found)


def test_what_is_missing_or_untested_is_a_problem_and_a_missing_extra_is_none() -> None:
    required = [
        Package("einops", ">=0.8,<0.9", None),
        Package("numpy", ">=2.0,<2.5", "2.7"),
        Package("wandb", ">=0.19", None, extra="log"),
    ]
    first, second, *_ = incompatibilities(required)
    assert "einops is missing" in first and "pip install 'einops>=0.8,<0.9'" in first
    assert "numpy 2.7 is outside the range >=2.0,<2.5" in second
    assert not any("wandb" in line for line in incompatibilities(required))


def test_a_package_that_breaks_image_processors_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "torchvision"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('operator does not exist')")
    code = "from medm.environment import incompatibilities; print(*incompatibilities([]))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "torchvision is installed and cannot be imported" in done.stdout
    assert "operator does not exist" in done.stdout


def test_the_size_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(bytes(5))
    (tmp_path / "y").write_bytes(bytes(7))
    assert folder("cache", tmp_path).size == 12
    assert folder("cache", tmp_path / "none").size == 0


def test_the_command_prints_versions_and_caches(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(2**20))
    result = medm("doctor", "--json", "--cache", str(tmp_path))
    report = json.loads(result.out)
    assert report["problems"] == []
    assert report["packages"]["pydicom"].startswith("3.")
    assert report["caches"][str(tmp_path)] == 2**20
