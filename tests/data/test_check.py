from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import medm.data.check
from medm.data.check import Report, blank_pixels, check, merged, require_sources
from medm.data.conversations import Conversations, segments
from medm.data.limits import LengthLimit
from medm.data.options import DataOptions, SourceOptions
from medm.errors import RecipeError
from medm.imaging import Preprocess, VolumePreprocess
from medm.types import IGNORE_INDEX, Example
from tests.data.tiny import (
    PLACEHOLDER,
    PREPROCESS,
    conversations,
    gpt,
    human,
    record,
    to_text,
    write_image,
    write_lines,
)
from tests.imaging.tiny import phantom, write_series


def source(folder: Path, *values: Any, name: str = "a.jsonl", **fields: Any) -> SourceOptions:
    return SourceOptions(path=str(write_lines(folder / name, *values)), **fields)


def places(report: Report) -> list[tuple[str, int | None, str | None]]:
    return [(Path(str(error.file)).name, error.index, error.field) for error in report.bad]


def check_files(
    sources: list[SourceOptions], *, inference: bool = False, **settings: Any
) -> Report:
    """Records and files alone, as without a model."""
    return check(sources, Conversations(inference=inference), **settings)


def test_a_clean_file(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    report = check_files(
        [
            source(
                tmp_path,
                record("<image>q", "A", image="a.png", task="vqa", id="1"),
                {
                    "conversations": [human("a"), gpt("b"), human("c"), gpt("d")],
                    "task": "chat",
                    "id": 2,
                },
                record("<image><image>", "A", image=["a.png", "a.png"], task="vqa"),
            )
        ]
    )
    assert report.ok and report.bad == []
    assert (report.records, report.counts["turn"], report.text_only, dict(report.media)) == (
        3,
        8,
        1,
        {"image": 3},
    )
    assert dict(report.tasks) == {"vqa": 2, "chat": 1}
    assert f"{tmp_path / 'a.jsonl'}: 3 records" in report.lines()
    assert "3 records, 0 bad; 8 turns, 3 images, 1 text only" in report.lines()


def test_masks_exist_inside_the_root_and_are_counted(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    masked = record("<image>", "[SEG] and [SEG]", image="a.png", masks=["a.png", "a.png"])
    report = check(
        [
            source(
                tmp_path,
                masked,
                {**masked, "masks": ["a.png", "gone.png"]},
                {**masked, "masks": ["../a.png", "a.png"]},
                {**masked, "masks": ["a.png"]},
            )
        ],
        conversations(),
        preview=True,
    )
    assert places(report) == [
        ("a.jsonl", 1, "masks.1"),
        ("a.jsonl", 2, "masks.0"),
        ("a.jsonl", 3, "masks"),
    ]
    assert "no such file" in report.bad[0].reason
    assert dict(report.media) == {"image": 1, "mask": 2}
    assert (
        "4 records, 3 bad; the good ones have 2 turns, 1 image, 2 masks, 0 text only"
        in report.lines()
    )
    assert "  [x] '[SEG] and [SEG]'" in report.lines()


def test_every_bad_record_is_named_in_order(tmp_path: Path) -> None:
    write_image(tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    files = [
        source(
            tmp_path,
            record("<image>", "A", image="good.png"),
            record("<image>", "A", image="gone.png"),
            record("<image><image>", "A", image=["good.png", "empty.png"]),
            record("<image>", "A", image="page.jpg"),
            record("<image>", "A", image="page.jpg"),
            record("<image>", "A", image="../a.png"),
            record("<image>", "A"),
            {"conversations": []},
            [],
        ),
        source(tmp_path, record(), {"conversations": [human("q"), gpt("")]}, name="b.jsonl"),
        SourceOptions(path=str(tmp_path / "none.jsonl")),
    ]
    report = check_files(files)
    assert not report.ok and report.num_bad == 10
    assert sorted(places(report), key=str) == sorted(
        [
            ("a.jsonl", 1, "image"), ("a.jsonl", 2, "image.1"), ("a.jsonl", 3, "image"), ("a.jsonl", 4, "image"),
            ("a.jsonl", 5, "image"), ("a.jsonl", 6, "conversations.0.value"), ("a.jsonl", 7, "conversations"),
            ("a.jsonl", 8, None), ("b.jsonl", 1, "conversations.1"), ("none.jsonl", None, None),
        ], key=str,
    )  # fmt: skip
    assert report.records == 11 and report.files == {
        str(tmp_path / "a.jsonl"): 9,
        str(tmp_path / "b.jsonl"): 2,
    }
    assert any(
        "a.jsonl, record 3, field 'image': " in line and "HTML page" in line
        for line in report.lines()
    )
    assert report.text_only == 1 and report.media["image"] == 1


@pytest.mark.parametrize(("name", "cut"), [("a.png", 30), ("a.jpg", 2), ("a.jpg", 300)])
def test_an_image_without_its_end_is_found_without_decoding_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, cut: int
) -> None:
    path = write_image(tmp_path / name, size=(64, 64))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut])
    file = source(tmp_path, record("<image>", "A", image=name))
    assert places(check_files([file])) == [("a.jsonl", 0, "image")]
    monkeypatch.setattr("medm.imaging.images.read_image", lambda *_: pytest.fail("decoded"))
    path.write_bytes(whole + b"written behind the end by a scanner")
    assert check_files([file]).ok


