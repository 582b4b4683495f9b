"""The quickstart's data: true answers, no mirrored anatomy, a split by volume; and its scoring, by
hand."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from medm.data.conversations import Conversations
from medm.data.options import SourceOptions
from medm.data.records import Records
from medm.training.recipe import load_recipe
from tests.examples.scripts import scripts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def importable():
    with scripts("quickstart"):
        yield


@pytest.fixture(scope="module")
def volumes(importable):
    return importlib.import_module("volumes")


@pytest.fixture(scope="module")
def prepare(importable):
    return importlib.import_module("prepare")


@pytest.fixture(scope="module")
def report(importable):
    return importlib.import_module("report")


@pytest.fixture(scope="module")
def folder(prepare, tmp_path_factory):
    """Everything that prepare.py writes, without the head CT that may or may not be fetched."""
    folder = tmp_path_factory.mktemp("quickstart") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "ASSETS", Path("/nowhere"))
        assert prepare.main([str(folder)]) == 0
    return folder


def records(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


# Volumes


def test_every_volume_is_there_with_its_licence_and_masks(volumes):
    for name, about in volumes.read_table().items():
        if about.split == "extra":
            assert not (volumes.DATA / f"{name}.nii.gz").exists(), (
                "its licence does not allow it to be committed"
            )
            continue
        voxels, spacing = volumes.read_voxels(volumes.DATA / f"{name}.nii.gz")
        assert (volumes.DATA / "licences" / about.licence).stat().st_size > 500
        assert about.about and about.source
        for kind, there in (("lesion", about.lesion), ("lungs", about.lungs)):
            mask = volumes.DATA / f"{name}.{kind}.nii.gz"
            assert mask.exists() is there
            if there:
                assert volumes.read_voxels(mask)[0].shape == voxels.shape
        if about.modality == "CT":
            assert voxels.dtype == np.int16 and voxels.min() >= -1024  # HU
        else:
            assert voxels.dtype == np.uint8 and voxels.max() == 255
        assert (spacing > 0.5).all() and (spacing < 7).all()


def test_headers_name_nobody(volumes):
    for file in volumes.DATA.glob("*.nii.gz"):
        image = sitk.ReadImage(file)
        for key in ("descrip", "aux_file", "db_name", "intent_name"):
            assert not (image.HasMetaDataKey(key) and image.GetMetaData(key).strip())


def test_split_has_every_region_and_plane_on_both_sides_and_two_unseen_pairs(volumes):
    table = volumes.read_table().values()
    sides = {side: [about for about in table if about.split == side] for side in ("train", "test")}
    for field in ("modality", "region"):
        assert {getattr(a, field) for a in sides["train"]} == {
            getattr(a, field) for a in sides["test"]
        }
    planes = [{plane for about in side for plane in about.planes} for side in sides.values()]
    assert planes[0] == planes[1] == set(volumes.PLANES)
    pairs = {side: {(a.modality, a.region) for a in members} for side, members in sides.items()}
    assert pairs["test"] - pairs["train"] == {("CT", "spine"), ("MR", "abdomen")}


@pytest.mark.parametrize(
    ("name", "side"),
    # as the sources describe them: a nodule in the right upper lobe, a mass in the left lower lobe
    [("chest-ct-1", "right lung"), ("chest-ct-2", "left lung")],
)
def test_lesion_is_on_the_side_where_the_picture_shows_it(prepare, volumes, name, side):
    scan = prepare.Scan.load(name, volumes.read_table()[name])
    index = int(scan.lesion.sum(axis=(1, 2)).argmax())
    picture = prepare.Picture("x.png", name, "test", "axial", index, prepare.View((-1000, 400)), {})
    placed = {
        key: prepare.bounding_box(
            np.asarray(
                prepare.place(
                    mask[index].astype(np.uint8) * 255,
                    scan.pixel_size("axial"),
                    picture.view,
                    smooth=False,
                )
            )
            > 0
        )
        for key, mask in (
            ("lesion", scan.lesion),
            ("right lung", scan.lungs == 1),
            ("left lung", scan.lungs == 2),
        )
    }
    centre = {key: (box[0] + box[2]) / 2 for key, box in placed.items()}
    assert centre["right lung"] < prepare.SIDE / 2 < centre["left lung"], (
        "the patient's right is on the left"
    )
    assert placed[side][0] - 8 <= centre["lesion"] <= placed[side][2] + 8


# Pictures


def test_level_is_the_third_of_the_organ_and_borders_are_left_out(prepare, volumes):
    about = volumes.read_table()["chest-ct-1"].model_copy(
        update={"level": [10, 39]}
    )  # thirds end at 20 and 30
    scan = prepare.Scan("x", about, np.zeros((48, 4, 4)), np.ones(3), None, None)
    assert [scan.level(index) for index in (9, 10, 18, 19, 20, 21, 25, 28, 31, 39, 40)] == [
        None,
        "lower",
        "lower",
        None,
        None,
        "middle",
        "middle",
        "middle",
        "upper",
        "upper",
        None,
    ]


def test_lesion_is_asked_only_where_the_answer_is_sure(prepare, volumes):
    about = volumes.read_table()["chest-ct-1"]
    lesion = np.zeros((6, 10, 10), dtype=bool)
    lesion[2, :5, :5] = True  # 25 pixels of 1 mm2
    lesion[3, 0, 0] = True
    scan = prepare.Scan("x", about, np.zeros((6, 10, 10)), np.ones(3), lesion, None)
    assert [scan.lesion_answer("axial", index) for index in range(6)] == [
        "no",
        None,
        "yes",
        None,
        None,
        "no",
    ]
    assert scan.lesion_answer("coronal", 2) is None


def test_place_keeps_proportions_turns_clockwise_and_moves(prepare):
    pixels = np.zeros((10, 20), dtype=np.uint8)
    pixels[:, 15:] = (
        255  # the right quarter; pixels are 2 mm high and 1 mm wide, so the slice is square
    )
    upright = np.asarray(prepare.place(pixels, (2.0, 1.0), prepare.View((0, 1)), smooth=False))
    assert upright.shape == (224, 224)
    assert (upright[:, 168:] == 255).all() and (upright[:, :168] == 0).all()
    moved = np.asarray(
        prepare.place(pixels, (2.0, 1.0), prepare.View((0, 1), shift=(0.25, 0)), smooth=False)
    )
    assert (moved == 0).all(), "what was the right quarter is outside now"
    turned = np.asarray(
        prepare.place(pixels, (2.0, 1.0), prepare.View((0, 1), angle=90), smooth=False)
    )
    assert (turned[168:] == 255).mean() > 0.95 and (turned[:160] == 0).all()


def test_pictures_are_never_mirrored(prepare):
    pixels = np.zeros((40, 40), dtype=np.uint8)
    pixels[:20, 20:] = 100  # upper right
    pixels[20:, 20:] = 200  # lower right
    random = np.random.default_rng(3)
    for _ in range(50):
        view = prepare.train_view([0, 255], random)
        assert 0 <= view.window[0] < 26, "black stays black"
        shown = np.asarray(prepare.place(pixels, (1.0, 1.0), view)).astype(float)
        left, right = shown[:, :112].mean(), shown[:, 112:].mean()
        upper, lower = shown[:112].mean(), shown[112:].mean()
        assert right > left and lower > upper


def test_records_are_valid_and_split_by_volume(prepare, volumes, folder):
    table = volumes.read_table()
    for name in ("pretrain", "finetune", "test", "tasks_train", "tasks_test"):
        source = SourceOptions(path=str(folder / f"{name}.json"), root=str(folder / "images"))
        read = Records([source], Conversations(inference=name.endswith("test")))
        side = "test" if name.endswith("test") else "train"
        for index in range(len(read)):
            sample = read[index]
            assert read.media_path(index, sample.media[0]).is_file()
            assert table[sample.extra["source_volume"]].split == side
            assert sample.answer if side == "test" else sample.answer is None
    of_volume = {
        side: {r["source_volume"] for r in records(folder, side)} for side in ("finetune", "test")
    }
    assert not of_volume["finetune"] & of_volume["test"]
    test = records(folder, "test")
    assert len({record["id"] for record in test}) == len(test)
    assert {r["question_type"] for r in test} == set(prepare.QUESTIONS)


def test_answers_are_what_the_volume_says(volumes, folder):
    table = volumes.read_table()
    for picture in records(folder, "pictures"):
        about, answers = table[picture["volume"]], picture["answers"]
        assert (answers["modality"], answers["region"], answers["plane"]) == (
            about.modality,
            about.region,
            picture["plane"],
        )
        if "level" in answers:
            low, high = about.level
            third = (picture["index"] + 0.5 - low) / (high + 1 - low) * 3
            assert answers["level"] == ("lower", "middle", "upper")[int(third)]


def test_conversations_ask_each_type_first_sometimes(prepare, folder):
    first = {
        r["conversations"][0]["value"].removeprefix("<image>\n")
        for r in records(folder, "finetune")
    }
    assert first == {question for question, _ in prepare.QUESTIONS.values()}


def test_boxes_lie_in_the_picture_and_round_trip_through_their_text(prepare, folder):
    boxed = [r for r in records(folder, "tasks_test") if r["task"] == "rec"]
    by_file = {p["file"]: p for p in records(folder, "pictures")}
    assert {r["question_type"] for r in boxed} == {"left lung", "right lung", "lesion"}
    for record in boxed:
        box = by_file[record["image"][0]]["boxes"][record["question_type"]]
        parsed = prepare.BinnedBoxes().parse(record["answer"]).first
        assert all(
            abs(f * prepare.SIDE - pixel) <= prepare.SIDE / 100
            for f, pixel in zip(parsed, box, strict=True)
        )


def test_second_run_does_nothing_and_another_is_the_same(
    prepare, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(prepare, "ASSETS", Path("/nowhere"))
    before = (folder / "test.json").stat().st_mtime_ns
    assert prepare.main([str(folder)]) == 0
    assert "here already" in capsys.readouterr().out
    assert (folder / "test.json").stat().st_mtime_ns == before
    assert prepare.main([str(tmp_path / "again")]) == 0
    for name in (
        "pretrain.json",
        "finetune.json",
        "test.json",
        "pictures.json",
        "images/chest-ct-2_axial_03.png",
    ):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


# Scores


@pytest.mark.parametrize(
    ("options", "reply", "answer"),
    [
        (["CT", "MR"], "CT", "CT"),
        (["CT", "MR"], "This is a CT image.", "CT"),
        (["CT", "MR"], "It is either CT or MR.", None),
        (["CT", "MR"], "", None),
        (["axial", "coronal", "sagittal"], "Sagittal.", "sagittal"),
        (["axial", "coronal", "sagittal"], "I cannot see the image", None),
        (["yes", "no"], "No.", "no"),
        (["yes", "no"], "Abnormal", None),
        (["yes", "no"], "Yes, on the left", "yes"),
        (["lower", "middle", "upper"], "upper third", "upper"),
    ],
)
def test_reply_counts_when_it_names_one_answer(report, options, reply, answer):
    assert report.parse(options, reply) == answer


def answered(report, truth_and_reply, *, volume="v1", before="I do not know"):
    asked = {
        "kind": "modality",
        "question": "?",
        "options": ["CT", "MR"],
        "volume": volume,
        "split": "test",
    }
    return [
        report.Answered(**asked, picture="x.png", truth=truth, before=before, after=reply)
        for truth, reply in truth_and_reply
    ]


def test_scores_by_hand(report):
    items = answered(report, [("CT", "CT"), ("CT", "MR"), ("MR", "MR"), ("CT", "CT")])
    items += answered(report, [("MR", "CT")], volume="v2", before="MR")
    (row,) = report.score(items, {"modality": "MR"})
    assert row["n"] == 5 and row["volumes"] == 2
    assert row["after"] == pytest.approx(3 / 5)
    assert row["before"] == pytest.approx(1 / 5)
    assert row["most_frequent"] == pytest.approx(2 / 5)  # always "MR"
    assert row["best_constant"] == pytest.approx(3 / 5)  # always "CT"
    assert (row["low"], row["high"]) == (0.0, 0.75)  # one of the volumes alone: 3 of 4, or 0 of 1
    assert report.by_volume(items) == {
        "v1": {"modality": {"after": 0.75, "n": 4}},
        "v2": {"modality": {"after": 0.0, "n": 1}},
    }


def test_one_volume_has_no_interval(report):
    assert report.interval_over_volumes(np.array([1.0, 0.0]), ["a", "a"]) == (None, None)


def test_most_frequent_counts_training_answers(report):
    turns = [("<image>\nIs this image CT or MR?", "CT"), ("Is a lesion visible: yes or no?", "no")]
    record = {"conversations": [{"value": text} for pair in turns for text in pair]}
    other = {"conversations": [{"value": "<image>\nIs this image CT or MR?"}, {"value": "MR"}]}
    questions = {
        "modality": ("Is this image CT or MR?", []),
        "lesion": ("Is a lesion visible: yes or no?", []),
    }
    assert report.most_frequent([record, other, other], questions) == {
        "modality": "MR",
        "lesion": "no",
    }


def test_report_is_written_whole_from_replies(report, folder, tmp_path, capsys):
    (tmp_path / "data").symlink_to(folder)
    questions = records(folder, "test")
    for when in ("before", "after"):
        lines = [
            {"index": index, "reply": record["answer"] if when == "after" else "<b>no idea</b>"}
            for index, record in enumerate(questions)
        ]
        lines[0] = {"index": 0, "error": "image is missing"}
        (tmp_path / f"{when}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "loss.jsonl").write_text(
        '{"step": 1, "loss": 4.0}\n{"step": 2, "loss": 1.0}\n{"step": 2}\n'
    )
    assert report.main([str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {row["question"]: row for row in results["held_out"]}
    assert rows["modality"]["after"] == pytest.approx(1 - 1 / rows["modality"]["n"])
    assert rows["plane"]["after"] == 1 and rows["plane"]["before"] == 0
    assert rows["region"]["volumes"] == 6 and results["apart"] == []
    page = (tmp_path / "sheet.html").read_text()
    assert "Not for clinical use" in page and "<b>no idea</b>" not in page
    assert page.count("<img") >= 24 and page.count("<svg") == 1
    assert (tmp_path / "results.md").read_text() in capsys.readouterr().out

    (tmp_path / "before.jsonl").unlink()
    assert report.main([str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["held_out"]
    assert {row["before"] for row in rows} == {None} and rows[1]["after"] == 1


def test_report_asks_for_missing_replies(report, folder, tmp_path):
    (tmp_path / "data").symlink_to(folder)
    with pytest.raises(SystemExit, match=r"after\.jsonl: not there"):
        report.main([str(tmp_path)])
    (tmp_path / "after.jsonl").write_text('{"index": 0, "reply": "CT"}\n')
    with pytest.raises(SystemExit, match=r"after\.jsonl answers 1 of"):
        report.main([str(tmp_path)])


# Recipes


def test_recipes_train_on_what_prepare_writes_and_stages_follow_each_other(folder):
    pretrain, finetune = (
        load_recipe(ROOT / "recipes" / "quickstart" / f"{s}.yaml") for s in ("pretrain", "finetune")
    )
    assert finetune.init_from == pretrain.output_dir
    assert finetune.model == pretrain.model
    for recipe in (pretrain, finetune):
        (source,) = recipe.data.train
        assert (folder / Path(source.path).name).is_file()
        assert (
            Path(source.path).parent
            == Path(source.root).parent
            == Path("work_dirs/quickstart/data")
        )
        steps = recipe.train.max_steps
        assert steps * recipe.train.per_device_train_batch_size <= len(
            records(folder, Path(source.path).stem)
        )
