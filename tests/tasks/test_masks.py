"""Predicted masks in every form, and the numbers of targets that are there and absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medm.errors import DataError, MedmError
from medm.imaging.geometry import Geometry
from medm.imaging.nifti import read_nifti_stack, write_nifti
from medm.imaging.rle import encode
from medm.metrics.base import MetricResult
from medm.tasks.base import FAILED, PredictedMask, Prediction
from medm.tasks.masks import ANSWERED, MaskReference, MaskTask, read_masks
from tests.tasks.layouts import put_stack

GRID = Geometry(np.array([3.0, 1.0, 1.0]), np.eye(3)[::-1].copy(), np.zeros(3))


class Boxes(MaskTask):
    """Items whose reference is in the record."""

    class_field = "name"

    def samples(self, folder: Path, split: str = "test", *, rng: Any = None) -> Any:
        return iter(())

    def reference(self, folder: Path, record: Any) -> MaskReference:
        return MaskReference(record["truth"], record.get("spacing"))


def block(*, last: int = 4, shape: tuple[int, ...] = (6, 8, 8)) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[..., 2:4, 2:last] = True
    return mask


def by_name(results: list[MetricResult]) -> dict[str, MetricResult]:
    return {result.name: result for result in results}


VOLUME = MaskReference(block(), (3.0, 1.0, 1.0), GRID)


def write(folder: Path, form: str) -> PredictedMask:
    """The mask of `VOLUME` in one form."""
    mask = block()
    if form == "npy":
        np.save(folder / "m.npy", mask)
    elif form == "npy channel":
        np.save(folder / "m.npy", mask[None] * 0.9)
    elif form == "nifti":
        write_nifti(folder / "m.nii.gz", mask.astype(np.uint8), GRID)
        return PredictedMask("m.nii.gz")
    elif form == "label map":
        labels = np.where(mask, 3, 0).astype(np.uint8)
        labels[0, 0, 0] = 7
        write_nifti(folder / "m.nii.gz", labels, GRID)
        return PredictedMask("m.nii.gz", value=3)
    elif form == "rle":
        return PredictedMask(rle=encode(mask))
    return PredictedMask("m.npy")


@pytest.mark.parametrize("form", ["npy", "npy channel", "nifti", "label map", "rle"])
def test_a_volume_is_read_in_every_form(form: str, tmp_path: Path) -> None:
    given = Prediction("", masks=(write(tmp_path, form),), folder=tmp_path)
    (found,) = read_masks(given, tmp_path / "elsewhere", VOLUME)
    assert ((found > 0.5) == block()).all()


@pytest.mark.parametrize("form", ["png", "npy", "rle"])
def test_an_image_is_read_in_every_form(form: str, tmp_path: Path) -> None:
    mask = block(shape=(8, 10))
    if form == "png":
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "m.png")
    np.save(tmp_path / "m.npy", mask)
    given = PredictedMask(rle=encode(mask)) if form == "rle" else PredictedMask(f"m.{form}")
    (found,) = read_masks(Prediction("", masks=(given,)), tmp_path, MaskReference(mask))
    assert (found == mask).all()


def test_planes_of_images_are_slices_of_the_volume(tmp_path: Path) -> None:
    truth = block()
    masks = []
    for number in (0, 2):
        Image.fromarray(truth[number].astype(np.uint8) * 255).save(tmp_path / f"{number}.png")
        masks.append(PredictedMask(f"{number}.png", media=number))
    (found,) = read_masks(Prediction("", masks=tuple(masks)), tmp_path, VOLUME)
    assert (found[[0, 2]] == truth[[0, 2]]).all()
    assert not found[[1, 3, 4, 5]].any()
    beyond = PredictedMask("0.png", media=6)
    with pytest.raises(DataError, match="image 6 of an item with 6 slices"):
        read_masks(Prediction("", masks=(beyond,)), tmp_path, VOLUME)


def test_a_mask_that_does_not_fit_says_why(tmp_path: Path) -> None:
    np.save(tmp_path / "small.npy", block(shape=(5, 8, 8)))
    np.save(tmp_path / "logits.npy", block() * 7.0)
    moved = Geometry(GRID.spacing, GRID.direction, np.array([0.0, 0.0, 30.0]))
    write_nifti(tmp_path / "moved.nii.gz", block().astype(np.uint8), moved)
    labels = block().astype(np.uint8)
    labels[0, 0, 0] = 7
    write_nifti(tmp_path / "labels.nii.gz", labels, GRID)
    for name, words in (
        ("small.npy", r"the mask is \(5, 8, 8\), the reference \(6, 8, 8\)"),
        ("logits.npy", "expected 0 and 1, or probabilities; found 0.0 to 7.0"),
        ("moved.nii.gz", "30 mm apart"),
        ("labels.nii.gz", r"2 values beside 0 \(1, 7\)"),
        ("none.nii.gz", "none.nii.gz"),
        ("../outside.npy", "outside"),
    ):
        given = Prediction("", masks=(PredictedMask(name),))
        with pytest.raises(MedmError, match=words):
            read_masks(given, tmp_path, VOLUME)
    flat = MaskReference(block(shape=(8, 8)))
    with pytest.raises(DataError, match="expected an image"):
        read_masks(Prediction("", masks=(PredictedMask("moved.nii.gz"),)), tmp_path, flat)


def test_several_masks_of_a_target_are_one(tmp_path: Path) -> None:
    half = block(last=3)
    other = block() & ~half
    record = {"id": "a", "answer": "x", "truth": block(), "prediction": ""}
    given = Prediction(
        "", masks=(PredictedMask(rle=encode(half)), PredictedMask(rle=encode(other)))
    )
    assert Boxes(rounds=0).measure_item(record, given, tmp_path)["dice"] == 1


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    """Two present targets, one half hit and one answered in words; three absent ones: drawn,
    left alone in words, and without a reply."""
    half = PredictedMask(rle=encode(block(last=3)))
    empty = np.zeros((6, 8, 8), dtype=bool)
    task = Boxes(rounds=20)
    given = [
        ("liver", block(), Prediction("It is [SEG].", masks=(half,))),
        ("cyst", block(), Prediction("There is no cyst.")),
        ("cyst", empty, Prediction("It is [SEG].", masks=(half,))),
        ("cyst", empty, Prediction("There is no cyst.")),
        ("cyst", empty, None),
    ]
    return [
        task.measure_item(
            {
                "id": str(index),
                "answer": "x",
                "truth": truth,
                "name": name,
                "spacing": (3.0, 1.0, 1.0),
                "prediction": "" if prediction is None else prediction.text,
            },
            prediction,
            tmp_path,
        )
        for index, (name, truth, prediction) in enumerate(given)
    ]


def test_present_and_absent_targets_are_scored_apart(tmp_path: Path) -> None:
    scores = Boxes(rounds=20).score(rows(tmp_path))
    found = by_name(scores.results)
    assert found["dice"].per_item == pytest.approx([2 / 3, 0])
    assert found["dice-class-mean"].value == pytest.approx(1 / 3)
    assert found["false-positive-rate"].value == pytest.approx(2 / 3)  # no reply is none of both
    assert found["false-positive-rate"].n == 3
    assert found["true-absent-rate"].value == pytest.approx(1 / 3)
    assert found["missed-rate"].value == 0.5
    assert "unit:mm" in found["hd95"].signature
    assert found["hd95"].per_item == pytest.approx([1, np.linalg.norm([18, 8, 8])])
    assert scores.empty == 1
    assert "1 of 5 items have no answer" in scores.notes[0]


def test_an_error_is_no_answer(tmp_path: Path) -> None:
    record = rows(tmp_path)[0] | {FAILED: "the file is cut"}
    scores = Boxes(rounds=0).score([record])
    assert by_name(scores.results)["dice"].value == 0
    given = Prediction("", error="the file is cut")
    assert Boxes(rounds=0).measure_item(rows(tmp_path)[0], given, tmp_path)[ANSWERED] is False


def test_units_are_never_mixed(tmp_path: Path) -> None:
    records = rows(tmp_path)[:2]
    records[1]["unit"] = "voxel"
    found = by_name(Boxes(rounds=0).score(records).results)
    assert found["mm/hd95"].value == pytest.approx(1)
    assert found["voxel/hd95"].n == 1
    assert "hd95" not in found


def test_a_stack_of_volumes_has_them_on_the_first_axis(tmp_path: Path) -> None:
    stack = np.zeros((3, 5, 12, 10), dtype=np.uint8)
    stack[1, 2, 3, 4], stack[2, 4, 11, 9] = 1, 2
    put_stack(tmp_path / "s.nii.gz", stack)
    assert (read_nifti_stack(tmp_path / "s.nii.gz", "s") == stack).all()
    data = (tmp_path / "s.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(data[:-20])
    with pytest.raises(MedmError, match="cut"):
        read_nifti_stack(tmp_path / "cut.nii.gz", "cut.nii.gz")
    write_nifti(tmp_path / "one.nii.gz", stack[1], GRID)
    assert (read_nifti_stack(tmp_path / "one.nii.gz", "one") == stack[1:2]).all()