def test_a_file_is_checked_for_each_kind_that_names_it(tmp_path: Path) -> None:
    """A good volume is no image, and the other way round, whichever record comes first."""
    np.save(tmp_path / "deep.npy", np.zeros((3, 4, 5), np.float32))
    write_image(tmp_path / "flat.png")
    as_volume = [record("<volume>", "A", volume=name) for name in ("deep.npy", "flat.png")]
    as_image = [record("<image>", "A", image=name) for name in ("deep.npy", "flat.png")]
    for decode in (False, True):
        first = check_files([source(tmp_path, *as_volume, *as_image, *as_volume)], decode=decode)
        assert places(first) == [
            ("a.jsonl", 1, "volume"),
            ("a.jsonl", 2, "image"),
            ("a.jsonl", 5, "volume"),
        ]
        other = check_files([source(tmp_path, *as_image, *as_volume, *as_image)], decode=decode)
        assert places(other) == [
            ("a.jsonl", 0, "image"),
            ("a.jsonl", 3, "volume"),
            ("a.jsonl", 4, "image"),
        ]


def test_a_series_is_checked_once_by_its_headers_and_as_training_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_series(tmp_path / "study", phantom(), number=3, prefix="A")
    write_series(tmp_path / "study", phantom()[:, :, 2:8], number=4, prefix="B")
    write_series(tmp_path / "gap", phantom())[4].unlink()
    asked = ("study", "study#4", "study", "gap")
    file = source(tmp_path, *(record("<volume>", "A", volume=name) for name in asked))
    calls: list[Path] = []
    plain = medm.data.check.probe
    monkeypatch.setattr(
        "medm.data.check.probe", lambda path, **rest: calls.append(path) or plain(path, **rest)
    )
    report = check_files([file])
    assert [(error.index, error.reason.split(": ")[1].split("; ")[0]) for error in report.bad] == [
        (0, "2 series fit"),
        (2, "2 series fit"),
        (3, "about 1 slice is missing"),
    ]
    assert len(calls) == 3
    largest: dict[str, Preprocess] = {"volume": VolumePreprocess(series="largest")}
    assert [error.index for error in check([file], conversations(largest)).bad] == [3]


@pytest.mark.parametrize("shards", [1, 3])
def test_a_wrong_root_is_one_error(tmp_path: Path, shards: int) -> None:
    write_image(tmp_path / "good" / "0.png")
    asked = [record("<image>", "A", image=f"{number}.png") for number in range(5)]
    files = [
        source(tmp_path, *asked[:1], name="a.jsonl", root=str(tmp_path / "good")),
        source(
            tmp_path,
            *asked,
            record(),
            {"conversations": []},
            name="b.jsonl",
            root=str(tmp_path / "wrong"),
        ),
        source(tmp_path, *asked, name="c.jsonl", root=str(tmp_path / "good")),
    ]
    report = merged([check_files(files, shard=(number, shards)) for number in range(shards)])
    folded, other, *missing = report.lines()[:6]
    assert (
        f"b.jsonl: no file of this source exists under its root {(tmp_path / 'wrong').resolve()}: "
        "is the folder right?" in folded
    )
    assert (
        "5 records name files; the first is record 0, field 'image': '0.png': no such file"
        in folded
    )
    assert "b.jsonl, record 6" in other
    assert [line.split(": ")[0] for line in missing] == [
        f"{tmp_path / 'c.jsonl'}, record {number}, field 'image'" for number in range(1, 5)
    ]
    assert report.num_bad == 10 and report.bad[0].file == str(tmp_path / "b.jsonl")
    assert "13 records, 10 bad; the good ones have 6 turns, 2 images, 1 text only" in report.lines()
    assert not any("more bad records" in line for line in report.lines())


