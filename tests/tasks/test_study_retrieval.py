"""Image-report retrieval on studies: equal reports, re-ranking by matches, hand-computed recalls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medm.tasks.study_retrieval import StudyRetrieval

ANGLES = np.deg2rad([0, 10, 20, 90, 100, 110])


def vector(angle: float) -> list[float]:
    return [float(np.cos(angle)), float(np.sin(angle))]


def rows(
    images: list[float], texts: list[float], reports: list[str] | None = None
) -> list[dict[str, Any]]:
    """Records of studies whose vectors lie at some angles."""
    reports = reports or [f"report {n}" for n in range(len(images))]
    return [
        {
            "id": f"s{n}", "answer": reports[n], "captions": [reports[n]],
            "embedding": vector(images[n]), "text_embeddings": [vector(texts[n])],
        }
        for n in range(len(images))
    ]  # fmt: skip


def values(task: StudyRetrieval, records: list[dict[str, Any]]) -> dict[str, float]:
    scores = task.score(records)
    return {result.name: result.value for result in [*scores.results, *scores.original]}


def test_recall_of_both_directions_and_its_mean() -> None:
    """The text of study 1 lies nearest to the image of study 0, and nobody else's does."""
    texts = [*ANGLES]
    texts[0], texts[1] = ANGLES[1], ANGLES[0]
    found = values(StudyRetrieval(rounds=0), rows([*ANGLES], texts))
    assert found["image-to-text-R@1"] == pytest.approx(4 / 6)
    assert found["text-to-image-R@1"] == pytest.approx(4 / 6)
    assert found["image-to-text-R@5"] == 1.0
    # Of six candidates R@10 says nothing and is no part of the mean.
    assert np.isnan(found["image-to-text-R@10"])
    assert found["recall-mean"] == pytest.approx((4 / 6 + 1) / 2)
    assert not any(name.startswith("motor/") for name in found)  # no report stands twice


def test_an_equal_report_is_right_and_the_published_scoring_stands_beside() -> None:
    texts = [*ANGLES]
    texts[0], texts[1] = ANGLES[1], ANGLES[0]
    records = rows([*ANGLES], texts, ["same  report", "same report", "c", "d", "e", "f"])
    task = StudyRetrieval(rounds=0)
    found = values(task, records)
    assert found["image-to-text-R@1"] == 1.0
    assert found["motor/image-to-text-R@1"] == pytest.approx(4 / 6)
    assert found["motor/recall-mean"] == pytest.approx((4 / 6 + 1) / 2)
    assert "6 studies have 5 different reports" in task.score(records).notes


def test_the_best_candidates_are_ranked_again_by_match_and_cosine() -> None:
    """Image 0 prefers text 1 by cosine, text 0 by match + cosine. Image 2's match with text 5 is
    high, and not looked at: that text is none of its two best."""
    texts = [*ANGLES]
    texts[0], texts[1] = ANGLES[1], ANGLES[0]
    records = rows([*ANGLES], texts)
    for n, record in enumerate(records):
        record["matches"] = {f"s{other}": -2.0 for other in range(6) if other != n} | {
            f"s{n}": -1.0
        }
    records[2]["matches"]["s5"] = 9.0
    task = StudyRetrieval(rounds=0, rerank=2)
    assert task.needs == {"embeddings", "matches"}
    assert task.matched == 2
    found = values(task, records)
    assert found["image-to-text-R@1"] == 1.0
    assert found["text-to-image-R@1"] == 1.0
    assert found["cosine/image-to-text-R@1"] == pytest.approx(4 / 6)
    # The match of image 0 with text 1 outweighs its own by more than the cosines differ.
    records[0]["matches"]["s1"] = 0.5
    found = values(task, records)
    assert found["image-to-text-R@1"] == pytest.approx(5 / 6)
    assert found["text-to-image-R@1"] == pytest.approx(5 / 6)


def test_studies_without_matches_are_ranked_by_cosine_and_counted() -> None:
    records = rows([*ANGLES], [*ANGLES])
    task = StudyRetrieval(rounds=0, rerank=2)
    assert values(task, records)["recall-mean"] == 1.0
    assert any(
        note.startswith("6 of 6 studies have no matches") for note in task.score(records).notes
    )


def test_r2gens_file_is_read_with_all_images_or_the_first(tmp_path: Path) -> None:
    row = {"id": "CXR7_IM-2", "report": "no  effusion", "image_path": ["a/0.png", "a/1.png"]}
    (tmp_path / "images").mkdir()
    (tmp_path / "annotation.json").write_text(json.dumps({"train": [], "val": [], "test": [row]}))
    (sample,) = StudyRetrieval().samples(tmp_path)
    assert [media.path for media in sample.media] == ["images/a/0.png", "images/a/1.png"]
    assert sample.extra["captions"] == ["no effusion"]
    assert sample.extra["patient"] == "CXR7"
    (sample,) = StudyRetrieval(images="first").samples(tmp_path)
    assert [media.path for media in sample.media] == ["images/a/0.png"]
