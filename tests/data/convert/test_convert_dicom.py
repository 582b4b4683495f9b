"""`medm data convert dicom`: series described, joined to reports, and nothing of a patient
written."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    JPEG2000Lossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from medm.imaging.dicom_index import index_series
from tests.cli.runner import medm
from tests.imaging.tiny import CANARY, phantom, write_multi_frame, write_report, write_series

Change = Callable[[Dataset, int], None]
SALT = "a salt of 16 bytes"


def study(
    folder: Path, patient: str, accession: str, *, uid: str | None = None, **series: Change | None
) -> str:
    """A study with a series for each name, in a folder each; its UID."""
    uid = uid or generate_uid()
    for number, (name, further) in enumerate(series.items(), start=1):

        def change(dataset: Dataset, z: int, further: Change | None = further) -> None:
            dataset.StudyInstanceUID, dataset.PatientID = uid, patient
            dataset.AccessionNumber = accession
            dataset.BodyPartExamined, dataset.ImageType = "CHEST", ["ORIGINAL", "PRIMARY", "AXIAL"]
            if further is not None:
                further(dataset, z)

        write_series(folder / name, phantom(), change=change, number=number)
    return uid


def table(file: Path, header: list[str], *rows: list[str]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([header, *rows])
    return file


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def convert(*arguments: object, code: int = 0) -> str:
    done = medm("data", "convert", "dicom", *map(str, arguments))
    said = done.out + done.err
    assert done.code == code, said
    assert "Canary" not in said
    return said


def localizer(dataset: Dataset, z: int) -> None:
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]


def capture(dataset: Dataset, z: int) -> None:
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage


def mixed(dataset: Dataset, z: int) -> None:
    if z == 4:
        dataset.ImageOrientationPatient = [0, 1, 0, 0, 0, 1]


def deflated(dataset: Dataset, z: int) -> None:
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian


def radiographs(dataset: Dataset, z: int) -> None:
    dataset.Modality = "DX"
    dataset.SOPClassUID = DigitalXRayImageStorageForPresentation
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient"):
        delattr(dataset, keyword)


def test_series_are_described_and_unusable_ones_named(tmp_path: Path) -> None:
    root = tmp_path / "in"
    study(root / "a", "p", "1", ct=None, scout=localizer, mixed=mixed, screen=capture)
    study(root / "b", "p", "1", gaps=None, few=None, odd=deflated)
    for file in sorted((root / "b" / "gaps").iterdir(), key=_position)[5:7]:
        file.unlink()
    for file in sorted((root / "b" / "few").iterdir(), key=_position)[3:]:
        file.unlink()
    study(root / "c", "p", "1", dx=radiographs)
    write_report(root / "c" / "sr", pydicom.uid.BasicTextSRStorage, "SR")
    write_multi_frame(root / "d.dcm", phantom())
    (root / "notes.txt").write_text("text")
    index = index_series(root)
    found = {series.place: series for series in index.series}
    problems = {place: series.problem for place, series in found.items()}
    assert found["a/ct"].paths == ("a/ct",) and found["a/ct"].body_part == "CHEST"
    assert found["a/ct"].spacing == (5.0, 2.0, 1.5) and found["a/ct"].slices == 12
    assert found["c/dx"].kind == "image" and len(found["c/dx"].paths) == 12
    assert (problems["a/scout"], problems["c/dx"]) == ("localizer", None)
    for place, words in {
        "a/mixed": "different orientations",
        "a/screen": "secondary capture",
        "b/gaps": "about 2 slices are missing",
        "b/few": "too few slices: 3, expected 8 or more",
        "b/odd": "transfer syntax 'Deflated Explicit VR Little Endian' is not read",
    }.items():
        assert words in (problems[place] or ""), problems
    (multi,) = [series for series in index.usable if series.headers[0].frames > 1]
    assert multi.paths == ("d.dcm",) and multi.slices == 12
    assert (index.without_image, index.not_dicom) == (1, 1)


def _position(file: Path) -> float:
    return float(pydicom.dcmread(file).ImagePositionPatient[2])


def test_a_compressed_series_whose_pixels_are_not_in_frames_is_named(tmp_path: Path) -> None:
    def change(dataset: Dataset, z: int) -> None:
        dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
        dataset["PixelData"].is_undefined_length = False

    study(tmp_path / "in", "p", "1", ct=None)
    source = sorted((tmp_path / "in" / "ct").iterdir())
    for file in source:
        data = file.read_bytes()
        old = b"1.2.840.10008.1.2.1\0"
        file.write_bytes(data.replace(old, b"1.2.840.10008.1.2.4.90"[:20], 1))
    write_series(tmp_path / "in" / "ok", phantom())
    index = index_series(tmp_path / "in")
    assert [series.place for series in index.usable] == ["ok"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nothing_of_a_patient_is_written(tmp_path: Path) -> None:
    """A canary in every text of the headers, and in the reports' other columns."""

    def named(dataset: Dataset, z: int) -> None:
        dataset.BodyPartExamined = "CANARY"
        dataset.PatientAge = "054Y"

    uids = [
        study(tmp_path / "in" / f"s{n}", f"Canary{n // 2}", f"CanaryA{n}", ct=named, mr=None)
        for n in range(6)
    ]
    reports = table(
        tmp_path / "reports.csv",
        ["AccessionNumber", "name", "report"],
        *([f"CanaryA{n}", CANARY, f"Report {n}."] for n in range(4)),
        ["CanaryA4", CANARY, "one"],
        ["CanaryA4", CANARY, "another"],
        ["CanaryZ", CANARY, "of nobody"],
    )
    output = tmp_path / "out" / "r.jsonl"
    said = convert(tmp_path / "in", output, "--reports", reports, "--val", "0.3")
    assert "8 conversations" in said and "4 left out: no report" in said
    assert "no row of" in said and "have the same AccessionNumber and different texts" in said
    assert "1 of 7 rows" in said
    for file in (tmp_path / "out").iterdir():
        text = file.read_text("utf-8")
        assert "anary" not in text.lower(), file.name
        assert "054Y" not in text and "19700101" not in text
        assert not any(uid in text for uid in uids), file.name
    made = lines(output)
    assert made[0]["conversations"][1]["value"] == "Report 0."
    assert {len(one["patient"]) for one in made} == {16}
    assert len({one["patient"] for one in made}) == 2 and len({one["study"] for one in made}) == 4
    train, val = (lines(output.with_name(f"r.{name}.jsonl")) for name in ("train", "val"))
    assert len(train) + len(val) == 8
    assert not {one["patient"] for one in train} & {one["patient"] for one in val}
    checked = medm("data", "check", str(output), "--root", str(tmp_path / "in"), "--decode")
    assert checked.code == 0, checked.out
    listed = list(csv.DictReader((tmp_path / "out" / "r.series.csv").open(encoding="utf-8")))
    assert len(listed) == 12 and {row["body_part"] for row in listed} == {"other", "CHEST"}


