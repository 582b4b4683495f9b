"""Flags of `medm infer` and `medm eval` are the fields of their options."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Field

from medm.cli import evaluate, infer
from medm.cli.option_flags import Typed, flags_of
from medm.config import Options
from medm.errors import RecipeError
from medm.evaluation.options import EvalOptions, EvalTaskOptions
from medm.inference.options import InferOptions
from medm.registry import NamedBlock
from medm.tasks import TASKS, TaskOptions
from tests.cli.runner import medm

# fmt: off
RUN = {
    "--max-new-tokens": ("generation.max_new_tokens", int, 256),
    "--temperature": ("generation.temperature", float, 0.0), "--batch-size": ("batch_size", int, 8),
    "--processes": ("processes", int, 1), "--workers": ("workers", int, None), "--device": ("device", str, "auto"),
    "--dtype": ("dtype", Literal["saved", "float32", "bfloat16", "float16"], "saved"),
    "--overwrite": ("overwrite", bool, False),
    "--presence-threshold": ("segmentation.presence_threshold", float, None),
    "--volume-mode": ("segmentation.volume_mode", Literal["slices", "memory", "volume"], None),
    "--slices": ("segmentation.slices", int, 5), "--slice-window": ("segmentation.slice_window", str, None),
    "--slice-choice": ("segmentation.slice_choice", Literal["first", "uniform", "score"], "uniform"),
    "--beams": ("studies.beams", int, 3), "--max-length": ("studies.max_length", int, None),
    "--min-length": ("studies.min_length", int, 5),
    "--knowledge": ("studies.knowledge", Literal["on", "off"], "on"),
}
INFER = RUN | {
    "--model": ("model", str, ...), "--data": ("data", str, None), "--output": ("output", str, ...),
    "--csv": ("csv_output", str, None), "--folder": ("folder", str, None), "--prompt": ("prompt", str, None), "--masks": ("masks", str, None),
    "--mask-format": ("mask_format", Literal["auto", "png", "nifti", "npy", "rle", "dicom-seg"], "auto"),
    "--answers": ("studies.answers", Literal["all", "text", "scores", "matches"], "all"),
    "--rle": ("rle", bool, False), "--overlays": ("overlays", bool, False),
    "--shard": ("shard", str, None), "--merge": ("merge", bool, False),
    "--only-failed": ("only_failed", bool, False),
    "--report-format": ("report_format", Literal["none", "dicom-sr"], "none"), "--reports": ("reports", str, None),
    "--root": ("root", str, None), "--json": ("json_output", str, None), "--limit": ("limit", int, None),
    "--top-k": ("generation.top_k", int, 0),
    "--top-p": ("generation.top_p", float, 1.0), "--seed": ("generation.seed", int, 0),
    "--compile": ("generation.compile", bool, False),
}
EVAL = RUN | {
    "--model": ("model", str, None), "--output": ("output_dir", str, "work_dirs/eval"), "--cases": ("cases", int, 8),
    "--data": ("tasks.0.data", str, ...), "--split": ("tasks.0.split", str, None), "--limit": ("tasks.0.limit", int, None),
    "--predictions": ("tasks.0.predictions", str, None), "--against": ("tasks.0.against", str, None),
}
# fmt: on
"""Flag to its key, type and default, as users know them."""


def field_at(key: str, options: type[Options]) -> Any:
    """The field that a dotted key names."""
    *blocks, last = key.split(".")
    for block in blocks:
        annotation = options.model_fields[block].annotation
        assert isinstance(annotation, type)
        options = annotation
    return options.model_fields[last]


@pytest.mark.parametrize(
    ("command", "expected"), [(infer, INFER), (evaluate, EVAL)], ids=["infer", "eval"]
)
def test_the_flags_are_the_known_ones_and_say_what_their_fields_say(
    command: Any, expected: dict[str, Any]
) -> None:
    flags = {flag.name: flag for flag in command.flags()}
    assert flags.keys() == expected.keys()
    for name, (key, kind, default) in expected.items():
        flag = flags[name]
        assert (flag.key, flag.annotation) == (key, kind), name
        inner = key.removeprefix("tasks.0.")
        options = (
            EvalTaskOptions if inner != key else (InferOptions if command is infer else EvalOptions)
        )
        field = field_at(inner, options)
        text = " ".join(field.description.split()).removesuffix(".")
        assert flag.help.startswith(text), name
        needed = command is infer and default is ... and inner != "output"  # not for --image
        assert flag.required == needed
        assert field.is_required() if default is ... else field.default == default, name
        shown = default not in (..., None) and default is not False
        assert (f"[default: {default}]" in flag.help) == shown, name


def test_help_prints_flags_and_defaults_without_torch() -> None:
    """And the list of commands without any options class."""
    script = (
        "import sys; from medm.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'pydantic') if name in sys.modules])"
    )
    for arguments, loaded in ((["--help"], "[]"), (["infer", "--help"], "['pydantic']")):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == loaded, arguments
    assert "--max-new-tokens" in done.stdout
    assert "[default: 256]" in done.stdout
    assert "[required]" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch-size", "0"], "--batch-size: expected greater than or equal to 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens: expected greater"),
        (["--json", "", "--limit", "-1"], "--limit: expected"),
        (["--top-p", "0.5"], "--top-p: top_p: nothing is sampled at temperature 0"),
        (
            ["--temperature", "0", "--top-p", "0.5"],
            "--temperature, --top-p: top_p: nothing is sampled",
        ),
        (["--seed", "-1"], "--seed: expected"),
        (["--dtype", "int8"], "Invalid value for '--dtype'"),
        (["--batch-size", "two"], "Invalid value for '--batch-size'"),
    ],
)
def test_messages_about_bad_values_name_the_flag(arguments: list[str], words: str) -> None:
    done = medm("infer", "--model", "m", "--data", "d", "--output", "o", *arguments)
    assert done.code == 2
    assert words in done.err
    assert "generation" not in done.err


def test_what_is_required_has_to_be_typed() -> None:
    done = medm("infer", "--model", "m", "--data", "d")
    assert done.code == 2
    assert "Missing option '--output'" in done.err


def test_a_bad_value_of_a_recipe_is_named_by_its_key(tmp_path: Path) -> None:
    recipe = tmp_path / "eval.yaml"
    block = {"task": "slake", "data": "d", "limit": 0}
    recipe.write_text(yaml.safe_dump({"tasks": [block], "model": "m", "batch_size": 0}))
    done = medm("eval", str(recipe), "--processes", "0", "--against", "x")
    assert done.code == 2
    assert "tasks.0.limit: expected" in done.err
    assert "batch_size: expected" in done.err
    assert "--processes: expected" in done.err
    assert "--limit" not in done.err
    assert "--batch-size" not in done.err


def test_flags_replace_single_keys_of_a_block() -> None:
    section = {"generation": {"top_p": 0.5, "temperature": 1.0}, "model": "a"}
    typed = Typed({"generation.temperature": 0.0, "batch_size": 2}, {})
    assert typed.under(section) == {
        "generation": {"top_p": 0.5, "temperature": 0.0},
        "model": "a",
        "batch_size": 2,
    }
    assert section["generation"] == {"top_p": 0.5, "temperature": 1.0}
    with pytest.raises(RecipeError, match="generation: expected a block of keys, found 'greedy'"):
        typed.under({"generation": "greedy"})


class Inner(Options):
    """A block."""

    rate: float = 0.5
    """Of something."""


class Base(Options):
    """Shared."""

    inner: Inner = Inner()
    """A block."""
    count: int | None = Field(default=None, ge=1)
    """How many."""


class Own(Base):
    """A command's options."""

    name: str
    """Who."""
    fast: bool = False
    """Quickly."""


