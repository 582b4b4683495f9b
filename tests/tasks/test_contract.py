"""What every registered task must do, on a tiny copy of its benchmark in the published layout."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from medm.data.turns import parse_record
from medm.errors import DataError, MediaError
from medm.imaging import resolve_inside
from medm.imaging.rle import encode
from medm.metrics.base import MetricResult
from medm.tasks import TASKS
from medm.tasks.base import (
    FAILED,
    PredictedMask,
    Prediction,
    Task,
    join_predictions,
    record_of,
    task_to_records,
)
from medm.tasks.masks import MaskTask
from tests.tasks.layouts import LAYOUTS

NAMES = TASKS.names()


def build(name: str) -> Task:
    return TASKS.get(name)(rounds=20, **LAYOUTS[name].options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder a task."""
    made = {}
    for name in NAMES:
        made[name] = tmp_path_factory.mktemp(name)
        LAYOUTS[name].build(made[name])
    return made


VECTORS = {
    "benign": [1.0, 0.0], "malignant": [0.0, 1.0],
    "finding 0": [1.0, 0.0, 0.0], "finding 1": [0.0, 1.0, 0.0], "finding 2": [0.0, 0.0, 1.0],
}  # fmt: skip
"""A vector for each answer of the tasks that score vectors."""


def records(task: Task, folder: Path, answer: Any) -> list[dict[str, Any]]:
    """Scoring records with predictions `answer(sample)`; masks are measured as a run would."""
    rows = join_predictions(task.samples(folder, task.eval_split), {})
    for row in rows:
        row["prediction"] = answer(row)
        if isinstance(task, MaskTask):
            row.update(measured(task, folder, row))
        if "embeddings" in task.needs and row["prediction"] == row["answer"]:
            row["embedding"] = VECTORS[row["answer"]]
            row["text_embeddings"] = [VECTORS[row["answer"]]]
        if "findings" in row and row["prediction"] == row["answer"]:
            row["scores"] = {
                name: 5.0 if one == 1 else -5.0 for name, one in row["findings"].items()
            }
    return rows