def test_what_is_asked_for_is_written(tmp_path: Path) -> None:
    uid = study(tmp_path / "in" / "s", "patient-7", "A1", a=None, b=mixed, c=None)
    reports = table(tmp_path / "r.csv", ["uid", "text"], [uid, "Text."])
    arguments = ("--reports", reports, "--text-column", "text", "--join", "StudyInstanceUID",
                 "--join-column", "uid")  # fmt: skip
    salt = tmp_path / "salt"
    salt.write_text(SALT)
    keep = ("--keep-tag", "PatientID", "--keep-tag", "ImageType", "--keep-tag", "PatientAge")
    names = []
    for per, count in (("study", 1), ("largest", 1), ("series", 2)):
        output = tmp_path / f"{per}.jsonl"
        convert(tmp_path / "in", output, *arguments, "--per", per, *keep, "--salt-file", salt)
        made = lines(output)
        assert len(made) == count
        assert made[0]["dicom"] == {
            "PatientID": "patient-7", "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        }  # fmt: skip
        names.append((made[0]["patient"], made[0]["study"]))
    assert len(set(names)) == 1
    assert lines(tmp_path / "study.jsonl")[0]["volume"] == ["s/a", "s/c"]
    convert(tmp_path / "in", tmp_path / "p.jsonl", *arguments, "--to", "pairs")
    pairs = lines(tmp_path / "p.jsonl")
    assert [one["volume"] for one in pairs] == ["s/a", "s/c"] and pairs[0]["caption"] == "Text."
    said = convert(tmp_path / "in", tmp_path / "q.jsonl", "--prompt", "What is it?")
    assert "2 conversations" in said
    (question,) = lines(tmp_path / "q.jsonl")[0]["conversations"]
    assert question["value"] == "<volume>\nWhat is it?"


def test_several_series_in_one_folder(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for number in (1, 2):
        write_series(root / "flat", phantom(), number=number, prefix=f"S{number}")
    assert [series.paths for series in index_series(root).usable] == [("flat#1",), ("flat#2",)]
    index = index_series(root / "flat")
    assert [series.problem for series in index.series] == [
        "its files lie at the top beside other series; put each series into a folder of its own, "
        "or give the folder above"
    ] * 2
    write_series(root / "flat", phantom(), number=2, prefix="S3")
    problems = [series.problem or "" for series in index_series(root).series]
    assert [("SeriesNumber does not tell" in problem) for problem in problems] == [
        False,
        True,
        True,
    ]
    named = [series.paths[0] for series in index_series(root, uids_in_paths=True).usable]
    assert named[0] == "flat#1" and all(len(path) > 20 for path in named[1:])
    write_series(root / "alone", phantom())
    (root / "alone" / "IM9999").write_bytes(b"\x89PNG\r\n\x1a\n half a download")
    (lost,) = [series for series in index_series(root).series if series.place == "alone"]
    assert "IM9999 could be a slice, but is not DICOM" in (lost.problem or "")


@pytest.mark.parametrize("made", [None, radiographs], ids=["volume", "images"])
@pytest.mark.parametrize("keyword", ["PatientID", "StudyInstanceUID"])
def test_a_series_of_two_patients_is_named(
    tmp_path: Path, made: Change | None, keyword: str
) -> None:
    """One SeriesInstanceUID in files of two patients, or of two studies."""

    def change(dataset: Dataset, z: int) -> None:
        dataset.SeriesInstanceUID = "1.2.3.4"
        if made is not None:
            made(dataset, z)
        if z > 5:
            setattr(dataset, keyword, "1.2.3.9")

    study(tmp_path / "in", "p", "1", both=change, one=made)
    problems = {series.place: series.problem for series in index_series(tmp_path / "in").series}
    assert problems == {
        "both": "files of several patients or studies under one SeriesInstanceUID",
        "one": None,
    }


def test_copies_and_links_of_images(tmp_path: Path) -> None:
    root = tmp_path / "in"
    study(root, "p", "1", dx=radiographs, one=radiographs)
    (root / "copies").mkdir()
    for file in sorted((root / "dx").iterdir())[:2]:
        (root / "copies" / file.name).write_bytes(file.read_bytes())
    (root / "link.dcm").symlink_to(root / "one" / "IM0000")
    index = index_series(root)
    assert index.links == 1 and [series.place for series in index.usable] == ["one"]
    (copied,) = [series for series in index.series if series.problem]
    assert copied.problem == "duplicate images: 2 have the SOPInstanceUID of another file"
    assert "1 links not followed" in convert(root, tmp_path / "o.json", "--prompt", "What?")


@pytest.mark.parametrize("element", ["AccessionNumber", "StudyInstanceUID"])
def test_a_report_of_two_patients_is_given_to_none(tmp_path: Path, element: str) -> None:
    """Two hospitals count from 1; the third patient has a number of their own."""
    uid = "1.2.3.4" if element == "StudyInstanceUID" else None
    study(tmp_path / "in" / "a", "p1", "Canary1", uid=uid, ct=None)
    study(tmp_path / "in" / "b", "p2", "Canary1", uid=uid, ct=localizer, dx=radiographs)
    own = study(tmp_path / "in" / "c", "p3", "Canary2", ct=None, mr=None)
    keys = [uid, own] if uid else ["Canary1", "Canary2"]
    rows = [[str(key), f"Report {n}."] for n, key in enumerate(keys)]
    reports = table(tmp_path / "r.csv", [element, "report"], *rows)
    said = convert(tmp_path / "in", tmp_path / "o.jsonl", "--reports", reports)
    assert f"2 left out: several patients have its {element}" in said
    assert "belong to no series" not in said and "1.2.3.4" not in said
    made = lines(tmp_path / "o.jsonl")
    assert [one["conversations"][1]["value"] for one in made] == ["Report 1."] * 2


def test_a_study_of_two_patients_is_no_record(tmp_path: Path) -> None:
    study(tmp_path / "in" / "a", "p1", "1", uid="1.2.3.4", ct=None)
    study(tmp_path / "in" / "b", "p2", "1", uid="1.2.3.4", ct=None)
    study(tmp_path / "in" / "c", "p3", "1", ct=None)
    for per, count in (("study", 1), ("largest", 1), ("series", 3)):
        output = tmp_path / f"{per}.jsonl"
        said = convert(tmp_path / "in", output, "--prompt", "What?", "--per", per)
        assert len(lines(output)) == count
        assert ("1 left out: several patients in one study" in said) == (per != "series")


@pytest.mark.parametrize(
    ("texts", "left_out"),
    [
        ({"b": "Text."}, None),
        ({"a": "Text.", "b": "Text."}, None),
        ({"a": "Text.", "b": "Other."}, "its series have several reports"),
        ({"a": "Text.", "b": ""}, "no report"),
        ({}, "no report"),
    ],
)
def test_the_report_of_a_study_may_be_of_any_series(
    tmp_path: Path, texts: dict[str, str], left_out: str | None
) -> None:
    study(tmp_path / "in", "p", "1", a=None, b=None)
    study(tmp_path / "in" / "other", "q", "2", c=None)
    texts = {**texts, "other/c": "Third."}
    rows = []
    for name, text in texts.items():
        file = tmp_path / "in" / name / "IM0000"
        rows.append([str(pydicom.dcmread(file).SeriesInstanceUID), text])
    reports = table(tmp_path / "r.csv", ["SeriesInstanceUID", "report"], *rows)
    said = convert(tmp_path / "in", tmp_path / "o.jsonl", "--reports", reports, "--per", "study")
    made = [one["conversations"][1]["value"] for one in lines(tmp_path / "o.jsonl")]
    assert made == (["Text.", "Third."] if left_out is None else ["Third."])
    assert left_out is None or f"1 left out: {left_out}" in said


def test_a_split_without_patients_names_the_command_that_splits(tmp_path: Path) -> None:
    for name in "abc":
        study(tmp_path / "in" / name, "" if name == "b" else name, "1", ct=None)
    arguments = (tmp_path / "in", tmp_path / "o.jsonl", "--prompt", "What?", "--val", "0.3")
    said = " ".join(convert(*arguments, code=1).split())
    assert "1 records are of files without PatientID" in said and "--by study" in said
    assert "allow-missing" not in said
    done = medm("data", "split", str(tmp_path / "o.jsonl"), "--by", "study", "--val", "0.3",
                "--root", str(tmp_path / "in"))  # fmt: skip
    assert done.code == 0, done.out


@pytest.mark.parametrize(
    ("arguments", "reason", "code"),
    [
        (["--keep-tag", "PatientAg"], "'PatientAg' is no keyword of DICOM", 2),
        (["--keep-tag", "PixelData"], "holds no single value", 2),
        (["--join", "PatientID"], "are for --reports", 2),
        (["--reports", "r.csv", "--text-column", "text"], "no column 'text'", 1),
        (["--reports", "n.csv"], "name the element to join by", 2),
        (["--min-slices", "99"], "there are no records to write", 1),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], reason: str, code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    study(tmp_path / "in" / "s", "p", "A1", ct=None)
    table(tmp_path / "r.csv", ["AccessionNumber", "report"], ["A1", "x"])
    table(tmp_path / "n.csv", ["number", "report"], ["A1", "x"])
    said = convert("in", "o.json", *arguments, code=code)
    assert reason in " ".join(said.replace("\u2502", " ").split())


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("x")
    assert "holds no DICOM image" in convert(tmp_path / "in", tmp_path / "o.json", code=1)
    assert "no such folder" in convert(tmp_path / "none", tmp_path / "o.json", code=1)
