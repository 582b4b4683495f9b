"""UniBiomed's folders: sets one by one and together, both means, absent targets, published numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medm.errors import DataError
from medm.imaging.rle import encode
from medm.metrics.base import MetricResult
from medm.tasks import TASKS
from medm.tasks.base import PredictedMask, Prediction, Scores, join_predictions
from medm.tasks.masks import MaskTask
from medm.tasks.unibiomed import region_box
from tests.tasks import layouts


def values(results: list[MetricResult]) -> dict[str, float]:
    return {result.name: result.value for result in results}


def scored(
    name: str, folder: Path, answer: Any, *, split: str | None = None, **options: Any
) -> Scores:
    """Scores of predictions `answer(row, reference)`."""
    task = TASKS.get(name)(rounds=20, **options)
    rows = join_predictions(task.samples(folder, split or task.eval_split), {})
    for row in rows:
        if isinstance(task, MaskTask):
            prediction = answer(row, task.reference(folder, row))
            row["prediction"] = "" if prediction is None else prediction.text
            row.update(task.measure_item(row, prediction, folder))
        else:
            row["prediction"] = answer(row, None).text
    return task.score(rows)


def drawn(*masks: np.ndarray, text: str = "") -> Prediction:
    return Prediction(text, masks=tuple(PredictedMask(rle=encode(mask)) for mask in masks))


def half(mask: np.ndarray) -> np.ndarray:
    """The left half of `layouts.BOX`: 5 of 10 columns, Dice 2/3."""
    result = mask.copy()
    result[..., layouts.BOX[0] + 5 :] = False
    return result


def test_sets_are_found_one_by_one_and_together(tmp_path: Path) -> None:
    layouts.unibiomed_seg2d(tmp_path)
    task = TASKS.get("unibiomed-seg2d")
    together = list(task().samples(tmp_path))
    assert [sample.extra["dataset"] for sample in together] == ["ACDC", "ACDC", "GlaS", "GlaS"]
    alone = list(task().samples(tmp_path / "GlaS"))
    chosen = list(task(only=["GlaS"]).samples(tmp_path))
    assert [s.id for s in alone] == [s.id for s in chosen] == ["GlaS:test:0", "GlaS:test:1"]
    assert alone[0].media[0].path == "test/a_PATH.png"
    assert chosen[0].media[0].path == "GlaS/test/a_PATH.png"
    assert "gland in colon pathology" in alone[0].turns[0].text
    with pytest.raises(DataError, match="LiverUS is missing"):
        list(task(only=["LiverUS"]).samples(tmp_path))
    (tmp_path / "GlaS" / "test.json").unlink()
    with pytest.raises(DataError, match=r"'test.json' is missing in .*GlaS"):
        list(task().samples(tmp_path))


def test_sets_of_other_tasks_are_no_sets_of_this_one(tmp_path: Path) -> None:
    layouts.unibiomed_seg2d(tmp_path)
    layouts.unibiomed_disease(tmp_path / "Disease")
    layouts.unibiomed_seg3d(tmp_path)
    layouts.medtrinity(tmp_path / "MedTrinity")
    assert len(list(TASKS.get("unibiomed-seg2d")().samples(tmp_path))) == 4
    assert len(list(TASKS.get("unibiomed-seg3d")().samples(tmp_path))) == 4
    assert len(list(TASKS.get("unibiomed-disease")().samples(tmp_path / "Disease"))) == 3


def test_means_over_items_classes_and_sets(tmp_path: Path) -> None:
    layouts.unibiomed_seg2d(tmp_path)
    answers = {"GlaS:test:0": 1.0, "GlaS:test:1": 0.5, "ACDC:test:0": 0.0}

    def answer(row: Any, reference: Any) -> Prediction | None:
        kept = answers.get(row["id"])
        if kept == 0:
            return None
        return drawn(half(reference.inside) if kept == 0.5 else reference.inside)

    scores = scored("unibiomed-seg2d", tmp_path, answer)
    found = values(scores.results)
    assert found["dice"] == pytest.approx((1 + 2 / 3) / 3)
    assert found["dice-set-mean"] == pytest.approx((5 / 6 + 0) / 2)
    assert found["dice-class-mean"] == pytest.approx((5 / 6 + 0) / 2)
    assert found["mask-iou"] == pytest.approx((1 + 0.5) / 3)
    assert found["false-positive-rate"] == 0
    glas = values(scores.groups["dataset"]["GlaS"])
    assert glas["dice"] == pytest.approx(5 / 6)
    original = values(scores.original)
    assert original["unibiomed-dice-sample-mean"] == pytest.approx(5 / 9, abs=1e-5)
    assert original["unibiomed-iou-class-mean"] == pytest.approx((0.75 + 0) / 2, abs=1e-5)


def test_the_original_takes_the_first_300_of_a_set(tmp_path: Path) -> None:
    layouts.biomed_set(tmp_path / "S", [("a", f"target {n}", layouts.BOX) for n in range(301)])

    def answer(row: Any, reference: Any) -> Prediction:
        return drawn(reference.inside & (row["position"] < 300))

    scores = scored("unibiomed-seg2d", tmp_path, answer)
    assert values(scores.results)["dice"] == pytest.approx(300 / 301)
    assert values(scores.original)["unibiomed-dice-sample-mean"] == pytest.approx(1, abs=1e-5)
    assert scores.original[0].n == 300


def test_a_volume_is_scored_on_every_slice(tmp_path: Path) -> None:
    layouts.unibiomed_seg3d(tmp_path)

    def answer(row: Any, reference: Any) -> Prediction:
        mask = reference.inside.copy()
        if mask.any():
            mask[0] = mask[1]  # beside the listed slices
        return drawn(mask)

    scores = scored("unibiomed-seg3d", tmp_path, answer, media="images")
    found, original = values(scores.results), values(scores.original)
    assert found["dice"] == pytest.approx(2 * 2 / (2 + 3))
    assert original["unibiomed-volume-dice-sample-mean"] == pytest.approx(1, abs=1e-5)
    assert found["false-positive-rate"] == 0
    # v1 has a spacing, v2 has none: the slice above lies 5 mm or 1 voxel away.
    assert found["mm/hd95"] == 5
    assert found["voxel/hd95"] == 1


def test_volumes_are_folders_files_or_images(tmp_path: Path) -> None:
    layouts.unibiomed_seg3d(tmp_path)
    task = TASKS.get("unibiomed-seg3d")
    (first, *_) = task().samples(tmp_path)
    assert [(m.branch, m.path) for m in first.media] == [("volume", "Spleen/test/v1")]
    (first, *_) = task(media="images").samples(tmp_path)
    assert [m.path for m in first.media][:2] == [
        "Spleen/test/v1/v1-0.png",
        "Spleen/test/v1/v1-1.png",
    ]
    layouts.put_image(tmp_path / "Spleen/test/v1/other.png")
    with pytest.raises(DataError, match=r"no folder of their own .* 5 files"):
        list(task().samples(tmp_path))
    assert list(task(media="images").samples(tmp_path))


def test_slices_in_another_order_are_no_volume(tmp_path: Path) -> None:
    layouts.unibiomed_seg3d(tmp_path)
    file = tmp_path / "Spleen" / "meta_test.json"
    content = json.loads(file.read_text())
    content["volumes"]["v1"]["slices"].reverse()
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="order of the last number"):
        list(TASKS.get("unibiomed-seg3d")().samples(tmp_path))


def test_a_disease_is_named_and_drawn(tmp_path: Path) -> None:
    layouts.unibiomed_disease(tmp_path)

    def answer(row: Any, reference: Any) -> Prediction:
        if row["dataset"] == "NoFindings":
            return Prediction("no findings in chest X-Ray.")
        if row["id"].endswith(":0"):
            return drawn(reference.inside, text="It is [SEG]. polyp in colon endoscopy.")
        return drawn(half(reference.inside), text="[SEG]. cancer in colon endoscopy.")

    scores = scored("unibiomed-disease", tmp_path, answer)
    found, original = values(scores.results), values(scores.original)
    assert found["phrase-match"] == pytest.approx(2 / 3)
    assert found["phrase-match-set-mean"] == pytest.approx((0.5 + 1) / 2)
    assert found["place-match"] == 1
    assert found["paired-dice"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert found["true-absent-rate"] == 1
    assert original["unibiomed-phrase"] == pytest.approx(2 / 3)
    assert original["unibiomed-matched-dice"] == pytest.approx((1 + 2 / 3 + 1) / 3)


def test_an_image_with_several_diseases_is_one_item(tmp_path: Path) -> None:
    box = (20, 12, 30, 18)
    layouts.biomed_set(
        tmp_path, [("a", "cyst in liver CT", layouts.BOX), ("a", "tumor in liver CT", box)]
    )

    def answer(row: Any, reference: Any) -> Prediction:
        return drawn(reference.parts[1], text="tumor in liver CT.")

    scores = scored("unibiomed-disease", tmp_path, answer)
    found, original = values(scores.results), values(scores.original)
    assert scores.results[0].n == 1
    assert found["phrase-match"] == 1
    assert found["paired-dice"] == 0.5
    assert original["unibiomed-matched-dice"] == 1
    assert "1 of 1 images have several annotations" in (scores.original[0].note or "")


def test_a_region_is_the_largest_part_of_its_mask(tmp_path: Path) -> None:
    mask = np.zeros((30, 40), dtype=bool)
    mask[2:4, 3:6], mask[10:20, 20:32] = True, True
    assert region_box(mask) == [20, 10, 32, 20]
    assert region_box(mask & False) is None
    layouts.unibiomed_region(tmp_path)
    samples = list(TASKS.get("unibiomed-region")().samples(tmp_path))
    assert samples[0].extra["regions"] == [{"box": [4, 5, 14, 11]}]
    assert samples[0].turns[0].text.count("<region>") == 1
    replies = {"Kidney:test:0": "right kidney in abdomen CT"}
    scores = scored(
        "unibiomed-region",
        tmp_path,
        lambda row, _: Prediction(replies.get(row["id"], row["answer"])),
    )
    assert values(scores.results)["phrase-match"] == pytest.approx(2 / 3)
    assert values(scores.original)["unibiomed-region"] == 1


def test_no_findings_have_an_empty_mask(tmp_path: Path) -> None:
    layouts.radgenome(tmp_path)
    task = TASKS.get("radgenome-vqa")(rounds=0)
    truths = [task.reference(tmp_path, {"id": s.id, **s.extra}) for s in task.samples(tmp_path)]
    assert [bool(truth.inside.any()) for truth in truths] == [True, False]
    assert [len(truth.parts) for truth in truths] == [1, 1]


def test_reports_are_scored_without_marks(tmp_path: Path) -> None:
    layouts.radgenome(tmp_path)

    def answer(row: Any, reference: Any) -> Prediction:
        return drawn(reference.inside, text=f"<p> {row['answer']} </p> [SEG]")

    found = values(scored("radgenome-report", tmp_path, answer).results)
    assert found["bleu-coco-1"] == pytest.approx(1)
    assert found["dice"] == found["paired-dice"] == 1
    assert values(scored("radgenome-vqa", tmp_path, answer).results)["normalised-match"] == 1


def test_findings_of_a_scan_have_instances(tmp_path: Path) -> None:
    layouts.rexgroundingct(tmp_path)

    def answer(row: Any, reference: Any) -> Prediction:
        mask = reference.inside.copy()
        if row["finding"] == 0:
            mask[:, 8:10] = False  # the second nodule is missed
        return drawn(mask)

    scores = scored("rexgroundingct", tmp_path, answer)
    found = values(scores.results)
    # 18 and 12 voxels of two nodules; 36 of the effusion
    assert found["dice"] == pytest.approx((2 * 18 / (18 + 30) + 1) / 2)
    assert found["hit-rate@0.1"] == 1
    assert found["instance-precision@0.2"] == 1
    assert found["instance-recall@0.2"] == pytest.approx(2 / 3)
    assert "unit:mm" in next(r for r in scores.results if r.name == "hd95").signature
    assert set(scores.groups["category"]) == {"2d", "2e"}


def test_masks_that_lie_turned_are_turned_back(tmp_path: Path) -> None:
    layouts.rexgroundingct(tmp_path)
    truths = []
    for masks in ("stored", "turned"):
        task = TASKS.get("rexgroundingct")(masks=masks)
        rows = join_predictions(task.samples(tmp_path, "val"), {})
        truths.append(task.reference(tmp_path, rows[0]).mask)
    assert (truths[0] == truths[1][:, ::-1, ::-1]).all()
    assert (truths[0] != truths[1]).any()


def test_classes_that_are_absent_are_asked_for_on_request(tmp_path: Path) -> None:
    layouts.m3d_seg(tmp_path)

    def answer(row: Any, reference: Any) -> Prediction:
        assert reference.mask.shape == (8, 16, 16)
        return drawn(reference.inside) if reference.inside.any() else drawn(~reference.inside)

    scores = scored("m3d-seg", tmp_path, answer, absent=True)
    found = {result.name: result for result in scores.results}
    assert (found["dice"].value, found["dice"].n) == (1, 3)
    assert (found["false-positive-rate"].value, found["false-positive-rate"].n) == (1, 2)
    assert len(list(TASKS.get("m3d-seg")().samples(tmp_path))) == 3
