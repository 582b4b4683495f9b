"""`medm`, `medm list`: what a person sees first; fast, complete, and calm about mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from medm.cli.catalogue import REGISTRIES, registry
from medm.cli.running import plugins_first
from tests.cli.runner import medm

PLUGIN = """
from medm.connectors import CONNECTORS, MLPOptions
from medm.connectors.base import Connector


@CONNECTORS.register("mine", "a connector of my own", options=MLPOptions)
class Mine(Connector):
    pass
"""


def test_list_shows_every_part_with_its_line() -> None:
    done = medm("list")
    assert done.code == 0
    lines = done.out.splitlines()
    for kind in REGISTRIES:
        assert kind in lines
        for entry in registry(kind).entries():
            assert any(
                line.split()[:1] == [entry.name] and line.endswith(entry.summary) for line in lines
            ), entry.name


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["medm-vl-2d/pretrain", "--learning_rate", "1e-4"], "write train.learning_rate=1e-4"),
        (["medm-vl-2d/pretrain", "--num-train-epochs=3"], "write train.num_train_epochs=3"),
        (["medm-vl-2d/pretrain", "--output_dir", "out"], "write output_dir=out"),
        (["medm-vl-2d/pretrain", "--train.seed", "3"], "write train.seed=3"),
        (["medm-vl-2d/pretrain", "--max_length", "512"], "write data.max_length=512"),
        (["--config", "r.yaml"], "the recipe comes without an option: medm {command} r.yaml"),
        (
            ["--cfg-path=r.yaml", "train.seed=3"],
            "the recipe comes without an option: medm {command} r.yaml",
        ),
        (["medm-vl-2d/pretrain", "--resum"], "no such option of 'medm {command}'"),
    ],
)
@pytest.mark.parametrize("command", ["train", "estimate"])
def test_options_of_other_trainers_are_answered_with_the_key(
    command: str, words: list[str], answer: str
) -> None:
    done = medm(command, *words)
    assert done.code == 2
    assert answer.format(command=command) in done.err
    assert "Traceback" not in done.err


def test_list_of_one_kind_and_of_one_part() -> None:
    assert [line.split()[0] for line in medm("list", "connectors").out.splitlines()] == [
        entry.name for entry in registry("connectors").entries()
    ]
    options = medm("list", "connectors", "mlp").out
    assert "depth" in options
    assert "Number of linear layers" in options
    assert "integer, ≥ 1" in options


def test_list_of_what_a_model_was_trained_to_name(tmp_path: Path) -> None:
    arguments = ("list", "concepts", "--model", str(tmp_path))
    assert "no config.json in it" in medm(*arguments).err
    (tmp_path / "config.json").write_text("{}")
    done = medm(*arguments)
    assert done.code != 0
    assert "no concepts.json in it" in done.err and "imported weights" in done.err
    found = {
        "min_records": 5, "records": 12, "other_phrases": 3, "unnamed_records": 1,
        "concepts": {"left lung": {"records": 9, "absent": 2}, "cyst": {"records": 5, "absent": 0}},
    }  # fmt: skip
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "concepts.json").write_text(json.dumps(found))  # of an export
    lines = medm(*arguments).out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:3]] == ["left lung", "cyst"]
    assert lines[1].split() == ["left", "lung", "9", "2"]
    assert "2 phrases of the masks of 12 records; 3 others, each in fewer than 5" in lines[-1]
    (tmp_path / "concepts.json").write_text('{"concepts": ["liver"]}')
    assert "expected 'concepts' with the number of records" in medm(*arguments).err
    assert medm("list", "concepts").code == 2
    assert medm("list", "tasks", "--model", str(tmp_path)).code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("list", "encodrs"), ["encodrs", "did you mean 'encoders'?"]),
        (("list", "connectors", "mpl"), ["mpl", "did you mean 'mlp'?"]),
        (
            ("recipes", "show", "medm-vl-2d/pretrian"),
            ["medm-vl-2d/pretrian", "did you mean 'medm-vl-2d/pretrain'?"],
        ),
        (("list", "--plugin", "nowhere.py"), ["nowhere.py", "no such file"]),
    ],
)
def test_mistakes_are_answered_without_a_traceback(
    arguments: tuple[str, ...], words: list[str]
) -> None:
    done = medm(*arguments)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert done.out == ""
    for word in words:
        assert word in done.err


def test_unknown_command_is_a_usage_error() -> None:
    done = medm("lst")
    assert done.code == 2
    assert "lst" in done.err


def test_plugin_stands_anywhere(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    script = "import sys; from medm.cli import main; main(sys.argv[1:])"
    for arguments in (
        ["--plugin", str(file), "list", "connectors"],
        ["list", "connectors", f"--plugin={file}"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        )
        assert "a connector of my own" in done.stdout


def test_plugins_first_keeps_the_rest_in_order() -> None:
    assert plugins_first(["train", "a.yaml", "--plugin", "p.py", "x=1", "--plugin=q.py"]) == [
        "--plugin",
        "p.py",
        "--plugin=q.py",
        "train",
        "a.yaml",
        "x=1",
    ]
    assert plugins_first(["train", "--", "--plugin", "p.py"]) == ["train", "--", "--plugin", "p.py"]
    assert plugins_first(["list", "--plugin"]) == ["--plugin", "list"]


def test_long_lines_are_not_cut_in_a_pipe() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "medm", "list", "encoders"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "20", "PATH": ""},
    )
    for entry in registry("encoders").entries():
        assert f"{entry.summary}\n" in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["train", "--help"]])
def test_what_a_person_types_first_loads_no_torch(arguments: list[str]) -> None:
    script = (
        "import sys; from medm.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'transformers', 'monai', 'SimpleITK'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
