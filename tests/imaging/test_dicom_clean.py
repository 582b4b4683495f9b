"""Header cleaning: no value of an identifying element is left anywhere, and images stay usable."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from medm.errors import MediaError, RecipeError, UnknownNameError
from medm.imaging.dicom_clean import REPORT, CleaningReport, clean_folder
from medm.imaging.dicom_profiles import load_profile, profile_names
from medm.imaging.pseudonyms import Pseudonyms, read_salt
from medm.imaging.volumes import read_volume
from tests.imaging.tiny import CANARY, phantom, write_report, write_series

SECRET = "Zzyzx"
"""Stands in every element that the profile lists."""
SALT = b"0123456789abcdef"


def fill(dataset: Dataset, z: int) -> None:
    """A value of its own form in each element of the profile, on the top and in a sequence."""
    from pydicom.datadict import dictionary_VR

    item = Dataset()
    values: dict[str, Any] = {
        "DA": "20240203", "TM": "111213", "DT": "20240203111213", "AS": "054Y", "UI": "1.2.3.4567",
    }  # fmt: skip
    for tag, action in load_profile("basic").actions.items():
        vr = dictionary_VR(tag)
        if tag >> 16 in (0, 2, 4) or action in ("K", "S") or vr == "SQ" or tag in _KEPT:
            continue
        if vr in ("LO", "SH", "PN", "LT", "ST", "UT", "UC", "CS", "AE", "UR"):
            values[vr] = SECRET if vr not in ("CS", "AE") else SECRET.upper()
        if vr in values:
            dataset.add_new(tag, vr, values[vr])
            item.add_new(tag, vr, values[vr])
    dataset.ReferencedImageSequence = Sequence([item])
    dataset.RequestAttributesSequence = Sequence([item])
    dataset.add_new(0x60003000, "OW", b"\0" * 66)
    dataset.add_new(0x60004000, "LT", SECRET)
    dataset.PatientID = "MRN-0042"
    dataset.FrameOfReferenceUID = "1.2.840.4711.5"


_KEPT = {0x0020000D, 0x0020000E, 0x00080018, 0x00200052}


def cleaned(
    source: Path, output: Path, *, profile: str = "basic", salt: bytes = SALT
) -> tuple[CleaningReport, list[pydicom.FileDataset]]:
    report = clean_folder(source, output, load_profile(profile), pseudonyms=Pseudonyms(salt))
    return report, [pydicom.dcmread(path) for path in sorted(output.rglob("*.dcm"))]


def everything(dataset: pydicom.FileDataset) -> str:
    return f"{dataset.file_meta}\n{dataset}".casefold()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_value_of_a_listed_element_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = write_series(tmp_path / "in" / "Zzyzx^Quarrel", phantom(), change=fill)
    source = pydicom.dcmread(files[0])
    with caplog.at_level(logging.DEBUG):
        report, found = cleaned(tmp_path / "in", tmp_path / "out")
    assert len(found) == report.files == 12
    for dataset in found:
        text = everything(dataset)
        for secret in (SECRET, "canary", "quarrel", "mrn-0042", "20240203", "111213", "1.2.3.4567"):
            assert secret.casefold() not in text, secret
        assert not any(element.tag.is_private for element in dataset.iterall())
        assert dataset.preamble == bytes(128)
    written = (tmp_path / "out" / REPORT).read_text()
    for said in (written, caplog.text):
        for secret in (SECRET, "canary", "quarrel", "mrn-0042", "20240203"):
            assert secret.casefold() not in said.casefold()
    one = found[0]
    assert len(source.dir()) > len(one.dir()) > 40
    assert (one.PatientName, one.PatientBirthDate, one.StudyDate) == ("", "", "")
    assert one.SeriesDate == "19000101" and "PatientComments" not in one
    assert one.InstitutionName == "REMOVED"
    assert "no anonymization" in json.loads(written)["notice"]
    assert json.loads(written)["actions"]["PatientName"] == {"Z": 12}
    assert report.private >= 12


def test_images_and_their_order_stay(tmp_path: Path) -> None:
    write_series(tmp_path / "in", phantom())
    before = read_volume(tmp_path / "in")
    cleaned(tmp_path / "in", tmp_path / "out")
    after = read_volume(tmp_path / "out" / "study-0001" / "series-0001")
    np.testing.assert_array_equal(before.voxels, after.voxels)
    assert before.geometry is not None and after.geometry is not None
    np.testing.assert_allclose(before.geometry.origin, after.geometry.origin)


def test_uids_and_patients_stay_together(tmp_path: Path) -> None:
    """Two series of one study, one of another patient; a reference to a slice still finds it."""
    study, frame = generate_uid(), generate_uid()
    first: list[str] = []

    def change(dataset: Dataset, z: int) -> None:
        dataset.StudyInstanceUID, dataset.FrameOfReferenceUID = study, frame
        dataset.PatientID = "one"
        if first:
            item = Dataset()
            item.ReferencedSOPClassUID = dataset.SOPClassUID
            item.ReferencedSOPInstanceUID = first[0]
            dataset.SourceImageSequence = Sequence([item])
        first.append(dataset.SOPInstanceUID)

    write_series(tmp_path / "in" / "a", phantom(), change=change)
    write_series(tmp_path / "in" / "b", phantom(), change=change)
    write_series(tmp_path / "in" / "c", phantom())
    _, found = cleaned(tmp_path / "in", tmp_path / "out")
    assert len({one.StudyInstanceUID for one in found}) == 2
    assert len({one.SeriesInstanceUID for one in found}) == 3
    assert len({one.SOPInstanceUID for one in found}) == 36
    assert len({one.PatientID for one in found}) == 2
    assert study not in {one.StudyInstanceUID for one in found}
    known = {one.SOPInstanceUID for one in found}
    pointing = [one for one in found if "SourceImageSequence" in one]
    assert len(pointing) == 23
    for one in pointing:
        (item,) = one.SourceImageSequence
        assert item.ReferencedSOPInstanceUID in known
        assert item.ReferencedSOPClassUID == one.SOPClassUID  # of the standard: not replaced
        assert one.file_meta.MediaStorageSOPInstanceUID == one.SOPInstanceUID
    _, again = cleaned(tmp_path / "in", tmp_path / "again")
    assert [one.SOPInstanceUID for one in again] == [one.SOPInstanceUID for one in found]
    _, other = cleaned(tmp_path / "in", tmp_path / "other", salt=SALT[::-1])
    assert not {one.StudyInstanceUID for one in other} & {one.StudyInstanceUID for one in found}


def test_what_may_be_written_in_the_pixels_is_listed(tmp_path: Path) -> None:
    def capture(dataset: Dataset, z: int) -> None:
        if z == 0:
            dataset.SOPClassUID = SecondaryCaptureImageStorage
            dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
        if z == 1:
            dataset.BurnedInAnnotation = "YES"
        if z == 2:
            dataset.Modality = "US"
        if z == 3:
            dataset.Modality, dataset.BurnedInAnnotation = "US", "NO"
        if z == 4:
            dataset.BodyPartExamined = "CANARY"  # a name where none should be

    write_series(tmp_path / "in", phantom(), change=capture, shuffle=False)
    report, found = cleaned(tmp_path / "in", tmp_path / "out")
    assert list(report.flagged.values()) == [
        ["secondary capture"],
        ["BurnedInAnnotation is YES"],
        ["modality US, and BurnedInAnnotation is not NO"],
        ["BodyPartExamined holds a value of an identifying element"],
    ]
    assert len(found) == 12
    assert json.loads((tmp_path / "out" / REPORT).read_text())["flagged"] == report.flagged


def test_what_is_no_image_is_left_out(tmp_path: Path) -> None:
    write_series(tmp_path / "in", phantom())
    write_report(tmp_path / "in" / "sr.dcm", pydicom.uid.BasicTextSRStorage, "SR")
    (tmp_path / "in" / "notes.txt").write_text(CANARY)
    (tmp_path / "in" / "cut.dcm").write_bytes((tmp_path / "in" / "IM0000").read_bytes()[:900])
    report, _ = cleaned(tmp_path / "in", tmp_path / "out")
    reasons = {Path(file).name: reason for file, reason in report.left_out.items()}
    assert reasons.pop("cut.dcm").startswith(("damaged", "DICOM without an image"))
    assert reasons == {"notes.txt": "not DICOM", "sr.dcm": "DICOM without an image"}
    assert CANARY not in (tmp_path / "out" / REPORT).read_text()
    assert "in/" not in (tmp_path / "out" / REPORT).read_text()


def test_links_are_counted_and_not_followed(tmp_path: Path) -> None:
    """A file of git-annex is a link to its content; a folder may be one, too."""
    files = write_series(tmp_path / "annex", phantom())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.dcm").symlink_to(files[0])
    (tmp_path / "in" / "b").symlink_to(tmp_path / "annex", target_is_directory=True)
    with pytest.raises(MediaError, match="2 links not followed"):
        cleaned(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "c.dcm").write_bytes(files[1].read_bytes())
    report, found = cleaned(tmp_path / "in", tmp_path / "out")
    assert (report.links, len(found)) == (2, 1)
    assert json.loads((tmp_path / "out" / REPORT).read_text())["links_not_followed"] == 2


def test_a_bare_data_set_and_a_deflated_one(tmp_path: Path) -> None:
    """Without the file header, as some archives export them; and one that could be a bomb."""
    files = write_series(tmp_path / "in", phantom())
    dataset = pydicom.dcmread(files[0])
    dataset.save_as(files[0], enforce_file_format=False)
    data = files[0].read_bytes()
    meta = 132 + 12 + int.from_bytes(data[140:144], "little")
    files[0].write_bytes(data[meta:])
    dataset = pydicom.dcmread(files[1])
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(files[1], enforce_file_format=True)
    report, found = cleaned(tmp_path / "in", tmp_path / "out")
    assert report.left_out == {str(files[1]): "deflated, which is not read"}
    assert len(found) == 11 and not any("Canary" in everything(one) for one in found)
    assert {one.file_meta.TransferSyntaxUID for one in found} == {ExplicitVRLittleEndian}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_characteristics_of_the_patient_are_kept_by_their_profile(tmp_path: Path) -> None:
    def change(dataset: Dataset, z: int) -> None:
        dataset.PatientAge, dataset.PatientSex, dataset.Allergies = "054Y", "F", "none"

    write_series(tmp_path / "in", phantom(), change=change)
    _, found = cleaned(tmp_path / "in", tmp_path / "out", profile="basic-patient-characteristics")
    assert (found[0].PatientAge, found[0].PatientSex, found[0].PatientName) == ("054Y", "F", "")
    assert "Allergies" not in found[0]
    (tmp_path / "own.yaml").write_text("extends: basic\nkeep: [StudyDescription]\n")
    _, own = cleaned(tmp_path / "in", tmp_path / "own", profile=str(tmp_path / "own.yaml"))
    assert own[0].StudyDescription and "PatientAge" not in own[0]


def test_folders_and_profiles_that_cannot_be(tmp_path: Path) -> None:
    write_series(tmp_path / "in", phantom())
    profile, names = load_profile("basic"), Pseudonyms()
    for source, output, reason in (
        (tmp_path / "none", tmp_path / "out", "no such folder"),
        (tmp_path / "in", tmp_path / "in" / "out", "lies in"),
        (tmp_path / "in", tmp_path / "in" / ".." / "full", "is not empty"),
    ):
        (tmp_path / "full").mkdir(exist_ok=True)
        (tmp_path / "full" / "a").touch()
        with pytest.raises(MediaError, match=reason):
            clean_folder(source, output, profile, pseudonyms=names)
    with pytest.raises(UnknownNameError, match="did you mean 'basic'"):
        load_profile("bassic")
    (tmp_path / "p.yaml").write_text("actions: {X: [PatientNam]}\n")
    with pytest.raises(RecipeError, match="'PatientNam' is no keyword of DICOM"):
        load_profile(str(tmp_path / "p.yaml"))
    (tmp_path / "q.yaml").write_text("actions: {Q: [PatientName]}\n")
    with pytest.raises(RecipeError, match="unknown action 'Q'"):
        load_profile(str(tmp_path / "q.yaml"))


def test_the_table_of_the_standard() -> None:
    """Rows of PS3.15, Table E.1-1, read there; and what every profile has in common."""
    assert profile_names() == ["basic", "basic-patient-characteristics"]
    basic = load_profile("basic")
    rows = {
        0x00080050: "Z", 0x00184000: "X", 0x00400555: "Z", 0x0008002A: "D", 0x001811BB: "D",
        0x00100010: "Z", 0x00100020: "D", 0x0020000D: "U", 0x00081140: "S", 0x0040A730: "D",
        0x00181002: "U", 0x00120010: "D", 0x00080012: "D", 0x00102160: "X", 0x60023000: "X",
        0x50FF0005: "X", 0x60000010: None, 0x00280010: None,
    }  # fmt: skip
    assert {tag: basic.action(tag) for tag in rows} == rows
    assert len(basic.actions) == 614 + 20  # and the additions of medm


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_elements_whose_content_cannot_be_looked_at_are_removed(tmp_path: Path) -> None:
    """pydicom reads a sequence of VR UN as bytes where it has 65535 or more; pixels are bytes."""

    def change(dataset: Dataset, z: int) -> None:
        long = b"Zzyzx^" * 11_000
        dataset.add_new(0x00081115, "UN", long)  # a sequence
        dataset.add_new(0x00080300, "OB", b"Zzyzx^")  # a sequence
        dataset.add_new(0x00189423, "UN", long)  # a text
        dataset.add_new(0x00080302, "OB", b"Zzyzx^")  # another one
        item = Dataset()
        item.add_new(0x00400275, "UN", long)  # a sequence whose action is X
        item.add_new(0x00321064, "UN", long)
        dataset.DeidentificationMethodCodeSequence = Sequence([item])
        dataset.add_new(0x60000010, "US", 8)
        dataset.add_new(0x60009999, "LO", "Zzyzx")
        dataset.add_new(0x60020002, "LO", "Zzyzx")
        dataset.BitsAllocated, dataset.Rows, dataset.Columns = 16, 300, 200
        dataset["PixelData"] = pydicom.DataElement(0x7FE00010, "UN", bytes(120_000))

    write_series(tmp_path / "in", phantom(), change=change)
    report, found = cleaned(tmp_path / "in", tmp_path / "out")
    assert report.files == 12 and report.unknown == 12 * 7
    for path in (tmp_path / "out").rglob("*.dcm"):
        assert b"Zzyzx" not in path.read_bytes()
    assert found[0][0x60000010].value == 8 and len(found[0].PixelData) == 120_000
    assert report.actions["RequestAttributesSequence"] == {"X": 12}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_uids_and_addresses_of_the_source_do_not_stay(tmp_path: Path) -> None:
    uids: list[str] = []

    def change(dataset: Dataset, z: int) -> None:
        study = dataset.StudyInstanceUID
        uids.extend([study, dataset.SeriesInstanceUID, dataset.SOPInstanceUID])
        dataset.RetrieveURL = f"https://pacs.example.org/studies/{study}"
        dataset.RetrieveURI = f"https://pacs.example.org/?studyUID={study}"
        dataset.RetrieveLocationUID = "1.2.3.4567"
        dataset.PixelDataProviderURL = "https://pacs.example.org/jpip"
        dataset.PatientBirthDateInAlternativeCalendar = "1448"
        if z == 1:
            dataset.CodingSchemeIdentificationSequence = Sequence([Dataset()])
            dataset.CodingSchemeIdentificationSequence[0].CodingSchemeURL = f"urn:oid:{study}"
        if z == 2:
            dataset.AssertionUID = dataset.SeriesInstanceUID
            dataset.VolumetricPresentationInputSetUID = f"{study}.1"  # another UID

    write_series(tmp_path / "in", phantom(), change=change, shuffle=False)
    report, found = cleaned(tmp_path / "in", tmp_path / "out")
    assert list(report.flagged.values()) == [
        ["CodingSchemeURL holds a UID of the source"],
        ["AssertionUID holds a UID of the source"],
    ]
    for one in (found[0], *found[3:]):
        assert not any(uid in everything(one) for uid in uids)
        assert "example.org" not in everything(one) and "1448" not in everything(one)
    assert not any(uid in (tmp_path / "out" / REPORT).read_text() for uid in uids)


def test_short_names_are_found_as_words(tmp_path: Path) -> None:
    def change(dataset: Dataset, z: int) -> None:
        dataset.SpecificCharacterSet = "ISO_IR 192"
        dataset.PatientName = "Li^Ct^\u738b\u5c0f" if z else "Canary"
        dataset.Manufacturer = (
            "Oliver" if z < 2 else "of Li, 12" if z == 2 else "\u738b\u5c0f\u4e1c"
        )

    write_series(tmp_path / "in", phantom(), change=change, shuffle=False)
    report, _ = cleaned(tmp_path / "in", tmp_path / "out")
    assert sorted(report.flagged) == [f"study-0001/series-0001/{n:06d}.dcm" for n in range(3, 13)]


def test_further_signs_of_writing_in_the_pixels(tmp_path: Path) -> None:
    def change(dataset: Dataset, z: int) -> None:
        if z == 0:
            dataset.ConversionType = "WSD"
        if z == 1:
            dataset.ImageType = ["DERIVED", "SECONDARY", "SCREEN SAVE"]
        if z == 2:
            del dataset.Modality
        if z == 3:
            dataset.add_new(0x60020102, "US", 12)
        if z == 4:
            dataset.add_new(0x60000102, "US", 0)
            dataset.ConversionType = "SYN"

    write_series(tmp_path / "in", phantom(), change=change, shuffle=False)
    report, _ = cleaned(tmp_path / "in", tmp_path / "out")
    assert list(report.flagged.values()) == [
        ["ConversionType is WSD"],
        ["ImageType is SCREEN SAVE"],
        ["no Modality"],
        ["an overlay in spare bits of the pixels"],
    ]


def test_a_profile_of_ones_own_is_named_by_its_file_alone(tmp_path: Path) -> None:
    folder = tmp_path / "Canary"
    folder.mkdir()
    (folder / "base.yaml").write_text("extends: basic\nkeep: [PatientAge]\n")
    (folder / "own.yaml").write_text("extends: base.yaml\nkeep: [StudyDescription]\n")
    write_series(tmp_path / "in", phantom())
    _, found = cleaned(tmp_path / "in", tmp_path / "out", profile=str(folder / "own.yaml"))
    assert found[0].DeidentificationMethod[1] == "profile own"
    assert json.loads((tmp_path / "out" / REPORT).read_text())["profile"] == "own"
    assert load_profile(str(folder / "own.yaml")).action(0x00101010) == "K"
    (folder / "loop.yaml").write_text("extends: ../Canary/loop.yaml\n")
    (folder / "first.yaml").write_text("extends: second.yaml\n")
    (folder / "second.yaml").write_text("extends: first.yaml\n")
    for name in ("loop.yaml", "first.yaml"):
        with pytest.raises(RecipeError, match="the file extends itself"):
            load_profile(str(folder / name))


def test_pseudonyms(tmp_path: Path) -> None:
    names = Pseudonyms(SALT)
    assert names.name("42 ", "patient") == names.name("42", "patient") != names.name("42", "study")
    assert len(names.name("42", "patient")) == 16
    assert names.name("42", "patient") != Pseudonyms().name("42", "patient")
    assert names.uid("1.2.3").startswith("2.25.") and len(names.uid("1.2.3")) <= 44
    assert pydicom.uid.UID(names.uid("1.2.3")).is_valid
    (tmp_path / "short").write_text("abc")
    with pytest.raises(RecipeError, match="a salt of 3 bytes; expected 16 or more"):
        read_salt(tmp_path / "short")
    (tmp_path / "salt").write_bytes(SALT + b"\n")
    assert read_salt(tmp_path / "salt") == SALT
