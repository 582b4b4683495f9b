"""`medm eval` of a dual encoder: a card's set is scored, resumed, and compared with files."""

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
from medm.inference.embedder import load_embedder
from medm.tasks.class_cards import read_card
from tests.models.dual_encoder import tiny
from tests.tasks.layouts import put_csv


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dual encoder in `model`, and `breast-us` in `data`."""
    root = tmp_path_factory.mktemp("zero")
    model, processor = tiny.make(tiny.section(tiny.save_tokenizer(root / "tokenizer")))
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    (root / "data").mkdir()
    rows = []
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"data/{index}.png")
        rows.append({"image": f"{index}.png", "label": ("benign", "malignant")[index % 2]})
    put_csv(root / "data/test.csv", rows)
    return root


def run(root: Path, output: Path, **block: Any) -> Any:
    task = {"name": "zero-shot", "card": "breast-us", "rounds": 50}
    section: dict[str, Any] = {
        "tasks": [{"task": task, "data": str(root / "data"), **block}],
        "output_dir": str(output),
    }
    if "predictions" not in block:
        section["model"] = str(root / "model")
    (report,) = evaluate(validate(EvalOptions, section, source="test")) or [None]
    return report


def test_scores_are_the_cosines_with_the_cards_ensembles(root: Path, tmp_path: Path) -> None:
    report = run(root, tmp_path)
    assert report.task == "zero-shot-breast-us"
    assert (report.n, report.answered) == (6, 6)
    embedder = load_embedder(str(root / "model"), device=torch.device("cpu"))
    card = read_card("breast-us")
    classes = embedder.ensembles([card.texts_of(name) for name in card.classes])
    images = embedder.images([root / f"data/{index}.png" for index in range(6)])
    logits = embedder.logits(images, classes)
    right = (logits.argmax(dim=1) == torch.arange(6) % 2).float().mean()
    by_name = {result.name: result for result in report.scores.results}
    assert by_name["accuracy"].value == pytest.approx(float(right))
    assert by_name["auroc"].low <= by_name["auroc"].value <= by_name["auroc"].high
    folder = tmp_path / "zero-shot-breast-us"
    assert {file.name for file in folder.iterdir()} >= {
        "items.jsonl", "predictions.jsonl", "results.json", "report.md", "report.html",
    }  # fmt: skip
    assert "Not for clinical use" in (folder / "report.md").read_text()


def test_its_file_of_predictions_scores_the_same(root: Path, tmp_path: Path) -> None:
    first = run(root, tmp_path / "a")
    file = tmp_path / "a/zero-shot-breast-us/predictions.jsonl"
    second = run(root, tmp_path / "b", predictions=str(file), against=str(file))
    values = [[(r.name, r.value) for r in one.scores.results] for one in (first, second)]
    assert values[0] == values[1]
    assert all(comparison.difference == 0 for comparison in second.comparisons)


def test_predictions_without_scores_are_refused(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"id": "breast-us:test:0.png", "text": "benign"}))
    with pytest.raises(RecipeError, match=r'zero-shot-breast-us: needs scores.*"scores"'):
        run(root, tmp_path / "o", predictions=str(file))


def test_a_dual_encoder_is_refused_where_text_is_scored(root: Path, tmp_path: Path) -> None:
    section = {
        "model": str(root / "model"),
        "tasks": [{"task": "vqa-rad", "data": str(root)}],
        "output_dir": str(tmp_path),
    }
    with pytest.raises(RecipeError, match=r"needs text; model .* gives scores and embeddings"):
        evaluate(validate(EvalOptions, section, source="test"))


def test_two_cards_stand_in_one_run_and_one_card_twice_does_not(root: Path) -> None:
    def section(*cards: str) -> dict[str, Any]:
        tasks = [{"task": {"name": "zero-shot", "card": card}, "data": "d"} for card in cards]
        return {"model": "m", "tasks": tasks}

    validate(EvalOptions, section("breast-us", "thyroid-us"), source="test")
    with pytest.raises(RecipeError, match="zero-shot-pcam occurs twice"):
        validate(EvalOptions, section("pcam", "my/pcam.yaml"), source="test")


def evaluated(root: Path, output: Path, task: dict[str, Any], data: Path) -> Any:
    section = {
        "model": str(root / "model"),
        "tasks": [{"task": {"rounds": 20, **task}, "data": str(data)}],
        "output_dir": str(output),
    }
    (report,) = evaluate(validate(EvalOptions, section, source="test")) or [None]
    return report


def test_retrieval_and_probe_score_the_vectors_of_the_model(root: Path, tmp_path: Path) -> None:
    captions = ["normal", "effusion", "mass", "left knee", "right brain", "a chest radiograph"]
    rows = [
        {"id": str(n), "image": f"{n}.png", "captions": [text]} for n, text in enumerate(captions)
    ]
    (root / "data/pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {"name": "retrieval", "path": "pairs.jsonl"}
    report = evaluated(root, tmp_path, task, root / "data")
    embedder = load_embedder(str(root / "model"), device=torch.device("cpu"))
    images = embedder.images([root / f"data/{n}.png" for n in range(6)])
    cosine = images.double() @ embedder.texts(captions).double().T
    first = (cosine.argmax(dim=1) == torch.arange(6)).float().mean()
    found = {result.name: result for result in report.scores.results}
    assert found["image-to-text-R@1"].value == pytest.approx(float(first))
    assert found["text-to-image-R@1"].n == 6
    assert (report.n, report.answered, report.scores.empty) == (6, 6, 0)
    folder = root / "data"
    (folder / "train.csv").write_text((folder / "test.csv").read_text())
    report = evaluated(root, tmp_path, {"name": "probe", "card": "breast-us", "l2": 1e-6}, folder)
    assert report.scores.results[0].value == 1  # scored on the files that it was trained on
    assert report.scores.results[0].n == 6
