"""Retrieval with several captions and ties, and classifiers on vectors, by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medm.errors import DataError, RecipeError
from medm.metrics.base import MetricResult
from medm.tasks.base import FAILED, join_predictions
from medm.tasks.probe import Probe, fit
from medm.tasks.retrieval import Retrieval
from tests.tasks.layouts import put_csv, put_image
from tests.tasks.test_zero_shot import write_card


def retrieved(
    folder: Path, captions: list[list[str]], vectors: list[Any], rounds: int = 0
) -> dict[str, MetricResult]:
    rows = [{"image": f"{n}.png", "captions": own} for n, own in enumerate(captions)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = Retrieval(path="pairs.jsonl", rounds=rounds)
    records = join_predictions(task.samples(folder), {})
    for record, given in zip(records, vectors, strict=True):
        if given is None:
            record[FAILED] = "cannot be read"
        else:
            record["embedding"], record["text_embeddings"] = given
    return {result.name: result for result in task.score(records).results}


def test_several_captions_an_image_count_both_ways(tmp_path: Path) -> None:
    one, two, between = [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]
    found = retrieved(
        tmp_path,
        [["a", "b"], ["c", "d"]],
        # Image one: caption b is nearest to image two. Image two: caption c is at image one.
        [(one, [one, between]), (two, [[2.0, 0.1], two])],
    )
    # Image one sees a (1), c (.999), b (.6), d (0): a is first. Image two sees d (1) first.
    assert found["image-to-text-R@1"].value == 1
    assert found["image-to-text-R@1"].n == 2
    # Captions a and d find their image, b (.6 against .8) and c do not.
    assert found["text-to-image-R@1"].value == 2 / 4
    assert found["text-to-image-R@1"].n == 4
    assert found["text-to-image-median-rank"].value == 1.5
    assert "|cluster:image" in found["text-to-image-R@1"].signature
    assert "|cluster" not in found["image-to-text-R@1"].signature


def test_ties_count_against_the_query(tmp_path: Path) -> None:
    same = [1.0, 1.0]
    found = retrieved(tmp_path, [["a"], ["b"], ["c"]], [(same, [same])] * 3)
    assert found["image-to-text-R@1"].value == 0
    assert found["image-to-text-median-rank"].value == 3


def test_an_equal_caption_is_right_for_each_of_its_images(tmp_path: Path) -> None:
    one, two = [1.0, 0.0], [0.0, 1.0]
    found = retrieved(
        tmp_path, [["no  finding"], ["no finding"], ["mass"]],
        [(one, [two]), (two, [one]), ([-1.0, -1.0], [[-1.0, -1.0]])],
    )  # fmt: skip
    assert found["image-to-text-R@1"].value == 1
    assert found["text-to-image-R@1"].value == 1


def test_an_image_without_a_vector_ranks_last_and_is_found_by_none(tmp_path: Path) -> None:
    one, two = [1.0, 0.0], [0.0, 1.0]
    found = retrieved(tmp_path, [["a"], ["b"], ["c"]], [(one, [one]), None, (two, [two])])
    assert found["image-to-text-R@1"].value == pytest.approx(2 / 3)
    assert found["text-to-image-R@1"].value == pytest.approx(2 / 3)
    assert found["image-to-text-R@5"].note is not None


def test_vectors_that_do_not_fit_the_captions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a vector of 2 numbers and 1 of its captions, found one"):
        retrieved(tmp_path, [["a"], ["b"]], [([1, 0], [[1, 0]]), ([1, 0], [[1, 0], [0, 1]])])


def test_the_fit_is_the_minimum_by_hand() -> None:
    """Two points at 1 and -1: with weights w and -w the sum is 2 log(1 + exp(-2w)) + l2 w^2, so
    that w = 2 sigmoid(-2w) / l2."""
    weights = fit(np.array([[1.0], [-1.0]]), np.array([1, 0]), 2, l2=1.0)
    w = weights[0, 1]
    assert weights[0, 0] == pytest.approx(-w)
    assert w == pytest.approx(2 / (1 + math.exp(2 * w)), abs=1e-6)
    assert w == pytest.approx(0.5215, abs=1e-3)
    assert weights[1].tolist() == pytest.approx([0, 0], abs=1e-8)


def probe(folder: Path, **options: Any) -> tuple[Probe, list[dict[str, Any]]]:
    """A set of two classes on a line: training files at 2 and -2, and one on the wrong side."""
    card = write_card(
        folder / "line.yaml", classes={"left": {}, "right": {}},
        splits={
            name: {"kind": "table", "file": f"{name}.csv"} for name in ("train", "test")
        },
    )  # fmt: skip
    for split, labels in (("train", "llrr"), ("test", "lrr")):
        rows = [
            {"image": f"{split}{n}.png", "label": {"l": "left", "r": "right"}[label]}
            for n, label in enumerate(labels)
        ]
        for row in rows:
            put_image(folder / row["image"], (4, 4))
        put_csv(folder / f"{split}.csv", rows)
    task = Probe(card=card, rounds=0, **options)
    records = join_predictions(task.samples(folder), {})
    assert [record["split"] for record in records] == ["train"] * 4 + ["test"] * 3
    vectors = [[-1, 0.2], [-1, 0.1], [1, 0.3], [1, 0.1], [-1, 0.0], [1, 0.0], [-1, 0.5]]
    for record, vector in zip(records, vectors, strict=True):
        record["embedding"] = vector
    return task, records


def test_a_probe_learns_from_training_files_and_is_scored_on_test_files(tmp_path: Path) -> None:
    task, records = probe(tmp_path, shots=[1, 2], draws=2)
    scores = task.score(records)
    found = {result.name: result for result in scores.results}
    assert (found["accuracy"].value, found["accuracy"].n) == (pytest.approx(2 / 3), 3)
    # The right file of the wrong side lies at -0.89, and the left one at -1.
    assert found["auroc[right]"].value == 1
    assert found["1-shot-accuracy"].value == pytest.approx(2 / 3)
    assert found["2-shot-accuracy"].note == "mean of 2 draws: 0.667, 0.667"
    assert "trained on 4 files and scored on 3; l2 0.01" in scores.notes
    assert not scores.empty
    records[-1]["answer"], records[4]["embedding"] = "left", None
    assert task.score(records).results[0].value == pytest.approx(2 / 3)


def test_what_no_probe_can_be_trained_on_is_refused(tmp_path: Path) -> None:
    task, records = probe(tmp_path, shots=[3])
    with pytest.raises(DataError, match="shots: 3, but class 'left' has 2 training files"):
        task.score(records)
    with pytest.raises(RecipeError, match="name one card"):
        Probe(card="unimed-clip-21")
    with pytest.raises(RecipeError, match="has no split train"):
        Probe(card="pcam")
