"""`medm eval` of a model that answers with masks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medm.config import validate
from medm.evaluation.options import EvalOptions
from medm.evaluation.runner import evaluate
from medm.metrics import masks
from tests.inference.grounded import answering, save_grounded
from tests.inference.tiny import read_output
from tests.models import plain_head
from tests.tasks import layouts


def test_masks_of_a_model_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Volumes as slices; probabilities of each voxel on the grid of the array."""
    layouts.m3d_seg(tmp_path / "data")
    with plain_head.registered():
        model, processor = save_grounded(tmp_path / "grounded")
        answering(monkeypatch, processor, "It is [SEG].")
        options = validate(
            EvalOptions,
            {
                "tasks": [
                    {"task": {"name": "m3d-seg", "rounds": 5}, "data": str(tmp_path / "data")}
                ],
                "model": str(model),
                "output_dir": str(tmp_path / "out"),
                "cases": 0,
                "device": "cpu",
                "workers": 0,
                "segmentation": {"slices": 2, "slice_choice": "first"},
            },
            source="test",
        )
        reports = evaluate(options)
    assert reports is not None
    folder = tmp_path / "out" / "m3d-seg"
    lines = read_output(folder / "predictions.jsonl")
    assert len(lines) == reports[0].n == 3
    dice = next(result for result in reports[0].scores.results if result.name == "dice")
    expected = []
    for line in lines:
        (span,) = line["spans"]
        soft = np.load(folder / span["mask"])
        assert (folder / span["mask"]).parent == folder / "masks"
        truth = np.load(tmp_path / "data" / line["id"])
        truth = truth[0] if truth.ndim == 4 else truth
        assert soft.shape == truth.shape
        assert 0 < soft.max() < 1
        expected.append(masks.dice_of(soft > 0.5, truth > 0))
    assert dice.per_item == pytest.approx(expected)
    results = json.loads((folder / "results.json").read_text())
    assert results["segmentation"]["slices"] == 2