def test_a_path_that_no_system_takes_is_one_bad_record(tmp_path: Path) -> None:
    """The check goes on to the records after it."""
    write_image(tmp_path / "a.png")
    paths = [".#1", "a/.#1", "#" + "x" * 300, "a.png", "a.png#" + "1" * 300]
    report = check_files(
        [source(tmp_path, *(record("<image>", "A", image=path) for path in paths))]
    )
    assert places(report) == [("a.jsonl", index, "image") for index in (0, 1, 2, 4)]


def test_a_wrong_root_of_many_records_is_counted_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medm.data.check.MAX_KEPT", 2)
    report = check_files(
        [source(tmp_path, *(record("<image>", "A", image="gone.png") for _ in range(9)))]
    )
    assert len(report.bad) == 1 and "9 records name files" in report.bad[0].reason
    assert report.num_bad == 9 and not any("more bad records" in line for line in report.lines())


def test_an_annotation_file_that_cannot_be_read_is_no_bad_record(tmp_path: Path) -> None:
    report = check_files(
        [SourceOptions(path=str(tmp_path / "none.json")), source(tmp_path, record())]
    )
    assert report.lines()[0] == f"{tmp_path / 'none.json'}: no such file"
    assert report.lines()[2:4] == [
        "1 annotation file cannot be read",
        "1 record, 0 bad; 2 turns, no images or volumes, 1 text only",
    ]
    assert not report.ok


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "none.json"}, "data.train.1.path: none.json: no such file"),
        ({"path": "."}, "data.train.1.path: .: is a folder; name the annotation file"),
        ({"path": "table.csv"}, "data.train.1.path: table.csv: looks like CSV"),
        ({"root": "gone"}, "data.train.1.root: gone: no such folder"),
        ({"root": "a.jsonl"}, "data.train.1.root: a.jsonl: no such folder"),
    ],
)
def test_files_and_folders_of_a_recipe_are_checked_by_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl", record())
    (tmp_path / "table.csv").write_text("id;question\n1;q\n")
    good = {"path": "a.jsonl", "root": "."}
    require_sources(DataOptions.model_validate({"train": [good], "eval": [good]}))
    with pytest.raises(RecipeError) as caught:
        require_sources(DataOptions.model_validate({"train": [good, {**good, **change}]}))
    assert str(caught.value).startswith(message)