def measured(task: MaskTask, folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """The record with the numbers of the true mask where the answer is right, of its complement
    where it is not."""
    truth = task.reference(folder, row)
    right = row["prediction"] == row["answer"]
    shapes = (truth.parts or (truth.inside,)) if right else (~truth.inside,)
    masks = tuple(PredictedMask(rle=encode(mask)) for mask in shapes)
    return task.measure_item(row, Prediction(row["prediction"], masks=masks), folder)


def test_every_task_has_a_layout() -> None:
    assert set(NAMES) == set(LAYOUTS)


@pytest.mark.parametrize("name", NAMES)
def test_it_steps_through_its_split(name: str, folders: dict[str, Path]) -> None:
    task = build(name)
    samples = list(task.samples(folders[name], task.eval_split))
    assert len(samples) == LAYOUTS[name].count
    assert len({sample.id for sample in samples}) == len(samples)
    for sample in samples:
        assert sample.answer
        assert sample.turns[-1].role == "user"
        assert sample.turns[-1].text.strip()
        json.dumps(dict(sample.extra))
        for media in sample.media:
            assert media.path is not None
            assert resolve_inside(folders[name], media.path).exists()
            assert media.branch in ("image", "volume")
    again = list(task.samples(folders[name], task.eval_split))
    assert again == samples


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(folders[name], root)
    gone = root / LAYOUTS[name].missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    task = build(name)
    with pytest.raises((DataError, MediaError)) as caught:
        list(task.samples(root, task.eval_split))
    assert Path(LAYOUTS[name].missing).name in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_folder_is_explained(name: str, tmp_path: Path) -> None:
    task = build(name)
    with pytest.raises(DataError, match=r"missing in .*expected"):
        list(task.samples(tmp_path, task.eval_split))


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_split_is_refused(name: str, folders: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="no split 'tset'"):
        list(build(name).samples(folders[name], "tset"))


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_score_best_and_wrong_ones_do_not(
    name: str, folders: dict[str, Path]
) -> None:
    task = build(name)
    right = task.score(records(task, folders[name], lambda row: row["answer"]))
    wrong = task.score(records(task, folders[name], lambda row: "zebra"))
    best = {result.name: result.value for result in right.results}
    headline = right.results[0]
    expected = best.get("box-iou-ceiling", 1.0)
    assert headline.value == pytest.approx(expected, rel=1e-6)
    assert expected > 0.8
    assert wrong.results[0].value < 0.5
    assert headline.n == (LAYOUTS[name].scored or LAYOUTS[name].count)
    for group in right.groups.values():
        assert sum(results[0].n for results in group.values()) == headline.n
    everything = (*right.results, *right.original)
    groups_said = {
        result.signature.rpartition("|cluster:")[1]
        for result in everything
        if "n/a" not in result.signature
    }
    assert len(groups_said) <= 1  # all numbers of a task are drawn alike
    assert bool(task.cluster_by) == ("|cluster:" in headline.signature)
    for result in right.original:
        other = next(r for r in wrong.original if r.name == result.name)
        assert (
            result.value > other.value
            or "hd95" in result.name
            or "unparsed" in result.name
            or result.value == 0
            or "n/a" in result.signature
        )


WORST = {"m3d-bench-box-iou": -1, "false-positive-rate": 1, "missed-rate": 1}
"""Metrics whose worst value is not 0."""
DIAGNOSTICS = ("unparsed", "unreadable", "malformed", "repaired", "ceiling", "median-rank")
"""Ends of names of results that say how replies could be read, and are no scores."""
LABELED = (
    "chest-label",
    "closed-accuracy",
    "choice",
    "accuracy",
    "macro-f1",
    "match",
    "box",
    "first-word",
)
"""Parts of names of metrics that read a label, a choice or a box from a reply."""


def scored(results: list[MetricResult]) -> list[MetricResult]:
    """Those with a number that is a score."""
    return [r for r in results if not r.name.endswith(DIAGNOSTICS) and not math.isnan(r.value)]


@pytest.mark.parametrize(
    "reply", [None, "", " \n", "error"], ids=["none", "empty", "blank", "error"]
)
@pytest.mark.parametrize("name", NAMES)
def test_no_answer_scores_worst_and_is_said(
    name: str, reply: str | None, folders: dict[str, Path]
) -> None:
    task = build(name)
    rows = join_predictions(task.samples(folders[name], task.eval_split), {})
    for row in rows:
        row["prediction"] = row["answer"] if reply == "error" else reply
        if reply == "error":
            row[FAILED] = "the file is cut"
        if isinstance(task, MaskTask):
            given = Prediction(reply or "", error="the file is cut" if reply == "error" else None)
            row.update(task.measure_item(row, given, folders[name]))
    scores = task.score(rows)
    assert scores.results[0].n == (LAYOUTS[name].scored or LAYOUTS[name].count)
    for result in scored([*scores.results, *scores.original]):
        if "hd95" in result.name:
            continue  # the diagonals of the grids, see test_masks.py
        assert result.value == pytest.approx(WORST.get(result.name, 0)), result.name
    for group in scores.groups.values():
        for results in group.values():
            assert all(
                r.value == WORST.get(r.name, 0) for r in scored(results) if "hd95" not in r.name
            )
    assert ("because of an error" if reply == "error" else "have no answer") in scores.notes[0]


@pytest.mark.parametrize("reply", ["banana", ".", "ok", "I cannot tell."])
@pytest.mark.parametrize("name", [n for n in NAMES if TASKS.get(n).needs != {"masks"}])
def test_a_reply_beside_the_point_hits_no_label(
    name: str, reply: str, folders: dict[str, Path]
) -> None:
    task = build(name)
    scores = task.score(records(task, folders[name], lambda row: reply))
    labeled = [r for r in scored(scores.results) if any(part in r.name for part in LABELED)]
    assert all(result.value == 0 for result in labeled)
    assert scores.results[0].value < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_numbers_that_are_not_defined_have_a_reason(name: str, folders: dict[str, Path]) -> None:
    task = build(name)
    scores = task.score(records(task, folders[name], lambda row: row["answer"])[:1])
    for result in [*scores.results, *scores.original]:
        if math.isnan(result.value):
            assert result.note is not None, result.name
            assert any(
                result.note in note and (result.name in note or " more: " in note)
                for note in scores.notes
            )


@pytest.mark.parametrize("name", NAMES)
def test_training_records_read_back_as_the_same_turns(name: str, folders: dict[str, Path]) -> None:
    task = build(name)
    samples = list(task.samples(folders[name], task.eval_split))
    written = list(task_to_records(task, folders[name], task.eval_split))
    for sample, record in zip(samples, written, strict=True):
        back = parse_record(json.loads(json.dumps(record)), inference=True)
        assert [(turn.role, turn.as_written) for turn in back.turns] == [
            (t.role, t.as_written) for t in sample.turns
        ]
        assert back.media == sample.media
        assert (back.answer, back.id, back.task) == (sample.answer, sample.id, sample.task)
        parse_record(record)  # and as a record to learn from


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("custom", "m3d-refseg")])
def test_training_draws_its_wording_and_evaluation_does_not(
    name: str, folders: dict[str, Path]
) -> None:
    task = build(name)

    def questions(seed: int | None) -> list[str]:
        rng = None if seed is None else random.Random(seed)
        return [
            sample.turns[-1].text
            for sample in task.samples(folders[name], task.eval_split, rng=rng)
        ]

    drawn = {tuple(questions(seed)) for seed in range(12)}
    assert len(drawn) > 1
    assert questions(3) == questions(3)
    assert tuple(questions(None)) in {tuple(questions(None))} | drawn


@pytest.mark.parametrize("name", NAMES)
def test_the_training_split_steps_too(name: str, folders: dict[str, Path]) -> None:
    if name.startswith("ct-rate"):
        pytest.skip("the tiny copy holds volumes of the validation split only")
    assert list(build(name).samples(folders[name], "train"))


@pytest.mark.parametrize("name", NAMES)
def test_options_of_the_table_are_arguments_of_the_task(name: str) -> None:
    entry = TASKS.entry(name)
    block = entry.options.model_validate({"name": name, **LAYOUTS[name].options})
    options = block.model_dump()
    options.pop("name")
    assert isinstance(TASKS.get(name)(**options), Task)


def test_text_that_looks_like_a_placeholder_stays_text(folders: dict[str, Path]) -> None:
    from medm.tasks.base import make_sample
    from medm.types import Media

    sample = make_sample(
        "What does <image> or <volume> mean?",
        id="1",
        tag="vqa",
        answer="x",
        media=[Media("image", "a.png")],
    )
    back = parse_record(record_of(sample), inference=True)
    assert back.media == sample.media
    assert back.turns[0].text == sample.turns[0].text


def test_the_page_of_benchmarks_names_every_task_and_published_metric() -> None:
    from medm.metrics import METRICS

    page = (Path(__file__).parents[2] / "docs/benchmarks.md").read_text("utf-8")
    published = [
        name
        for name in METRICS.names()
        if name.startswith(("uni-med-", "m3d-bench-", "unibiomed-"))
    ]
    same_as_sound = {"m3d-bench-bleu", "m3d-bench-rouge"}
    missing = [
        name
        for name in [*NAMES, *published]
        if f"`{name}`" not in page and name not in same_as_sound
    ]
    assert not missing
