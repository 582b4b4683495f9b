"""A reply as a Structured Report: opened with pydicom and with highdicom, content compared."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ComprehensiveSRStorage, DigitalXRayImageStorageForPresentation, generate_uid

from medm.errors import MediaError
from medm.imaging.dicom_sr import NOTICE, ReportSource, write_dicom_sr
from tests.imaging.tiny import (
    CANARY,
    add_pixels,
    body,
    dicom_slice,
    phantom,
    write_multi_frame,
    write_series,
)

pytestmark = pytest.mark.skipif(
    find_spec("highdicom") is None, reason="highdicom comes with the extra 'dicom'"
)
TEXT = "Kleiner Erguß links.\r\n肺 clear.\x00"


def radiograph(path: Path) -> Path:
    dataset = dicom_slice(
        phantom(), body()[6], 6, series=generate_uid(), study=generate_uid(), number=1
    )
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "SliceThickness"):
        delattr(dataset, keyword)
    uid = DigitalXRayImageStorageForPresentation
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = uid
    dataset.Modality = "DX"
    add_pixels(dataset, body()[6])
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_content_and_references_of_a_series(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import highdicom
    from pydicom.sr.codedict import codes

    files = write_series(tmp_path / "ct", phantom())
    with caplog.at_level(logging.DEBUG):
        write_dicom_sr(tmp_path / "sr.dcm", TEXT, [ReportSource(tmp_path / "ct", "volume")])
    assert "Canary" not in caplog.text
    plain = pydicom.dcmread(tmp_path / "sr.dcm")
    source = pydicom.dcmread(files[0])
    assert plain.SOPClassUID == ComprehensiveSRStorage and plain.Modality == "SR"
    assert (plain.StudyInstanceUID, plain.PatientID) == (source.StudyInstanceUID, source.PatientID)
    assert plain.SeriesInstanceUID != source.SeriesInstanceUID
    assert (plain.VerificationFlag, plain.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
    assert plain.SeriesDescription == NOTICE and "not for clinical use" in NOTICE
    assert plain.ContentTemplateSequence[0].TemplateIdentifier == "2000"
    report = highdicom.sr.srread(tmp_path / "sr.dcm")
    (root,) = report.content
    assert root.name == codes.cid7000.DiagnosticImagingReport
    found = {item.name.meaning: item for item in root.ContentSequence}
    assert found["Comment"].value == NOTICE
    assert found["Observer Type"].value == codes.DCM.Device
    (finding,) = found["Findings"].ContentSequence
    assert finding.value == "Kleiner Erguß links.\n肺 clear."
    images = found["Image Library"].ContentSequence
    uids = {pydicom.dcmread(file).SOPInstanceUID for file in files}
    assert {image.referenced_sop_instance_uid for image in images} == uids
    assert {evidence[2] for evidence in report.get_evidence(current_procedure_only=True)} == uids
    holders = {e.keyword for e in plain.iterall() if "Canary" in str(e.value) and e.VR != "SQ"}
    assert holders == {"PatientName", "PatientID", "AccessionNumber", "ReferringPhysicianName"}


def test_an_image_a_multi_frame_file_and_a_prior(tmp_path: Path) -> None:
    import highdicom

    image = radiograph(tmp_path / "dx.dcm")
    frames = write_multi_frame(tmp_path / "ct.dcm", phantom())
    write_dicom_sr(
        tmp_path / "sr.dcm", "ok", [ReportSource(frames, "volume"), ReportSource(image, "image")]
    )
    report = highdicom.sr.srread(tmp_path / "sr.dcm")
    last = pydicom.dcmread(image)
    assert report.StudyInstanceUID == last.StudyInstanceUID
    own = report.get_evidence(current_procedure_only=True)
    assert [evidence[2] for evidence in own] == [last.SOPInstanceUID]
    assert len(report.get_evidence()) == 2


def test_what_cannot_be_reported(tmp_path: Path) -> None:
    ct = ReportSource(tmp_path / "ct", "volume")
    write_series(tmp_path / "ct", phantom())
    for number in (1, 2):
        write_series(tmp_path / "two", phantom(), number=number, prefix=f"S{number}")

    def other(dataset: Dataset, z: int) -> None:
        dataset.PatientID = "other"

    write_series(tmp_path / "other", phantom(), change=other)
    (tmp_path / "a.nii.gz").write_bytes(b"no DICOM")
    two = ReportSource(tmp_path / "two", "volume")
    for text, sources, reason in (
        (" \n", [ct], "expected text"),
        ("ok", [], "at least one"),
        ("ok", [ReportSource(tmp_path / "a.nii.gz", "volume")], "no DICOM"),
        ("ok", [ReportSource(tmp_path / "none", "volume")], "no such file"),
        ("ok", [ct, ReportSource(tmp_path / "other", "volume")], "of 2 patients"),
        ("ok", [two], "2 series fit"),
    ):
        with pytest.raises(MediaError, match=reason) as raised:
            write_dicom_sr(tmp_path / "sr.dcm", text, sources)
        assert CANARY[:6] not in str(raised.value)
        assert not (tmp_path / "sr.dcm").exists()
    for file in (tmp_path / "two").glob("S2*"):
        file.unlink()
    write_dicom_sr(tmp_path / "sr.dcm", "ok", [two], several="largest")
