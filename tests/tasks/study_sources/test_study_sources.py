"""Published annotation files of studies as records: splits, labels, triplets, and leaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medm.data.studies import Studies
from medm.errors import DataError, RecipeError
from medm.tasks.pair_sources.base import LeftOut
from medm.tasks.study_sources import STUDY_SOURCES
from medm.tasks.study_sources.annotation import AnnotationFile, as_triplet
from medm.tasks.study_sources.base import CHEXPERT_LABELS, StudySource, state_of
from medm.tasks.study_sources.mimic import MimicCXR
from medm.tasks.study_sources.nih import NIHChestXray14
from tests.cli.runner import medm
from tests.tasks.layouts import mimic_labels, nih, put_image, put_json


def records(source: StudySource, folder: Path, split: str) -> list[dict[str, Any]]:
    """The records of a split, each of which the pipeline reads."""
    found = list(source.records(folder, split, left_out=LeftOut()))
    for index, record in enumerate(found):
        Studies().read(record, file=folder, index=index)
    return found


def test_the_validation_part_of_nih_is_a_tenth_and_shares_no_patient(tmp_path: Path) -> None:
    nih(tmp_path)
    source = NIHChestXray14()
    parts = {split: records(source, tmp_path, split) for split in ("train", "val", "test")}
    assert [len(parts[split]) for split in ("train", "val", "test")] == [18, 2, 4]
    patients = [{record["patient"] for record in part} for part in parts.values()]
    assert not patients[0] & patients[1]
    assert not (patients[0] | patients[1]) & patients[2]
    assert source.shared_patients(tmp_path, "val") == {}
    first = parts["test"][0]
    assert first["images"] == ["images_002/images/00000020_000.png"]
    assert [name for name, state in first["labels"].items() if state] == ["Hernia"]
    assert len(first["labels"]) == 14
    assert parts["test"][1]["labels"]["Hernia"] == 0  # No Finding


def test_single_images_of_a_patient_may_be_in_both_parts_and_are_reported(tmp_path: Path) -> None:
    nih(tmp_path)
    source = NIHChestXray14.with_options({"validation": "image"})
    assert len(records(source, tmp_path, "val")) == 2
    shared = source.shared_patients(tmp_path, "val")
    assert list(shared) == ["train"]
    done = medm(
        "data", "convert", str(tmp_path / "val.jsonl"), "--task", "studies/nih-chest-xray14",
        "--data", str(tmp_path), "--split", "val", "--option", "validation=image",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert f"warning: {len(shared['train'])} patients of val are in train, too" in done.out
    assert "2 studies of nih-chest-xray14, val" in done.out


def test_labels_of_mimic_follow_the_policy(tmp_path: Path) -> None:
    mimic_labels(tmp_path)
    (tmp_path / "files/p12/p12/s52/d20.jpg").unlink()
    left_out = LeftOut()
    found = list(MimicCXR().records(tmp_path, "test", left_out=left_out))
    assert left_out.counts == {"no image file": 1}
    assert [record["id"] for record in found] == ["50", "51"]
    assert found[0]["images"] == [f"files/p10/p10/s50/d0{view}.jpg" for view in range(2)]
    assert found[0]["patient"] == "10"
    assert found[0]["labels"]["Edema"] == 1
    assert found[1]["labels"]["Fracture"] == 1
    assert found[0]["labels"]["Fracture"] == 0  # not mentioned
    (validation,) = records(MimicCXR(), tmp_path, "val")
    assert validation["id"] == "53"
    first = MimicCXR.with_options({"images": "first"})
    assert len(records(first, tmp_path, "test")[0]["images"]) == 1
    for policy, state in (("u-zero", 0), ("u-one", 1), ("ignore", None)):
        assert state_of("-1.0", policy, where="Edema") == state  # type: ignore[arg-type]
    with pytest.raises(DataError, match="expected 1, 0, -1"):
        state_of("2", "u-zero", where="Edema")


def annotated(folder: Path) -> None:
    """Three studies in R2Gen's layout; what is known of them lies beside."""
    rows = [
        {"id": f"i{n}", "study_id": 50 + n, "subject_id": n % 2, "report": f"report  {n}",
         "image_path": [f"{n}/a.png", f"{n}/b.png"]}
        for n in range(3)
    ]  # fmt: skip
    for row in rows:
        for path in row["image_path"]:
            put_image(folder / "images" / path, (8, 8))
    put_json(folder / "annotation.json", {"train": rows[:1], "val": rows[1:2], "test": rows[2:]})


