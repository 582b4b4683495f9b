"""`medm eval` of a tiny model of kind `blip`: retrieval with re-ranking, labels, reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medm.config import validate
from medm.errors import RecipeError
from medm.evaluation.options import EvalOptions
from medm.evaluation.runner import evaluate
from medm.evaluation.task_report import TaskReport
from tests.models.blip import tiny
from tests.models.dual_encoder import tiny as dual
from tests.models.dual_encoder.tiny import save_tokenizer

REPORTS = ("mass of the left lung", "normal", "effusion", "a chest radiograph", "normal", "mass")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model in `model`, and six studies of three patients in R2Gen's layout."""
    root = tmp_path_factory.mktemp("eval")
    model, processor = tiny.make(
        tiny.section(save_tokenizer(root / "tokenizer"), image={"views": 2})
    )
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    (root / "images").mkdir()
    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"images/{index}.png")
    rows = [
        {
            "id": f"s{n}", "subject_id": n // 2, "report": REPORTS[n], "label_index": [n % 2, n // 3],
            "image_path": [f"{n}.png", f"{6 + n}.png"][: 1 + n % 2],
        }
        for n in range(6)
    ]  # fmt: skip
    (root / "annotation.json").write_text(json.dumps({"val": rows, "test": rows}))
    return root


def score(root: Path, out: Path, task: dict[str, Any], **content: Any) -> TaskReport:
    block = {"task": {"rounds": 0, **task}, "data": str(root)}
    block |= {key: content.pop(key) for key in ("predictions", "split") if key in content}
    section = {
        "tasks": [block], "output_dir": str(out), "cases": 1, "workers": 0, "device": "cpu",
        "model": str(root / "model"),
    }  # fmt: skip
    reports = evaluate(validate(EvalOptions, {**section, **content}, source="test"))
    assert reports is not None
    return reports[0]


def values(report: TaskReport) -> dict[str, float]:
    return {result.name: result.value for result in report.scores.results}


def test_retrieval_is_ranked_again_by_the_models_matches(root: Path, tmp_path: Path) -> None:
    """Every pair that the task ranks again has a match, and a file of the same predictions scores
    the same."""
    task = {"name": "study-retrieval", "rerank": 2}
    report = score(root, tmp_path / "a", task)
    lines = [
        json.loads(line)
        for line in (tmp_path / "a/study-retrieval/predictions.jsonl").read_text().splitlines()
    ]
    images = np.array([line["embedding"] for line in lines])
    texts = np.array([line["text_embeddings"][0] for line in lines])
    cosines = images @ texts.T
    for place, line in enumerate(lines):
        best = np.argsort(-cosines[place], kind="stable")[:2]
        assert {f"s{other}" for other in best.tolist()} <= line["matches"].keys()
    total = np.full((6, 6), -np.inf)
    for place in range(6):
        for other in np.argsort(-cosines[place], kind="stable")[:2]:
            total[place, other] = cosines[place, other] + lines[place]["matches"][f"s{other}"]
    own = np.array([{1, 4} if n in (1, 4) else {n} for n in range(6)])
    hits = [int(np.argmax(total[n])) in own[n] for n in range(6)]
    assert values(report)["image-to-text-R@1"] == pytest.approx(np.mean(hits))
    assert report.scores.original  # two reports are equal
    again = score(
        root, tmp_path / "b", task, model=None,
        predictions=str(tmp_path / "a/study-retrieval/predictions.jsonl"),
    )  # fmt: skip
    assert values(again) == pytest.approx(values(report), nan_ok=True)
    resumed = score(root, tmp_path / "a", task)
    assert values(resumed) == pytest.approx(values(report), nan_ok=True)


def test_thresholds_of_the_validation_split_are_used_on_the_test_split(
    root: Path, tmp_path: Path
) -> None:
    task = {"name": "study-labels", "path": "annotation.json", "label_names": ["Effusion", "mass"]}
    val = score(root, tmp_path / "val", task, split="val")
    chosen = {name: value for name, value in values(val).items() if name.startswith("threshold[")}
    assert list(chosen) == ["threshold[Effusion]", "threshold[mass]"]
    results = tmp_path / "val/study-labels/results.json"
    test = values(score(root, tmp_path / "test", {**task, "thresholds": str(results)}))
    assert not any(name.startswith("threshold[") for name in test)
    lines = [
        json.loads(line)
        for line in (tmp_path / "test/study-labels/predictions.jsonl").read_text().splitlines()
    ]
    decided = [line["scores"]["effusion"] >= chosen["threshold[Effusion]"] for line in lines]
    truth = [n % 2 for n in range(6)]
    found = sum(a and b for a, b in zip(decided, truth, strict=True))
    f1 = 2 * found / (sum(decided) + sum(truth))
    assert test["validation-threshold/f1[Effusion]"] == pytest.approx(f1)
    with pytest.raises(RecipeError, match="its split is 'test'"):
        own = tmp_path / "test/study-labels/results.json"
        score(root, tmp_path / "wrong", {**task, "thresholds": str(own)})


def test_reports_are_written_from_the_images_alone(root: Path, tmp_path: Path) -> None:
    report = score(root, tmp_path / "a", {"name": "mimic-cxr"}, studies={"beams": 2})
    assert report.answered == 6
    items = (tmp_path / "a/mimic-cxr/items.jsonl").read_text().splitlines()
    assert "question" not in json.loads(items[0])
    assert report.metadata["studies"]["beams"] == 2


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "study-labels", "path": "annotation.json", "label_names": ["a", "mass"]},
         "scores 2 labels, and .* does not know a;"),
        ({"name": "medqa"}, "asks about text"),
    ],
)  # fmt: skip
def test_what_the_model_does_not_know_is_refused_before_weights(
    root: Path, tmp_path: Path, task: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if task["name"] == "medqa":
        from tests.tasks.layouts import LAYOUTS

        LAYOUTS["medqa"].build(tmp_path / "medqa")
        data = tmp_path / "medqa"
    else:
        data = root
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)
    block = {"task": task, "data": str(data)}
    section = {"tasks": [block], "output_dir": str(tmp_path / "out"), "model": str(root / "model")}
    with pytest.raises(RecipeError, match=message):
        evaluate(validate(EvalOptions, section, source="test"))


def test_a_dual_encoder_takes_the_first_image_of_a_study_and_no_labels(
    root: Path, tmp_path: Path
) -> None:
    model, processor = dual.make(dual.section(str(root / "tokenizer")))
    model.save_pretrained(tmp_path / "dual")
    processor.save_pretrained(tmp_path / "dual")
    own: dict[str, Any] = {"model": str(tmp_path / "dual")}
    with pytest.raises(RecipeError, match="3 items have several files, the first is 's1'"):
        score(root, tmp_path / "a", {"name": "study-retrieval"}, **own)
    found = score(root, tmp_path / "b", {"name": "study-retrieval", "images": "first"}, **own)
    assert found.answered == 6
    labels = {"name": "study-labels", "path": "annotation.json", "label_names": ["a", "b"]}
    with pytest.raises(RecipeError, match=r"scores labels by name, and .* scores texts"):
        score(root, tmp_path / "c", labels, **own)
