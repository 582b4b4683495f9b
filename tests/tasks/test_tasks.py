"""What single tasks have to get right."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medm.errors import DataError, RecipeError
from medm.metrics.base import MetricResult, Resampling
from medm.tasks import TASKS, scoring
from medm.tasks.base import PredictedMask, Prediction, join_predictions, metric_notes
from medm.tasks.benchmark_files import NumberArchive, read_csv
from medm.tasks.custom import Custom
from medm.tasks.m3d import M3DCap, M3DClosedVQA, M3DOpenVQA
from medm.tasks.m3d_regions import M3DREC, M3DRefSeg, M3DSeg, box_of, box_text
from medm.tasks.path_vqa import PathVQA
from medm.tasks.plain_pickle import read_plain_pickle
from medm.tasks.slake import SlakeREC, SlakeVQA
from tests.tasks import layouts


def answered(task: Any, folder: Path, predictions: list[str]) -> Any:
    samples = list(task.samples(folder, task.eval_split))
    given = {str(sample.id): text for sample, text in zip(samples, predictions, strict=True)}
    return task.score(join_predictions(samples, given))


def values(results: list) -> dict[str, float]:
    return {result.name: result.value for result in results}


def test_a_refer_question_in_full(tmp_path: Path) -> None:
    layouts.slake_tree(tmp_path)
    first = next(iter(SlakeREC().samples(tmp_path)))
    assert [getattr(part, "path", part) for part in first.turns[0].content] == [
        "imgs/xmlab1/source.jpg",
        "\nWhere in the image is the Liver? Answer with its box.",
    ]
    # [x, y, w, h] = [20, 10, 100, 50] of 200 x 100
    assert first.answer == "{<10><10><60><60>}"
    assert first.extra["box"] == [20, 10, 120, 60]
    assert first.extra["size"] == [200, 100]
    assert (
        next(iter(SlakeREC(codec="thousand").samples(tmp_path))).answer == "{<100><100><600><600>}"
    )


def test_objects_of_the_same_name_are_told_apart_in_the_tables(tmp_path: Path) -> None:
    layouts.slake_tree(tmp_path)
    scores = answered(
        SlakeREC(rounds=20),
        tmp_path,
        ["{<10><10><60><60>}", "{<0><0><15><30>}", "{<0><0><15><30>}"],
    )
    by_name = scores.groups["unique_name"]
    assert by_name["True"][0].value == pytest.approx(1)
    assert by_name["False"][0].value == pytest.approx(0.5)  # two lungs, one box cannot be both


def test_boxes_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    layouts.slake_tree(tmp_path)
    scores = answered(
        SlakeREC(rounds=20), tmp_path, ["{<60><60><10><10>}", "{<0><0><15>}", "no idea"]
    )
    found = values(scores.results)
    assert found["box-iou"] == pytest.approx(1 / 3)  # swapped corners are mended, and counted
    assert found["box-repaired"] == pytest.approx(1 / 3)
    assert found["box-malformed"] == pytest.approx(1 / 3)
    assert found["box-unreadable"] == pytest.approx(2 / 3)
    assert values(scores.original)["uni-med-box-iou"] == 0


def test_open_and_closed_questions_are_scored_apart_and_beside_the_original_way(
    tmp_path: Path,
) -> None:
    layouts.slake_tree(tmp_path)
    (tmp_path / "imgs/xmlab1/question.json").write_text(
        json.dumps(
            [
                {
                    "img_name": "xmlab1/source.jpg",
                    "q_lang": "en",
                    "qid": 1,
                    "question": "Is it normal?",
                    "answer": "No",
                    "answer_type": "CLOSED",
                },
                {
                    "img_name": "xmlab1/source.jpg",
                    "q_lang": "en",
                    "qid": 2,
                    "question": "Organ?",
                    "answer": "lung",
                    "answer_type": "OPEN",
                },
            ]
        )
    )
    scores = answered(SlakeVQA(rounds=20), tmp_path, ["abnormal", "lung lung lung"])
    corrected, original = values(scores.results), values(scores.original)
    assert corrected["closed/closed-accuracy"] == 0
    assert original["closed/uni-med-closed-accuracy"] == 1
    assert corrected["open/token-f1"] == 0.5
    assert original["open/uni-med-token-f1"] == 1
    assert set(scores.groups) == {"answer_type"}


def test_the_pickle_is_read_and_a_program_in_it_is_not_run(tmp_path: Path) -> None:
    import pickle

    rows = layouts.path_vqa_rows("test")
    shared = ["x"]
    plain = {
        "rows": rows,
        "t": (1, 2.5, None, True),
        "same": [shared, shared],
        "big": 2**80,
        "negative": -3,
    }
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        file = tmp_path / f"plain{protocol}.pkl"
        file.write_bytes(pickle.dumps(plain, protocol=protocol))
        assert read_plain_pickle(file) == plain

    class Program:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        file = tmp_path / "program.pkl"
        file.write_bytes(pickle.dumps([Program()], protocol=protocol))
        with pytest.raises(DataError, match="could run code that the file brings"):
            read_plain_pickle(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"not a pickle", b"\x80\x04", b"\x80\x04K\x01K\x02.", b"\x80\x04a.", b"\x80\x04h\x05."],
)
def test_a_damaged_pickle_is_an_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.pkl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.pkl"):
        read_plain_pickle(file)


def test_path_vqa_prefers_the_converted_file(tmp_path: Path) -> None:
    layouts.path_vqa(tmp_path)
    layouts.put_json(tmp_path / "qas/test_vqa.json", layouts.path_vqa_rows("test")[:1])
    assert [sample.id for sample in PathVQA().samples(tmp_path)] == ["7"]


def test_an_archive_with_objects_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", test_labels=np.array([{"a": 1}], dtype=object))
    from medm.errors import MediaError

    with pytest.raises(MediaError, match="Python objects"):
        NumberArchive(tmp_path / "x.npz")["test_labels"]


def test_medmnist_images_are_the_pixels(tmp_path: Path) -> None:
    from PIL import Image

    layouts.medmnist(tmp_path, "dermamnist", True)
    task = TASKS.get("medmnist-derma")(rounds=5)
    samples = list(task.samples(tmp_path))
    stored = np.load(tmp_path / "dermamnist_224.npz", allow_pickle=False)["test_images"]
    written = [np.asarray(Image.open(tmp_path / str(sample.media[0].path))) for sample in samples]
    assert np.array_equal(np.stack(written), stored)
    assert [sample.answer for sample in samples][1] == "melanoma"


def test_melanoma_and_melanocytic_are_two_classes(tmp_path: Path) -> None:
    layouts.medmnist(tmp_path, "dermamnist", True)
    task = TASKS.get("medmnist-derma")(rounds=5)
    scores = answered(
        task, tmp_path, ["It is melanoma.", "This shows Melanoma", "melanoma or dermatofibroma"]
    )
    assert values(scores.results)["accuracy"] == pytest.approx(1 / 3)
    assert values(scores.results)["class-unparsed"] == pytest.approx(1 / 3)


def test_closed_m3d_questions_by_type_and_the_published_substring(tmp_path: Path) -> None:
    layouts.m3d_vqa(tmp_path)
    scores = answered(
        M3DClosedVQA(rounds=20), tmp_path, ["B. Sagittal", "It is the AORTA. C. Coronal", "D"]
    )
    corrected, original = values(scores.results), values(scores.original)
    # corrected: right, wrong (nothing but a stated letter counts: "Coronal" is the one wording in
    # it), right
    assert corrected["choice-accuracy"] == pytest.approx(2 / 3)
    assert corrected["choice-accuracy-macro"] == pytest.approx((1 / 2 + 1) / 2)
    # original: "B." found, "A." found in "AORTA.", "D." missing in "D"
    assert original["m3d-bench-choice-accuracy"] == pytest.approx(2 / 3)
    assert original["m3d-bench-choice-accuracy-macro"] == pytest.approx((1 + 0) / 2)
    assert scores.groups["question_type"]["location"][0].value == 1


def test_a_box_of_a_flat_structure_has_an_extent(tmp_path: Path) -> None:
    """One voxel deep: with corners taken as edges its volume, and every IoU with it, would be 0."""
    mask = np.zeros((8, 16, 16), dtype=bool)
    mask[2, 4:9, 3:7] = True
    box = box_of(mask)
    assert box == (2, 4, 3, 3, 9, 7)
    assert box_text(box, mask.shape) == "<bx_start>[0.25, 0.25, 0.188, 0.25, 0.5, 0.375]<bx_end>"
    layouts.m3d_seg(tmp_path)
    samples = list(M3DREC().samples(tmp_path))
    assert [sample.extra["dataset"] for sample in samples] == ["0000", "0003", "0003"]
    scores = answered(M3DREC(rounds=5), tmp_path, [str(sample.answer) for sample in samples])
    assert values(scores.results)["box-iou"] == 1
    assert values(scores.original)["m3d-bench-box-iou"] == pytest.approx(
        0, abs=0.2
    )  # the flat ones get nothing


def test_absent_structures_are_not_asked_for(tmp_path: Path) -> None:
    layouts.m3d_seg(tmp_path)
    assert [s.turns[0].text.split()[2] for s in M3DSeg().samples(tmp_path)] == [
        "liver",
        "liver",
        "kidney",
    ]


def test_masks_are_measured_one_by_one(tmp_path: Path) -> None:
    layouts.m3d_refseg(tmp_path)
    task = M3DRefSeg(rounds=5)
    rows = join_predictions(task.samples(tmp_path), {})
    truths = [task.reference(tmp_path, row).inside for row in rows]
    assert [int(truth.sum()) for truth in truths] == [4, 1]
    np.save(tmp_path / "soft.npy", truths[0] * 0.9)
    np.save(tmp_path / "empty.npy", np.zeros((1, *truths[1].shape)))
    for row, name in zip(rows, ("soft.npy", "empty.npy"), strict=True):
        given = Prediction("", masks=(PredictedMask(name),))
        row.update(task.measure_item(row, given, tmp_path))
    scores = task.score(rows)
    assert values(scores.results)["dice"] == 0.5
    assert values(scores.original)["m3d-bench-dice"] == pytest.approx(
        (2 * 3.6 / (3.6 + 4 + 1) + 0) / 2
    )
    assert scores.groups["question_type"]["descriptive"][0].value == 1
    del rows[1]["hd95"]
    with pytest.raises(DataError, match="hd95"):
        task.score(rows)


def test_ct_rate_reads_each_turn_of_its_kind(tmp_path: Path) -> None:
    layouts.ct_rate(tmp_path)
    task = TASKS.get("ct-rate-choice")(rounds=5)
    samples = list(task.samples(tmp_path, "valid"))
    assert [sample.id for sample in samples] == ["valid_1_a_1:2", "valid_1_a_1:3"]
    assert samples[0].extra["options"] == {"A": "the heart", "B": "the liver", "C": "nothing"}
    assert "<" not in samples[0].turns[0].text
    scores = answered(task, tmp_path, ["(b) and (a), I am not sure", "b"])
    assert values(scores.results)["choice-accuracy"] == 0.5
    assert (
        values(scores.original)["medm-vl-choice-accuracy"] == 0.5
    )  # "(a)" is found, "(b)" is not in "b"


def test_a_report_and_its_negation(tmp_path: Path) -> None:
    layouts.annotated(tmp_path, "images")
    task = TASKS.get("iu-xray")(rounds=5)
    samples = list(task.samples(tmp_path))
    assert len(samples[0].media) == 2
    negated = ["The heart is not enlarged. No left pleural effusion.", layouts.REPORTS[1]]
    found = values(answered(task, tmp_path, negated).results)
    assert found["rouge-1"] > 0.75
    assert found["chest-label-f1-micro-14"] == pytest.approx(2 * 1 / (2 * 1 + 3))


def test_uni_med_cuts_references_to_fifty_words(tmp_path: Path) -> None:
    layouts.annotated(tmp_path, "files")
    long = " ".join(f"word{n}" for n in range(60))
    content = json.loads((tmp_path / "annotation.json").read_text())
    content["test"] = [{**content["test"][0], "report": long}]
    layouts.put_json(tmp_path / "annotation.json", content)
    task = TASKS.get("mimic-caption")(rounds=5)
    scores = answered(task, tmp_path, [" ".join(long.split()[:50])])
    assert values(scores.original)["uni-med-50-words/rouge-1"] == pytest.approx(1)
    assert values(scores.results)["rouge-1"] < 0.95


def test_predictions_of_another_benchmark_are_noticed(tmp_path: Path) -> None:
    layouts.slake_tree(tmp_path)
    samples = list(SlakeVQA().samples(tmp_path))
    with pytest.raises(DataError, match=r"1 of 2 predictions belong to no sample.*'99'"):
        join_predictions(samples, {"1": "yes", "99": "no"})
    assert [row["prediction"] for row in join_predictions(samples, {"2": "x"})] == ["", "x"]


def test_records_without_the_samples_fields_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="answer_type"):
        SlakeVQA().score([{"id": "1", "answer": "yes", "prediction": "yes"}])
    with pytest.raises(DataError, match="'answer'"):
        SlakeVQA().score([{"id": "1", "prediction": "yes"}])


def test_a_custom_task_takes_text_metrics_only(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="compares masks"):
        Custom(path="x.json", metrics=[{"name": "dice"}])
    with pytest.raises(RecipeError, match=r"unknown metric 'bleuu'.*did you mean 'bleu'"):
        Custom(path="x.json", metrics=[{"name": "bleuu"}])
    with pytest.raises(ValueError, match="smoothing"):
        TASKS.entry("custom").options.model_validate(
            {"name": "custom", "path": "x", "metrics": [{"name": "bleu-nltk", "smoothing": "much"}]}
        )


def test_custom_boxes_in_text(tmp_path: Path) -> None:
    layouts.put_json(
        tmp_path / "b.json",
        [
            {
                "id": "1",
                "answer": "{<0><0><10><10>}",
                "conversations": [{"from": "human", "value": "Where?"}],
            }
        ],
    )
    task = Custom(
        path="b.json",
        metrics=[{"name": "box-iou"}, {"name": "box-accuracy", "threshold": 0.3}],
        rounds=5,
    )
    found = values(answered(task, tmp_path, ["{<5><0><15><10>}"]).results)
    assert found["box-iou"] == pytest.approx(1 / 3)
    assert found["box-accuracy@0.3"] == 1


def custom(folder: Path, answers: list[str], *metrics: str) -> Custom:
    turns = [{"from": "human", "value": "What is it?"}]
    layouts.put_json(
        folder / "c.json",
        [{"id": str(i), "answer": a, "conversations": turns} for i, a in enumerate(answers)],
    )
    return Custom(path="c.json", metrics=[{"name": name} for name in metrics], rounds=5)


def test_a_custom_file_is_in_the_data_folder_or_where_the_path_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records often lie outside of the folder of the images; a file of the folder goes first."""
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for folder in (images, elsewhere):
        folder.mkdir()
    monkeypatch.chdir(elsewhere)
    task = custom(elsewhere, ["CT", "MRI"], "accuracy")
    assert [sample.answer for sample in task.samples(images)] == ["CT", "MRI"]
    custom(images, ["US"], "accuracy")
    assert [sample.answer for sample in task.samples(images)] == ["US"]
    with pytest.raises(DataError, match=r"missing in .*images; .* or in the working directory"):
        list(Custom(path="gone.json", metrics=[{"name": "accuracy"}]).samples(images))


