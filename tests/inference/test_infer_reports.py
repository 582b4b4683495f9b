"""`medm infer --report-format dicom-sr`: a Structured Report for each reply about DICOM."""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path

import pydicom
import pytest

from medm.errors import DeviceError, RecipeError
from medm.inference.batch import infer
from medm.inference.options import GenerationOptions, InferOptions
from tests.imaging.test_dicom_sr import radiograph
from tests.imaging.tiny import CANARY
from tests.inference.tiny import read_output, save_image, save_tiny, write_records

pytestmark = pytest.mark.skipif(
    find_spec("highdicom") is None, reason="highdicom comes with the extra 'dicom'"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def options(model: Path, folder: Path, **further: object) -> InferOptions:
    return InferOptions(
        model=str(model),
        data=str(folder / "in.json"),
        output=str(folder / "o.jsonl"),
        device="cpu",
        workers=0,
        generation=GenerationOptions(max_new_tokens=4),
        **further,  # type: ignore[arg-type]
    )


def question(name: str) -> dict[str, object]:
    turns = [{"from": "human", "value": "<image>\nDescribe it."}]
    return {"id": name, "image": name, "conversations": turns}


def test_a_report_for_each_reply_about_dicom(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    radiograph(tmp_path / "dx.dcm")
    save_image(tmp_path / "a.png", 1)
    write_records(tmp_path, [question("dx.dcm"), question("a.png")]).rename(tmp_path / "in.json")
    with caplog.at_level(logging.DEBUG, logger="medm"):
        summary = infer(options(model, tmp_path, report_format="dicom-sr"))
    assert summary is not None and (summary.answered, summary.errors) == (1, 1)
    by_id = {line["id"]: line for line in read_output(tmp_path / "o.jsonl")}
    assert "no DICOM; a DICOM SR refers to DICOM images" in by_id["a.png"]["error"]
    line = by_id["dx.dcm"]
    assert line["report_file"] == "o_reports/000000_dx.dcm.dcm"
    report = pydicom.dcmread(tmp_path / line["report_file"])
    (findings,) = [
        item
        for item in report.ContentSequence
        if item.ConceptNameCodeSequence[0].CodeMeaning == "Findings"
    ]
    assert findings.ContentSequence[0].TextValue == line["reply"].strip()
    assert report.StudyInstanceUID == pydicom.dcmread(tmp_path / "dx.dcm").StudyInstanceUID
    assert CANARY not in (tmp_path / "o.jsonl").read_text() + caplog.text
    with pytest.raises(RecipeError, match="report_format was 'dicom-sr' and is now None"):
        infer(options(model, tmp_path))
    again = infer(options(model, tmp_path, report_format="dicom-sr"))
    assert again is not None and again.resumed == 1


def test_options(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="reports: no report_format"):
        options(model, tmp_path, reports="r")
    radiograph(tmp_path / "dx.dcm")
    write_records(tmp_path, [question("dx.dcm")]).rename(tmp_path / "in.json")
    monkeypatch.setattr("medm.inference.report_writing.find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"needs highdicom; pip install 'medm\[dicom\]'"):
        infer(options(model, tmp_path, report_format="dicom-sr"))


def test_files_of_removed_lines_go_with_them(model: Path, tmp_path: Path) -> None:
    """Only in the folder of the reports: a line may name any file."""
    for name in ("a.dcm", "b.dcm"):
        radiograph(tmp_path / name)
    given = [question("a.dcm"), question("b.dcm")]
    write_records(tmp_path, given).rename(tmp_path / "in.json")
    infer(options(model, tmp_path, report_format="dicom-sr"))
    reports, output = tmp_path / "o_reports", tmp_path / "o.jsonl"
    assert len(list(reports.iterdir())) == 2
    (tmp_path / "kept.dcm").touch()
    (reports / "own.txt").touch()
    named = ["kept.dcm", "o_reports/../kept.dcm", "o_reports", str(tmp_path / "kept.dcm")]
    with output.open("a") as stream:
        for index, name in enumerate(named, start=2):
            stream.write(json.dumps({"index": index, "report_file": name}) + "\n")
        stream.write('damaged\n{"index": 9, "overlay": ["\\u0000"], "spans": [{"mask": null}]}\n')
    write_records(tmp_path, given[:1]).rename(tmp_path / "in.json")
    infer(options(model, tmp_path, report_format="dicom-sr", overwrite=True))
    assert sorted(path.name for path in reports.iterdir()) == ["000000_a.dcm.dcm", "own.txt"]
    assert (tmp_path / "kept.dcm").exists()