@pytest.mark.parametrize("layout", ["by split", "flat"])
def test_r2gens_studies_take_triplets_and_labels_from_files_beside(
    tmp_path: Path, layout: str
) -> None:
    annotated(tmp_path)
    mimic_labels(tmp_path)
    known = [
        {"image_path": ["0/a.png", "0/b.png"], "report": "x",
         "triplet": ["heart | is | large", "no clear sign", "two words"]},
        {"image_path": ["elsewhere.png"], "report": "report 2", "triplet": [["a", "b", "c"]]},
    ]  # fmt: skip
    content = [{"train": known[:1], "test": known[1:]}] if layout == "by split" else known
    put_json(tmp_path / "mimic_train_kg_AO.json", content)
    (train,) = records(AnnotationFile(), tmp_path, "train")
    assert train["triplets"] == [["heart", "is", "large"], ["no", "clear", "sign"]]
    assert train["images"] == ["images/0/a.png", "images/0/b.png"]
    assert train["report"] == "report 0"
    assert train["labels"]["Edema"] == 1
    assert train["patient"] == "0"
    (test,) = records(AnnotationFile(), tmp_path, "test")
    assert test["triplets"] == [["a", "b", "c"]]  # found by its report
    assert AnnotationFile().shared_patients(tmp_path, "test") == {"train": ["0"]}


def test_motors_json_and_its_flat_list(tmp_path: Path) -> None:
    put_image(tmp_path / "a.png", (8, 8))
    hot = [0] * 13 + [1]
    row = {"image_path": ["a.png"], "report": "r", "triplet": ["a b c"], "label_index": hot}
    put_json(tmp_path / "motor.json", [{"train": [row]}, {"test": [row, row]}])
    put_json(tmp_path / "flat.json", [row])
    by_split = AnnotationFile(path="motor.json")
    assert len(records(by_split, tmp_path, "test")) == 2
    (record,) = records(AnnotationFile(path="flat.json"), tmp_path, "train")
    assert [name for name, state in record["labels"].items() if state] == [CHEXPERT_LABELS[-1]]
    with pytest.raises(DataError, match="expected a list under 'val'; the file has test, train"):
        records(by_split, tmp_path, "val")
    names = AnnotationFile.with_options({"path": "flat.json", "label_names": ["a", "b"]})
    with pytest.raises(DataError, match="found 14 entries; other labels are named by"):
        records(names, tmp_path, "train")


def test_a_file_of_ones_own_studies_may_name_splits(tmp_path: Path) -> None:
    put_image(tmp_path / "a.png", (8, 8))
    rows = [
        {"image": "a.png", "report": "x", "split": split, "labels": ["Edema"]}
        for split in ("train", "test")
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (record,) = records(AnnotationFile(path="own.jsonl"), tmp_path, "test")
    assert record["id"] == "1"
    assert record["labels"]["Edema"] == 1
    assert record["labels"]["Fracture"] == 0


def test_a_text_is_divided_at_its_marks_or_its_first_and_last_word() -> None:
    assert as_triplet("heart;is;large") == ("heart", "is", "large")
    assert as_triplet("left lung shows no effusion") == ("left", "lung shows no", "effusion")
    assert as_triplet("two words") is None
    assert as_triplet(["a", " ", "c"]) is None


@pytest.mark.parametrize("name", STUDY_SOURCES.names())
def test_every_source_explains_an_empty_folder_and_a_wrong_option(
    name: str, tmp_path: Path
) -> None:
    source = STUDY_SOURCES.get(name)
    with pytest.raises(DataError, match=r"missing in .*expected"):
        list(source().studies(tmp_path, "train"))
    with pytest.raises(DataError, match="no split 'tset'"):
        list(source().studies(tmp_path, "tset"))
    with pytest.raises(RecipeError, match="has no option 'image': did you mean 'images'"):
        source.with_options({"image": "first"})
    with pytest.raises(RecipeError, match="images: expected all or first, found 'one'"):
        source.with_options({"images": "one"})