def test_custom_labels_are_read_from_the_answers(tmp_path: Path) -> None:
    task = custom(tmp_path, ["CT", "MRI", "MRI", "US"], "accuracy", "macro-f1")
    found = values(
        answered(task, tmp_path, ["CT.", "This is an mri scan", "CT or MRI", "us"]).results
    )
    assert found["accuracy"] == 0.75
    assert found["macro-f1"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    task = custom(tmp_path, ["yes", "no", "1", "0"], "sensitivity-specificity")
    found = values(answered(task, tmp_path, ["Yes, there is", "unclear", "1", "No."]).results)
    assert (found["sensitivity"], found["specificity"]) == (1, 0.5)
    with pytest.raises(DataError, match="expected the answer yes, no, 1 or 0"):
        answered(custom(tmp_path, ["CT"], "sensitivity-specificity"), tmp_path, ["CT"])


def test_a_note_is_said_once_for_all_metrics_that_have_it() -> None:
    results = [
        MetricResult(name, math.nan, 1, math.nan, math.nan, "s", note="why") for name in "abcdeb"
    ]
    assert metric_notes(results) == ["a, b, c and 2 more: why"]
    other = MetricResult("f", 1, 1, 1, 1, "s", note="few")
    assert metric_notes([*results[:2], other, MetricResult("g", 1, 1, 1, 1, "s")]) == [
        "a, b: why",
        "f: few",
    ]


def test_custom_box_metrics_count_what_could_not_be_read(tmp_path: Path) -> None:
    task = custom(tmp_path, ["{<0><0><10><10>}"] * 3, "box-iou", "box-accuracy")
    results = answered(
        task, tmp_path, ["{<0><0><10><10>}", "{<10><10><0><0>}", "{<0><0><10>}"]
    ).results
    found = values(results)
    assert found["box-repaired"] == found["box-malformed"] == pytest.approx(1 / 3)
    assert len(results) == len(found)


def test_areas_come_from_the_scores_of_a_predictions_file(tmp_path: Path) -> None:
    task = custom(tmp_path, ["yes", "no", "yes"], "auroc")
    rows = join_predictions(task.samples(tmp_path), {})
    for row, score in zip(rows, [0.9, 0.5, 0.2], strict=True):
        row["scores"] = score
    assert values(task.score(rows).results) == {"auroc": 0.5}
    rows[0]["prediction"], rows[1]["prediction"] = "yes", "no"
    del rows[1]["scores"]
    with pytest.raises(DataError, match="'scores'"):
        task.score(rows)
    rows[1]["prediction"] = ""  # no answer at all: the negative item ranks above all others
    assert values(task.score(rows).results) == {"auroc": 0}

    task = custom(tmp_path, ["CT", "MRI"], "auroc")
    rows = join_predictions(task.samples(tmp_path), {})
    rows[0]["scores"], rows[1]["scores"] = {"ct": 0.9, "mri": 0.1}, {"ct": 0.2, "mri": 0.8}
    assert values(task.score(rows).results) == {"auroc": 1, "auroc[ct]": 1, "auroc[mri]": 1}

    layouts.medmnist(tmp_path, "dermamnist", True)
    derma = TASKS.get("medmnist-derma")(rounds=5)
    rows = join_predictions(derma.samples(tmp_path), {})
    for row in rows:
        row["scores"] = [float(name == row["answer"]) for name in derma.classes]
    assert values(derma.score(rows).results)["auroc"] == 1
    rows[0]["scores"] = [0.5]
    with pytest.raises(DataError, match="one number for each of"):
        derma.score(rows)


def test_the_table_of_m3d_says_what_is_not_available(tmp_path: Path) -> None:
    layouts.m3d_seg(tmp_path)
    scores = answered(TASKS.get("m3d-reg")(rounds=5), tmp_path, ["liver"] * 3)
    by_name = {result.name: result for result in scores.original}
    assert list(by_name) == [
        "m3d-bench-bleu-1",
        "m3d-bench-rouge-1",
        "m3d-bench-meteor",
        "m3d-bench-bertscore-f1",
    ]
    assert by_name["m3d-bench-bertscore-f1"].signature == "n/a: no encoder is given as 'bertscore'"
    assert np.isnan(by_name["m3d-bench-bertscore-f1"].value)


def test_a_csv_without_its_columns_is_explained(tmp_path: Path) -> None:
    layouts.put_csv(tmp_path / "x.csv", [{"name": "a"}])
    with pytest.raises(DataError, match=r"column\(s\) \['type'\] are missing"):
        list(read_csv(tmp_path / "x.csv", ("name", "type")))


def test_long_reports_fit_into_a_csv_field(tmp_path: Path) -> None:
    layouts.put_csv(tmp_path / "x.csv", [{"name": "a" * 200_000}])
    assert len(next(iter(read_csv(tmp_path / "x.csv", ("name",))))["name"]) == 200_000


def test_m3d_training_data_leaves_out_what_it_cannot_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layouts.m3d_cap(tmp_path)
    layouts.m3d_vqa(tmp_path)
    table = json.loads((tmp_path / "M3D_Cap.json").read_text())
    gone = {"image": "M3D_Cap/ct_case/7/a.npy", "text": "M3D_Cap/ct_case/7/text.txt"}
    for split in ("train", "test"):
        table[split] = [*table[split], gone, {"image": 5}]
    (tmp_path / "M3D_Cap.json").write_text(json.dumps(table))
    assert len(list(M3DCap().samples(tmp_path, "train"))) == 2
    assert "M3D_Cap.json: 2 of 4 rows left out; the first: " in caplog.text
    with pytest.raises(
        DataError, match=r"text\.txt"
    ):  # a test is answered as a whole or not at all
        list(M3DCap().samples(tmp_path, "test"))

    header = (
        "Image Path,Question Type,Question,Choice A,Choice B,Choice C,Choice D,Answer,Answer Choice"
    )
    rows = [
        "ct_case/000000/Axial.npy,4,Is there gas?,Yes,No,,,Yes,A",
        "ct_case/000000/Axial.npy,4,Gas?,Yes,No,,,No,E",
    ]
    (tmp_path / "M3D_VQA_yn_train.csv").write_text("\n".join([header, *rows]))
    (sample,) = M3DClosedVQA().samples(tmp_path, "yn_train")
    assert sample.answer == "A. Yes"
    (tmp_path / "M3D_VQA_yn_train.csv").write_text(
        "Image Path,Question,Answer\nct_case/000000/Axial.npy,Gas?,No"
    )
    (sample,) = M3DOpenVQA().samples(tmp_path, "yn_train")
    assert sample.answer == "No"
    with pytest.raises(DataError, match="none of 1 rows can be used"):
        list(M3DClosedVQA().samples(tmp_path, "yn_train"))


def test_motors_scoring_of_reports_cleans_and_cuts_both_sides() -> None:
    long = " ".join(["word"] * 95)
    assert scoring.motor_text(f"(No) EFFUSION: {long}!").split() == [
        "no",
        "effusion",
        *["word"] * 88,
    ]
    rows = [{"id": "a", "prediction": "no effusion", "answer": "No effusion. *" + long}]
    results = {r.name: r for r in scoring.motor_report(rows, Resampling(rounds=0))}
    assert "motor-90-words/bleu-4" in results or "motor-90-words/bleu-coco-4" in results
    assert all(
        "1 of 1 references are longer than 90 words" in str(r.note) for r in results.values()
    )
