"""No process that medm starts imports from the working folder."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest

from medm import children
from medm.data.cached import fill
from medm.imaging.isolated import Decoder
from medm.launcher import Launcher, Place
from tests.planted import marks, plant

ROOT = Path(__file__).parents[1]
PROGRAM = Path(sys.executable).with_name("medm")

STARTS: dict[str, str] = {
    "medm/cli/launch.py: subprocess.run": "nvidia-smi, by its full path",
    "medm/cli/doctor.py: platform.system": "starts none: the name of the operating system",
    "medm/cli/slurm.py: subprocess.run": "sbatch",
    "medm/data/cached.py: DataLoader": "inside safe_path",
    "medm/environment.py: subprocess.run": "python -P",
    "medm/inference/batch.py: DataLoader": "forked, or inside main's safe_path",
    "medm/inference/batch.py: multiprocessing.get_context": "inside safe_path",
    "medm/inference/batch.py: context.Process": "inside safe_path",
    "medm/imaging/isolated.py: subprocess.Popen": "python -P",
    "medm/launcher.py: subprocess.Popen": "python -P",
    "medm/llms/template_bounds.py: psutil.Process": "starts none: reads the memory of this one",
    "medm/models/export/export.py: subprocess.run": "python -I",
    "medm/training/card.py: subprocess.run": "git",
    "medm/training/trainer.py: DataLoader": "forked, or inside main's safe_path",
    "benchmarks/cells/contrast.py: DataLoader": "without workers",
    "benchmarks/cells/ranks.py: context.Process": "inside safe_path",
    "benchmarks/cells/ranks.py: get_context": "inside safe_path",
    "benchmarks/cells/startup.py: subprocess.run": "python -P",
    "benchmarks/server.py: subprocess.Popen": "python -P",
    "benchmarks/cells/training.py: DataLoader": "forked; measured, not shipped",
}
"""Every place that starts a process, and why that process imports nothing from the working
folder."""

STARTERS = re.compile(
    r"^(subprocess|multiprocessing|mp)\.(?!parent_process|current_process|active_children)\w+$"
    r"|(^|\.)(Popen|get_context|set_start_method|Process|Pool|ProcessPoolExecutor|spawn\w*|exec[lv]\w*|posix_spawnp?"
    r"|fork|forkpty|system|popen|start_processes|DataLoader|StatefulDataLoader|load_inline|create_subprocess_\w+)$"
)


def calls(path: Path) -> Iterator[str]:
    """`subprocess.run`, `DataLoader` ...: the calls of a file that look as if they started a
    process."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and STARTERS.search(name := ast.unparse(node.func)):
            yield name


def test_every_place_that_starts_a_process_is_known() -> None:
    files = [
        path
        for folder in ("medm", "benchmarks", "scripts")
        for path in (ROOT / folder).rglob("*.py")
    ]
    found = {f"{path.relative_to(ROOT)}: {name}" for path in files for name in calls(path)}
    assert found == set(STARTS), (
        "does its process import from the working folder? Say in STARTS why not"
    )


def test_no_launcher_puts_the_working_folder_on_the_import_path() -> None:
    """`python -m medm` and `python -c` do; the `medm` program does not."""
    for path in (ROOT / "scripts").rglob("*.sh"):
        assert not re.search(
            r"python[\d.]* +-(m|c)\b|torchrun|deepspeed ", path.read_text("utf-8")
        ), path


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = plant(tmp_path)
    monkeypatch.chdir(folder)
    return folder


def test_the_trap_works(planted: Path) -> None:
    subprocess.run([sys.executable, "-c", "import json"], capture_output=True, check=False)
    assert marks(planted) == ["json"]


def test_decoding_a_compressed_dicom_imports_nothing_from_the_working_folder(
    planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", ["", str(planted), *sys.path])
    scan = Path(pydicom.__file__).parent / "data" / "test_files" / "MR_small_RLE.dcm"
    assert Decoder().decode(scan, "scan", max_items=64 * 64).shape == (1, 64, 64)
    assert marks(planted) == []


def load_nothing(path: Path, preprocess: object) -> np.ndarray:
    return np.zeros(1)


def test_spawned_processes_import_nothing_from_the_working_folder(planted: Path) -> None:
    with children.safe_path():
        script = "import multiprocessing as m; m.get_context('spawn').Queue()"
        done = subprocess.run(
            [PROGRAM.with_name("python"), "-c", script], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert fill([], {}, load_nothing, workers=1, start="spawn").files == 0
    assert marks(planted) == []
    assert "PYTHONSAFEPATH" not in os.environ


@pytest.mark.parametrize("processes", [1, 2])
def test_the_program_and_its_ranks_import_nothing_from_the_working_folder(
    planted: Path, processes: int
) -> None:
    """And one error is one message with its exit status, however many processes meet it."""
    command = [str(PROGRAM), "launch", "--processes", str(processes), "train", "no-such-recipe"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert marks(planted) == []
    assert done.returncode == 2
    assert done.stderr.count("no-such-recipe") == 1
    assert done.stderr.startswith("error: no-such-recipe: no such file")
    assert len(done.stderr.splitlines()) == 1


def test_python_m_medm_leaves_the_working_folder_out(tmp_path: Path) -> None:
    """torchrun and deepspeed start it so. What Python imports before medm's first line is beyond
    its reach."""
    (tmp_path / "yaml.py").write_text("raise SystemExit('planted')")
    command = [sys.executable, "-m", "medm", "train", "quickstart/finetune", "train.nothing=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "unknown key 'nothing'" in done.stderr
    assert "planted" not in done.stderr


def test_plugins_reach_every_process(planted: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plugin = planted / "mine.py"
    # One write a rank: pieces of a line would mix.
    plugin.write_text("import os; os.write(1, f\"loaded in {os.environ['RANK']}\\n\".encode())\n")
    command = [
        str(PROGRAM),
        "launch",
        "--processes",
        "2",
        "train",
        "no-such-recipe",
        "--plugin",
        "./mine.py",
    ]
    assert subprocess.run(command, check=False).returncode == 2
    # The rank that fails first stops the other, which may be before it has loaded anything.
    assert set(capfd.readouterr().out.splitlines()) & {"loaded in 0", "loaded in 1"}
    assert marks(planted) == []


def test_what_python_was_told_to_import_from_reaches_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(
        sys, "path", ["", str(tmp_path / "here"), str(tmp_path / "other"), "../here"]
    )
    assert children.import_path() == [str(tmp_path / "other")]
    # medm itself lies in the working folder: what is there is as trusted as medm
    monkeypatch.setattr(children, "_HOME", (tmp_path / "here").resolve())
    assert str(tmp_path / "here") in children.import_path()


def test_the_launcher_runs_medm_without_the_working_folder() -> None:
    assert Launcher(["train"], Place(2))._command[:2] == [sys.executable, "-P"]
