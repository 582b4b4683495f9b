"""What git ignores: a user's images and runs, and nothing of the package."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "path",
    [
        "data/finetune.json",
        "data/volumes/p1.nii.gz",
        "work_dirs/finetune/config.json",
        "models/a/config.json",
    ],
)
def test_the_folders_of_a_users_images_and_runs_are_ignored(path: str) -> None:
    assert git("check-ignore", path).returncode == 0


@pytest.mark.parametrize(
    "path", ["medm/data/new.py", "tests/data/new.py", "examples/quickstart/data/new.nii.gz"]
)
def test_folders_of_the_same_name_deeper_down_are_not(path: str) -> None:
    assert git("check-ignore", path).returncode == 1


def test_no_tracked_file_is_ignored() -> None:
    assert git("ls-files", "--cached", "--ignored", "--exclude-standard").stdout == ""
