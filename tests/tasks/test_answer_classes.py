"""VQA-RAD and SLAKE with answers as classes: reading, scoring, conversion and lists."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from medm.cli.app import app
from medm.errors import DataError
from medm.tasks.answer_classes import UNLISTED, AnswerMaps
from medm.tasks.base import join_predictions
from medm.tasks.slake import Slake
from medm.tasks.vqa_rad import VQARAD
from tests.tasks.layouts import put_image, put_json

CLOSED, OPEN = ["Yes", "no"], ["left lung", "lung", "right"]


def question(number: int, kind: str, answer: object, **fields: Any) -> dict[str, Any]:
    row = {"qid": number, "image_name": "a.png", "question": f"Question {number}?"}
    return {**row, "answer_type": kind, "answer": answer, "question_type": "PRES", **fields}


def classes(*labels: int, scores: list[float] | None = None) -> dict[str, Any]:
    return {"labels": list(labels), "scores": scores or [1.0] * len(labels)}


@pytest.fixture
def rad(tmp_path: Path) -> Path:
    put_image(tmp_path / "images/a.png")
    (tmp_path / "cache").mkdir()
    for name, answers in (("close", CLOSED), ("open", OPEN)):
        (tmp_path / f"cache/{name}_label2ans.pkl").write_bytes(pickle.dumps(answers, protocol=2))
    put_json(
        tmp_path / "testset.json",
        [
            question(1, "CLOSED", classes(0), phrase_type="freeform"),
            question(2, "OPEN", classes(0, 1, scores=[1.0, 0.3]), phrase_type="para"),
            question(3, "OPEN", classes(), phrase_type="freeform"),
            question(4, "OPEN", "right", phrase_type="test_para", question_type="POS"),
        ],
    )
    put_json(
        tmp_path / "trainset.json",
        [question(5, "CLOSED", classes(1)), question(6, "OPEN", classes(1)),
         question(7, "OPEN", classes()), question(8, "CLOSED", "No.")],
    )  # fmt: skip
    return tmp_path


def test_classes_become_texts_and_scores(rad: Path) -> None:
    first, second, third, fourth = VQARAD().samples(rad)
    assert (first.answer, first.extra["answer_scores"]) == ("Yes", {"Yes": 1.0})
    assert second.extra["answer_scores"] == {"left lung": 1.0, "lung": 0.3}
    assert (third.answer, third.extra["unlisted"]) == (UNLISTED, True)
    assert (fourth.answer, fourth.extra["phrase_type"]) == ("right", "para")
    for phrases, expected in (("freeform", ["1", "3"]), ("para", ["2", "4"])):
        found = VQARAD(phrases=phrases).samples(rad)  # type: ignore[arg-type]
        assert [sample.id for sample in found] == expected


def test_published_and_corrected_numbers_stand_side_by_side(rad: Path) -> None:
    task = VQARAD(rounds=20)
    replies = {"1": "yes", "2": "lung", "3": UNLISTED, "4": "right"}
    scores = task.score(join_predictions(task.samples(rad), replies))
    published = {result.name: result.value for result in scores.original}
    assert published["all/class-accuracy"] == pytest.approx((0 + 0.3 + 0 + 1) / 4)
    assert published["open/class-accuracy"] == pytest.approx(1.3 / 3)
    assert published["closed/class-accuracy"] == 0, "'yes' is not the class 'Yes'"
    corrected = {result.name: result.value for result in scores.results}
    assert corrected["closed/closed-accuracy"] == 1
    assert set(scores.groups["question_type"]) == {"PRES", "POS"}
    assert set(scores.groups["phrase_type"]) == {"freeform", "para"}
    assert any("1 of 4 answers are in no published list" in note for note in scores.notes)


def test_slake_gives_numbers(tmp_path: Path) -> None:
    put_image(tmp_path / "imgs/x/source.jpg")
    for name, answers in (("close", CLOSED), ("open", dict(enumerate(OPEN)))):
        put_json(tmp_path / f"{name}_label2ans.json", answers)
    row = {"img_name": "x/source.jpg", "question": "Where?", "answer_type": "OPEN"}
    rows = [row | {"answer": 2}, row | {"answer": 1, "answer_type": "CLOSED"}]
    put_json(tmp_path / "new_test_kg.json", rows)
    assert [sample.answer for sample in Slake().samples(tmp_path)] == ["right", "no"]
    scored = Slake(rounds=20).score(
        join_predictions(Slake().samples(tmp_path), {"x/source.jpg:0": "right"})
    )
    assert next(r.value for r in scored.original if r.name == "all/class-accuracy") == 0.5
    (tmp_path / "open_label2ans.json").unlink()
    with pytest.raises(DataError, match=r"open_label2ans .* is missing"):
        list(Slake().samples(tmp_path))
    put_json(tmp_path / "trainval_label2ans.json", ["a", "b", "c"])
    assert next(iter(Slake().samples(tmp_path))).answer == "c"


@pytest.mark.parametrize(
    "answer", [3, True, classes(-1), classes(0, scores=[2.0]), classes(0, 1, scores=[1.0]),
               {"labels": "0", "scores": [1.0]}],
)  # fmt: skip
def test_labels_that_do_not_fit_are_named(tmp_path: Path, answer: object) -> None:
    for name, answers in (("close", CLOSED), ("open", OPEN)):
        put_json(tmp_path / f"{name}_label2ans.json", answers)
    with pytest.raises(DataError, match="expected labels from 0 to 2") as caught:
        AnswerMaps(tmp_path).decoded(answer, "open", file=Path("q.json"), index=4)
    assert (caught.value.index, caught.value.field) == (4, "answer")
    with pytest.raises(DataError, match="expected closed or open"):
        AnswerMaps(tmp_path).decoded(0, "yes/no", file=Path("q.json"), index=4)


@pytest.mark.parametrize("value", [[], [1], {"1": "a"}, "a"])
def test_a_map_that_is_no_list_is_refused(tmp_path: Path, value: object) -> None:
    for name in ("close", "open"):
        put_json(tmp_path / f"{name}_label2ans.json", value)
    with pytest.raises(DataError, match="expected a list of answers"):
        assert AnswerMaps(tmp_path).lists


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    for name in ("close", "open"):
        (tmp_path / f"{name}_label2ans.pkl").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(DataError, match="could run code"):
        assert AnswerMaps(tmp_path).lists
    assert not (tmp_path / "ran").exists()


def test_studies_and_lists_by_the_command_line(rad: Path) -> None:
    records, lists = rad / "train.jsonl", rad / "answers.json"

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, ["data", *words])
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    said = run("convert", str(records), "--task", "studies/vqa-rad", "--data", str(rad))
    assert "3 studies of VQA-RAD, train" in said
    assert "1 left out: the answer is in no published list" in said
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    assert rows[0] == {
        "id": "5", "images": ["images/a.png"], "question": "Question 5?", "answer": "no",
        "answer_type": "closed", "answer_scores": {"no": 1.0}, "question_type": "PRES",
    }  # fmt: skip
    run("check", str(records), "--pipeline", "studies", "--root", str(rad))
    assert "1 closed and 1 open answers" in run("answers", str(lists), str(records))
    assert json.loads(lists.read_text()) == {"closed": ["no"], "open": ["lung"]}
    run("answers", str(lists), "--maps", str(rad))
    assert json.loads(lists.read_text()) == {"closed": CLOSED, "open": OPEN}
    assert CliRunner().invoke(app, ["data", "answers", str(lists)]).exit_code == 2
    rows[1]["answer_type"] = "yes/no"
    records.write_text("\n".join(map(json.dumps, rows)))
    result = CliRunner().invoke(app, ["data", "answers", str(lists), str(records)])
    assert result.exit_code != 0
