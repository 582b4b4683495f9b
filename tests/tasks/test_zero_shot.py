"""Zero-shot classification: hand-computed numbers from given scores, and suites of several sets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from medm.errors import DataError, RecipeError
from medm.tasks.base import FAILED, join_predictions
from medm.tasks.zero_shot import ZeroShot
from tests.tasks.layouts import put_csv, put_image

LEAK = {"flag": "none-known", "reason": "made up for the tests"}


def write_card(path: Path, **changes: Any) -> str:
    import yaml

    card = {
        "title": "Organs",
        "modality": "ct",
        "source": "made up",
        "question": "Which organ?",
        "templates": ["a CT of the {}", "{} in CT"],
        "classes": {"liver": {}, "spleen": {}, "kidney": {"names": ["left kidney", "kidney"]}},
        "splits": {"test": {"kind": "table", "file": "test.csv"}},
        "leak": LEAK,
    }
    path.write_text(yaml.safe_dump({**card, **changes}, sort_keys=False))
    return str(path)


def write_set(folder: Path, labels: list[str]) -> None:
    rows = [{"image": f"{n}.png", "label": label} for n, label in enumerate(labels)]
    for row in rows:
        put_image(folder / row["image"], (8, 8))
    put_csv(folder / "test.csv", rows)


def scored(task: ZeroShot, folder: Path, scores: list[Any]) -> dict[str, float]:
    rows = join_predictions(task.samples(folder), {})
    for row, given in zip(rows, scores, strict=True):
        if isinstance(given, str):
            row[FAILED] = given
        else:
            row["scores"] = given
    rows = [task.measure_item(row, None, folder) for row in rows]
    return {result.name: result.value for result in task.score(rows).results}


def test_accuracy_area_and_f1_are_those_by_hand(tmp_path: Path) -> None:
    write_set(tmp_path, ["liver", "liver", "spleen", "kidney"])
    task = ZeroShot(card=write_card(tmp_path / "organs.yaml"), rounds=0)
    found = scored(
        task,
        tmp_path,
        [
            {"liver": 3.0, "spleen": 1.0, "kidney": 0.0},
            {"liver": 1.0, "spleen": 2.0, "kidney": 0.0},
            {"liver": 0.0, "spleen": 5.0, "kidney": 1.0},
            [0.0, 1.0, 9.0],  # in the order of the card
        ],
    )
    assert found["accuracy"] == 3 / 4
    assert found["balanced-accuracy"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert found["macro-f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    # Softmax of liver: .84, .24, .007, .0001: both livers above both others.
    assert found["auroc[liver]"] == 1
    # Softmax of spleen: .11, .67, .98, .0003: the spleen is above all others.
    assert found["auroc[spleen]"] == 1
    assert found["auroc[kidney]"] == 1
    assert found["auroc"] == 1


def test_scores_of_an_item_are_compared_with_each_other_before_they_are_ranked(
    tmp_path: Path,
) -> None:
    """The second item has the higher logit of liver, and is the less likely liver."""
    write_set(tmp_path, ["liver", "spleen", "kidney"])
    task = ZeroShot(card=write_card(tmp_path / "organs.yaml"), rounds=0)
    logits = [
        {"liver": 1.0, "spleen": 0.0, "kidney": 0.0},
        {"liver": 50.0, "spleen": 90.0, "kidney": 0.0},
        {"liver": 0.0, "spleen": 0.0, "kidney": 900.0},
    ]
    assert scored(task, tmp_path, logits)["auroc[liver]"] == 1
    as_they_are = ZeroShot(card=str(tmp_path / "organs.yaml"), rounds=0, probabilities=True)
    assert scored(as_they_are, tmp_path, logits)["auroc[liver]"] == 1 / 2


def test_two_classes_give_sensitivity_and_the_area_of_the_difference(tmp_path: Path) -> None:
    card = write_card(
        tmp_path / "two.yaml", classes={"absent": {}, "present": {}}, positive="present"
    )
    write_set(tmp_path, ["present", "present", "absent", "absent"])
    found = scored(
        ZeroShot(card=card, rounds=0),
        tmp_path,
        [
            {"absent": 0.0, "present": 2.0},
            {"absent": 5.0, "present": 4.0},  # missed; difference -1
            {"absent": 7.0, "present": 5.0},
            {"absent": 1.0, "present": 1.5},  # false alarm; difference 0.5
        ],
    )
    assert found["accuracy"] == found["sensitivity"] == found["specificity"] == 1 / 2
    assert found["auroc"] == found["auroc[present]"] == 3 / 4


def test_an_item_without_scores_is_wrong_and_ranked_last(tmp_path: Path) -> None:
    write_set(tmp_path, ["liver", "spleen", "kidney"])
    task = ZeroShot(card=write_card(tmp_path / "organs.yaml"), rounds=0)
    right = {"liver": 9.0, "spleen": 0.0, "kidney": 0.0}
    found = scored(task, tmp_path, [right, "cannot be read", {**right, "liver": 0.0, "kidney": 9}])
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["auroc[spleen]"] == 0


def test_scores_that_lack_a_class_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path, ["liver"])
    task = ZeroShot(card=write_card(tmp_path / "organs.yaml"), rounds=0)
    for wrong in ({"liver": 1.0}, [1.0, 2.0], {"liver": math.nan, "spleen": 0.0, "kidney": 0.0}):
        with pytest.raises(DataError, match="a number for each of liver, spleen, kidney"):
            scored(task, tmp_path, [wrong])


def test_labels_of_which_several_hold(tmp_path: Path) -> None:
    classes = {
        "edema": {"prompts": ["edema"], "negative": ["no edema"]},
        "effusion": {"prompts": ["effusion"], "negative": ["no effusion"]},
    }
    card = write_card(tmp_path / "multi.yaml", classes=classes, labels="multi", templates=[])
    write_set(tmp_path, ["edema|effusion", "edema", "", "effusion"])
    task = ZeroShot(card=card, rounds=0)
    texts = task.class_texts()["multi"]
    assert texts["edema"] == ["edema"]
    assert texts["no edema"] == ["no edema"]
    rows = [(3, 1, 0, 1), (2, 1, 5, 1), (1, 4, 2, 1), (0, 1, 9, 1)]
    names = ("edema", "no edema", "effusion", "no effusion")
    found = scored(task, tmp_path, [dict(zip(names, row, strict=True)) for row in rows])
    # Differences of edema 2, 1, -3, -1; of effusion -1, 4, 1, 8.
    assert found["auroc[edema]"] == 1
    assert found["auroc[effusion]"] == 2 / 4
    assert found["sensitivity[edema]"] == found["specificity[edema]"] == 1
    assert found["sensitivity[effusion]"] == 1 / 2
    assert found["specificity[effusion]"] == 0


def suite(folder: Path) -> str:
    write_card(folder / "one.yaml")
    write_card(folder / "two.yaml", modality="mri")
    path = folder / "both.yaml"
    path.write_text("title: Both\ncards: [one.yaml, two.yaml]\n")
    write_set(folder / "one", ["liver", "spleen", "spleen", "spleen"])
    write_set(folder / "two", ["liver"])
    return str(path)


def test_each_set_of_a_suite_counts_the_same(tmp_path: Path) -> None:
    task = ZeroShot(card=suite(tmp_path), rounds=0)
    liver, spleen = ({"liver": a, "spleen": 1 - a, "kidney": -9.0} for a in (1.0, 0.0))
    rows = join_predictions(task.samples(tmp_path), {})
    assert rows[4]["image"] == "two/0.png"
    for row, given in zip(rows, [liver, liver, spleen, spleen, liver], strict=True):
        row["scores"] = given
    scores = task.score([task.measure_item(row, None, tmp_path) for row in rows])
    mean = scores.results[0]
    assert (mean.name, mean.value) == ("accuracy-mean-of-2-sets", (3 / 4 + 1) / 2)
    assert scores.results[1].value == 4 / 5
    assert {name: group[0].value for name, group in scores.groups["set"].items()} == {
        "one": 3 / 4,
        "two": 1,
    }
    assert set(scores.groups["modality"]) == {"ct", "mri"}
    assert not scores.notes


def test_a_part_of_a_suite_has_no_mean_of_the_suite(tmp_path: Path) -> None:
    card = suite(tmp_path)
    (tmp_path / "two/test.csv").unlink()
    (tmp_path / "two/0.png").unlink()
    (tmp_path / "two").rmdir()
    with pytest.raises(DataError, match=r"two is missing in .*only=\[one\]"):
        list(ZeroShot(card=card).samples(tmp_path))
    task = ZeroShot(card=card, only=["one"], rounds=0)
    rows = join_predictions(task.samples(tmp_path), {})
    scores = task.score([{**row, "prediction": "liver"} for row in rows])
    assert scores.results[0].name == "accuracy"
    assert "1 of the 2 sets of the suite were scored: there is no mean" in scores.notes[0]
    with pytest.raises(RecipeError, match="three is none of"):
        ZeroShot(card=card, only=["three"])


def test_what_is_known_of_leaks_stands_beside_the_scores(tmp_path: Path) -> None:
    leak = {"flag": "yes", "reason": "the test files are training files"}
    task = ZeroShot(card=write_card(tmp_path / "organs.yaml", leak=leak), rounds=0)
    write_set(tmp_path, ["liver"])
    scores = task.score(join_predictions(task.samples(tmp_path), {}))
    assert "leak (yes), organs: the test files are training files" in scores.notes
