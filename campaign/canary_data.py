"""Data of patients whose names are canaries: a name for each place where one may stand."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import generate_uid

from tests.imaging.test_dicom_sr import radiograph
from tests.imaging.tiny import phantom, write_series

CANARIES = {
    "patient and study": "Identcanary",
    "birth date": "19231107",
    "other DICOM tags": "Tagcanary",
    "EXIF": "Exifcanary",
    "PNG text": "Textcanary",
    "NIfTI descrip": "Niftcanary",
    "record text": "Recordcanary",
    "file name": "Filecanary",
    "extra field": "Fieldcanary",
    "name of a field": "Keycanary",
}
"""By place, the name that stands there."""
NAME = CANARIES["file name"]
SERIES = f"studies/{NAME}/series"
RADIOGRAPH = f"{NAME}.dcm"
PHOTOGRAPHS = ("a.png", f"{NAME}.jpg")

PATIENT_AND_STUDY = frozenset({
    "PatientID", "PatientName", "PatientBirthDate", "AccessionNumber", "ReferringPhysicianName",
    "StudyID",
})  # fmt: skip
"""Elements with a name or a date that SEG and SR take over from their images (docs/hospital.md)."""
_OTHER = (
    "InstitutionName", "InstitutionAddress", "StudyDescription", "SeriesDescription",
    "PatientComments", "PatientAddress", "OtherPatientIDs", "OtherPatientNames", "ImageComments",
    "ProtocolName", "StationName", "OperatorsName", "PerformingPhysicianName",
    "RequestingPhysician", "PhysiciansOfRecord", "AdditionalPatientHistory", "Occupation",
    "DeviceSerialNumber", "RequestedProcedureDescription",
)  # fmt: skip
_FRAME, _STUDY = generate_uid(), generate_uid()


def name_patient(dataset: Dataset, z: int = 0) -> None:
    """Put canaries into every text element, a sequence and a private element."""
    for keyword in PATIENT_AND_STUDY - {"PatientBirthDate"}:
        setattr(dataset, keyword, CANARIES["patient and study"])
    dataset.PatientBirthDate = CANARIES["birth date"]
    for keyword in _OTHER:
        setattr(dataset, keyword, CANARIES["other DICOM tags"])
    item = Dataset()
    item.RequestedProcedureDescription = CANARIES["other DICOM tags"]
    dataset.RequestAttributesSequence = Sequence([item])
    dataset.add_new(0x00091001, "LT", CANARIES["other DICOM tags"])
    dataset.FrameOfReferenceUID, dataset.StudyInstanceUID = _FRAME, _STUDY


def conversation(about: str, file: str, answer: str, **fields: Any) -> dict[str, Any]:
    """Return a record about one image or volume, whose texts and whose field `note` have names."""
    words = CANARIES["record text"]
    return {
        about: file, "note": CANARIES["extra field"], **fields,
        "conversations": [
            {"from": "human", "value": f"<{about}>\nIs {words} ill?"},
            {"from": "gpt", "value": answer},
        ],
    }  # fmt: skip


def write_data(data: Path) -> None:
    """Write files with names, and records, tables and a benchmark about them."""
    _write_images(data)
    write_series(data / SERIES, phantom(), change=name_patient)
    dataset = pydicom.dcmread(radiograph(data / RADIOGRAPH))
    name_patient(dataset)
    dataset.save_as(data / RADIOGRAPH, enforce_file_format=True)
    sitk.WriteImage(phantom(), str(data / "a.nii"))
    nifti = bytearray((data / "a.nii").read_bytes())
    struct.pack_into("80s", nifti, 148, CANARIES["NIfTI descrip"].encode())
    (data / "a.nii").write_bytes(nifti)
    words = CANARIES["record text"]
    images = [
        conversation("image", PHOTOGRAPHS[number % 2], f"{words} is well.", id=str(number))
        for number in range(4)
    ]
    _write(data / "train.json", images)
    _write(data / "other.json", images[2:])
    _write(
        data / "volumes.json",
        [conversation("volume", name, "Normal.") for name in ("a.nii", SERIES)],
    )
    dicom = [("volume", SERIES), ("image", RADIOGRAPH)]
    _write(data / "dicom.json", [conversation(*place, "No.", id=place[0]) for place in dicom])
    _write(data / "plain.json", [conversation("image", name, "No.") for name in PHOTOGRAPHS])
    _write_damaged(data)
    identity = CANARIES["patient and study"]
    (data / "reports.csv").write_text(
        f"AccessionNumber,report\n{identity},Of {words}\n{identity}2,Of {words}\n"
    )
    (data / "table.csv").write_text(
        f"file,mrn,text\na.png,{identity},Of {words}\n,{identity},Of {words}\n"
    )


def _write_images(data: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    text = PngInfo()
    text.add_text("Patient", CANARIES["PNG text"])
    text.add_itxt("Patient", CANARIES["PNG text"], zip=True)
    Image.fromarray(noise).save(data / PHOTOGRAPHS[0], pnginfo=text)
    exif = Image.Exif()
    exif[0x010E], exif[0x013B] = CANARIES["EXIF"], CANARIES["EXIF"]
    Image.fromarray(noise[::-1].copy()).save(data / PHOTOGRAPHS[1], exif=exif)


def _write_damaged(data: Path) -> None:
    """Write each file once more, cut in the middle, and records about them."""
    records = []
    slices = sorted((data / SERIES).iterdir())
    (data / "cut series").mkdir()
    for file in slices:
        half = file.read_bytes()[: file.stat().st_size // 2]
        (data / "cut series" / file.name).write_bytes(half)
    records.append(conversation("volume", "cut series", "No."))
    for name in (*PHOTOGRAPHS, RADIOGRAPH, "a.nii"):
        content = (data / name).read_bytes()
        (data / f"cut {name}").write_bytes(content[: len(content) // 2])
        about = "volume" if name.endswith(".nii") else "image"
        records.append(conversation(about, f"cut {name}", "No."))
    _write(data / "damaged.json", records)


def _write(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text(json.dumps(records), encoding="utf-8")