def test_damage_in_the_middle_of_an_image_is_found_when_decoding(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", size=(64, 64))
    whole = path.read_bytes()
    path.write_bytes(whole[:41] + b"\xff\xff" + whole[43:])  # where the compressed pixels begin
    file = source(tmp_path, record("<image>", "A", image="a.png"))
    assert check_files([file]).ok
    assert places(check_files([file], decode=True)) == [("a.jsonl", 0, "image")]


def test_branches_that_the_model_lacks(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"x")
    file = source(tmp_path, record("<image3d>", "A", image3d="a.npy"))
    report = check([file], conversations())
    assert (
        places(report) == [("a.jsonl", 0, "image3d")]
        and "the model takes no volumes; it takes images" in report.bad[0].reason
    )


def test_duplicate_ids_are_reported_but_not_bad(tmp_path: Path) -> None:
    report = check_files(
        [
            source(
                tmp_path,
                *(record(id=name) for name in ("a", "b", "a", "a", 1, "1")),
                record(),
                record(),
            )
        ]
    )
    assert report.ok and report.num_duplicate_ids == 3
    assert [(name, index) for name, _, index in report.duplicate_ids] == [
        ("a", 2),
        ("a", 3),
        ("1", 5),
    ]
    assert any(
        line.startswith(
            "3 records with an id that an earlier one has (not an error); the first: 'a'"
        )
        for line in report.lines()
    )


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_ranks_that_share_the_work_report_what_one_would(tmp_path: Path, shards: int) -> None:
    """Also through pickle, as processes send it to one another."""
    write_image(tmp_path / "a.png")
    first = source(
        tmp_path,
        record("<image>", "A", image="a.png", id="x", task="vqa"),
        {"conversations": []},
        record(id="y"),
        record("<image>", "A", image="gone.png", id="x"),
        record("long " * 30, "A", task="chat"),
        record(id="z"),
    )
    second = source(
        tmp_path, record(id="z"), [], record(id="x", task="vqa"), record(id="y"), name="b.jsonl"
    )
    missing = SourceOptions(path=str(tmp_path / "missing.json"))
    settings: dict[str, Any] = {"preview": True, "length_limit": LengthLimit(40, "skip")}
    sources = [first, missing, second, first]
    whole = check(sources, conversations(), **settings)
    assert (
        whole.num_bad == 6
        and whole.num_duplicate_ids == 8
        and whole.num_too_long == 2
        and 0 in whole.lengths
    )
    parts = [
        check(sources, conversations(), shard=(number, shards), **settings)
        for number in range(shards)
    ]
    assert max(part.records for part in parts) - min(part.records for part in parts) <= 1
    together = merged(pickle.loads(pickle.dumps(parts)))
    assert together.lines() == whole.lines()
    assert (together.lengths, together.duplicate_ids) == (whole.lengths, whole.duplicate_ids)
    assert (together.media, together.tasks, together.preview) == (
        whole.media,
        whole.tasks,
        whole.preview,
    )
    places = {
        (file, index): json.loads(line)["id"]
        for file in (first.path, second.path)
        for index, line in enumerate(Path(file).read_text().splitlines())
        if '"id"' in line
    }
    assert all(places[file, index] == name for name, file, index in together.duplicate_ids)


def test_inference_records_and_the_limit(tmp_path: Path) -> None:
    file = source(
        tmp_path, *({"conversations": [human("q")]} for _ in range(5)), {"conversations": []}
    )
    assert check_files([file]).num_bad == 6
    assert check_files([file], inference=True).num_bad == 1
    report = check_files([file], inference=True, limit=5)
    assert report.ok and report.records == 5


def test_lengths_policies_and_preview(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    file = source(
        tmp_path,
        record("q", ""),
        record("<image>\nWhich?", "Axial.", image="a.png"),
        record("q", "A" * 40),
        record("q" * 40, "A"),
    )
    pipeline = conversations()
    assert check([file], pipeline).lengths == [0, 18, 41, 41]
    stop = check([file], pipeline, length_limit=LengthLimit(20))
    assert places(stop) == [
        ("a.jsonl", 0, "conversations.1"),
        ("a.jsonl", 2, None),
        ("a.jsonl", 3, None),
    ]
    assert stop.lengths == [0, 18, 0, 0]
    cut = check([file], pipeline, length_limit=LengthLimit(20, "truncate_text"), preview=True)
    assert (cut.num_bad, cut.num_truncated, cut.lengths) == (2, 1, [0, 18, 20, 0])
    skip = check([file], pipeline, length_limit=LengthLimit(20, "skip"), preview=True)
    assert (skip.num_bad, skip.num_too_long, skip.lengths) == (1, 2, [0, 18, 0, 0])
    assert "too long: 2 left out, 0 shortened" in skip.lines()
    assert [(part.text, part.learned) for part in skip.preview] == [
        ("<image>" * 5 + "\nWhich?", False),
        ("Axial.", True),
    ]
    assert "  [x] 'Axial.'" in skip.lines()
    assert any("tokens per record: 18 to 18" in line for line in skip.lines())


def test_repeated_tokens_are_shown_once() -> None:
    example = Example([PLACEHOLDER] * 300 + [67, 67, 68], [IGNORE_INDEX] * 301 + [67, 68])
    assert [(part.text, part.learned) for part in segments(example, to_text)] == [
        ("<image> x 300 A", False),
        ("AB", True),
    ]


def test_blank_pixels_have_the_shape_and_no_weight() -> None:
    preprocess = {**PREPROCESS, "volume": VolumePreprocess(size=[8, 16, 16])}
    blank = {branch: blank_pixels(how) for branch, how in preprocess.items()}
    assert blank["image"].shape == (3, 4, 4) and not blank["image"].any()
    assert blank["volume"].shape == (1, 8, 16, 16) and blank["volume"].strides == (0, 0, 0, 0)


def test_bad_records_beyond_the_kept_ones_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medm.data.check.MAX_KEPT", 2)
    report = check_files([source(tmp_path, *([{"conversations": []}] * 5))])
    assert (report.num_bad, len(report.bad)) == (5, 2)
    assert report.lines()[2] == "... and 3 more bad records"


def test_reports_hold_no_text_of_records(tmp_path: Path) -> None:
    secret = "Jane Doe"
    report = check_files(
        [source(tmp_path, record(secret, secret), record(secret, " "), {"conversations": secret})]
    )
    assert secret not in "\n".join(report.lines())


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    check_files(
        [source(tmp_path, *([record()] * 2500))],
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(1000, 2500), (2000, 2500)]