def test_own_fields_come_before_inherited_ones() -> None:
    assert [flag.name for flag in flags_of(Own)] == ["--name", "--fast", "--rate", "--count"]
    assert [flag.required for flag in flags_of(Own)] == [True, False, False, False]
    assert not any(flag.required for flag in flags_of(Own, optional=True))
    left = flags_of(Own, leave_out=["inner.rate"], names={"count": "--number"}, place="part.")
    assert [flag.key for flag in left] == [
        "part.name",
        "part.fast",
        "part.inner.rate",
        "part.count",
    ]


class ListOptions(Options):
    items: list[str] = []
    """Several."""


class PartOptions(Options):
    part: Annotated[TaskOptions, NamedBlock(TASKS)]
    """A part and its options."""


class OnOptions(Options):
    check: bool = True
    """On."""


class TwiceOptions(Own):
    rate: float = 1.0
    """As the block's."""


@pytest.mark.parametrize(
    ("options", "words"),
    [(ListOptions, "ListOptions.items: .* cannot be typed"), (PartOptions, "PartOptions.part: .* cannot be typed"),
     (OnOptions, "OnOptions.check: on unless"),
     (TwiceOptions, "TwiceOptions: two fields are --rate")],
)  # fmt: skip
def test_fields_that_are_no_flags_are_refused(options: type[Options], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        flags_of(options)
