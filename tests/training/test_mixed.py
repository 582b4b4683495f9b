"""Images, volumes and text mixed on two processes under ZeRO-3, which hangs if one of them skips a
branch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import medm.models
from medm.training.run import train
from tests.launch import needs_compiler, on_two_processes
from tests.training.mixed import STEPS, recipe, write_inputs

BRANCHES = ("image", "volume")


def losses(folder: Path) -> list[float]:
    entries = map(json.loads, (folder / "loss.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixed")
    write_inputs(path)
    on_two_processes("tests.training.mixed", str(path))
    return path


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in (0, 1)]


@needs_compiler
def test_it_finishes_though_processes_see_different_branches(results: list[dict[str, Any]]) -> None:
    assert all(result["finished"] for result in results)
    seen = [result["seen"] for result in results]
    assert len(seen[0]) == len(seen[1]) == STEPS
    for branch in BRANCHES:
        assert any(
            (branch in one) != (branch in other) for one, other in zip(*seen, strict=True)
        ), branch


@needs_compiler
def test_every_part_has_its_gradient_where_one_of_the_processes_sees_its_branch(
    results: list[dict[str, Any]],
) -> None:
    assert results[0]["norms"] == results[1]["norms"]
    for step, norms in enumerate(results[0]["norms"]):
        assert norms["llm"] > 0
        for branch in BRANCHES:
            seen = any(branch in result["seen"][step] for result in results)
            for part in ("encoder", "connector"):
                assert (norms[f"{branch}.{part}"] > 0) == seen, (step, branch, part, norms)
    for branch in BRANCHES:
        assert sum(norms[f"{branch}.encoder"] > 0 for norms in results[0]["norms"]) >= 2


@needs_compiler
def test_curve_and_replies_are_those_of_one_process_without_deepspeed(
    folder: Path, tmp_path: Path
) -> None:
    """Five items on two ranks: images, volumes and text, whose replies are of unlike lengths."""
    train(recipe(folder, tmp_path / "alone", batch=2, deepspeed=False))
    alone = losses(tmp_path / "alone")
    assert len(alone) == STEPS
    assert losses(folder / "out") == pytest.approx(alone, abs=1e-4)
    ours, theirs = (
        (path / f"samples/custom-{STEPS}.jsonl").read_text()
        for path in (folder / "out", tmp_path / "alone")
    )
    assert ours == theirs
    assert len(ours.splitlines()) == 5


@needs_compiler
def test_the_result_opens_as_one_model_with_both_branches(folder: Path) -> None:
    model, processor = medm.models.load(str(folder / "out"))
    assert set(model.branches) == set(processor.branches) == set(BRANCHES)
