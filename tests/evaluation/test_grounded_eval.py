"""A model with a mask head is scored on UniBiomed's folders, from questions to scores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from PIL import Image

from medm.config import validate
from medm.errors import RecipeError
from medm.evaluation.options import EvalOptions
from medm.evaluation.runner import evaluate
from medm.evaluation.task_report import TaskReport
from medm.models import build
from medm.models.lvlm.options import LVLMOptions
from tests import tiny
from tests.inference.grounded import answering, build_grounded
from tests.models import plain_head
from tests.tasks import layouts


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    with plain_head.registered():
        folder = tmp_path_factory.mktemp("grounded")
        model, processor = build_grounded(folder)
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        yield folder / "model", processor


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of noise, on which the random model draws something."""

    def put(path: Path, size: tuple[int, int] = (40, 30)) -> None:
        rng = np.random.default_rng([5, crc32(path.name.encode())])
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, size[::-1], dtype=np.uint8)).save(path)

    monkeypatch.setattr(layouts, "put_image", put)


def scored(task: str, data: Path, output: Path, **source: Any) -> TaskReport:
    content = {
        "tasks": [{"task": {"name": task, "rounds": 5}, "data": str(data)}],
        "output_dir": str(output),
        "cases": 1,
        "device": "cpu",
        "workers": 0,
        "batch_size": 2,
        "generation": {"max_new_tokens": 5},
    }
    if "predictions" in source:
        content["tasks"][0]["predictions"] = source["predictions"]  # type: ignore[index]
    else:
        content |= source
    reports = evaluate(validate(EvalOptions, content, source="test"))
    assert reports is not None
    return reports[0]


def values(report: TaskReport) -> dict[str, float]:
    return {result.name: result.value for result in report.scores.results}


def test_masks_of_a_model_are_scored_and_score_the_same_from_their_file(
    made: tuple[Path, Any], tmp_path: Path, noise: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = made
    answering(monkeypatch, processor, "It is [SEG].")
    layouts.unibiomed_seg2d(tmp_path / "data")
    report = scored("unibiomed-seg2d", tmp_path / "data", tmp_path / "out", model=str(model))
    assert (report.n, report.answered, report.scores.empty) == (4, 4, 0)
    folder = tmp_path / "out" / "unibiomed-seg2d"
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    dice = {}
    for line in lines:
        (span,) = line["spans"]
        drawn = np.asarray(Image.open(folder / span["mask"])) > 0
        truth = np.zeros((30, 40), dtype=bool)
        x1, y1, x2, y2 = layouts.BOX
        truth[y1:y2, x1:x2] = True
        dice[line["id"]] = 2 * (drawn & truth).sum() / (drawn.sum() + truth.sum())
    absent = dice.pop("ACDC:test:1")  # its truth is empty
    assert absent == 0
    drawn_anywhere = sum(line["spans"][0]["voxels"] > 0 for line in lines)
    assert drawn_anywhere > 0
    found = values(report)
    assert found["dice"] == pytest.approx(np.mean(list(dice.values())))
    voxels = {line["id"]: line["spans"][0]["voxels"] for line in lines}
    assert found["false-positive-rate"] == float(voxels["ACDC:test:1"] > 0)
    again = scored(
        "unibiomed-seg2d",
        tmp_path / "data",
        tmp_path / "again",
        predictions=str(folder / "predictions.jsonl"),
    )
    assert values(again) == found


def test_words_and_masks_are_scored_together(
    made: tuple[Path, Any], tmp_path: Path, noise: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = made
    answering(monkeypatch, processor, "[SEG]. polyp in colon endoscopy.")
    layouts.unibiomed_disease(tmp_path / "data")
    report = scored("unibiomed-disease", tmp_path / "data", tmp_path / "out", model=str(model))
    found = values(report)
    assert found["phrase-match"] == pytest.approx(2 / 3)
    assert 0 < found["paired-dice"] < 1


def test_a_reply_without_a_mask_says_that_nothing_is_there(
    made: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = made
    answering(monkeypatch, processor, "Nothing to see.")
    layouts.unibiomed_seg2d(tmp_path / "data")
    report = scored("unibiomed-seg2d", tmp_path / "data", tmp_path / "out", model=str(model))
    found = values(report)
    assert (found["dice"], found["missed-rate"], found["false-positive-rate"]) == (0, 1, 0)
    assert report.scores.empty == 0


def test_regions_are_drawn_for_a_model_that_reads_them(
    made: tuple[Path, Any], tmp_path: Path, noise: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts.unibiomed_region(tmp_path / "data")
    without, _ = made
    with pytest.raises(RecipeError, match=r"asks about regions.*without model\.regions"):
        scored("unibiomed-region", tmp_path / "data", tmp_path / "out", model=str(without))
    section = tiny.lvlm_section(tiny.save_llm("qwen2.5", tmp_path / "llm")) | {"regions": "draw"}
    model, processor = build(validate(LVLMOptions, section, source="test"))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    answering(monkeypatch, processor, "left kidney in abdomen CT")
    report = scored(
        "unibiomed-region", tmp_path / "data", tmp_path / "out", model=str(tmp_path / "model")
    )
    assert values(report)["phrase-match"] == pytest.approx(1 / 3)
