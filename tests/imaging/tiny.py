"""A small body with a landmark in every direction, and its files, with a patient's name where a
header has room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

CANARY = "Canary^Quarrel"
SPACING = (1.5, 2.0, 5.0)
"""Of the phantom, x, y, z in mm."""
SHAPE = (12, 20, 26)
"""Of the phantom, z, y, x."""


def body() -> np.ndarray:
    """(z, y, x) in HU: air, a soft body, and bone at the patient's left, front and head only."""
    z, y, x = np.indices(SHAPE, dtype=np.float64)
    body = (((z - 5.5) / 5) ** 2 + ((y - 9.5) / 8) ** 2 + ((x - 12.5) / 11) ** 2) < 1
    voxels = np.where(body, 40.0, -1000.0)
    voxels[5:8, 8:11, 18:22] = 700  # x grows to the patient's left
    voxels[5:8, 3:5, 11:14] = 300  # y grows to the back
    voxels[9:10, 8:11, 11:14] = 500  # z grows to the head
    return voxels.astype(np.int16)


def phantom() -> sitk.Image:
    """The body, axis-aligned in LPS."""
    image = sitk.GetImageFromArray(body())
    image.SetSpacing(SPACING)
    image.SetOrigin((-18.0, -19.0, 100.0))
    return image


def on_grid(
    image: sitk.Image, direction: np.ndarray, spacing: Sequence[float], size: Sequence[int]
) -> sitk.Image:
    """The same anatomy on another grid with the same centre."""
    centre = np.asarray(
        image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()])
    )
    origin = centre - direction @ ((np.asarray(size) - 1) / 2 * np.asarray(spacing))
    return sitk.Resample(
        image,
        list(size),
        sitk.Transform(),
        sitk.sitkLinear,
        origin.tolist(),
        list(spacing),
        direction.ravel().tolist(),
        -1000.0,
    )


def write_series(
    folder: Path,
    image: sitk.Image,
    *,
    change: Callable[[Dataset, int], None] | None = None,
    shuffle: bool = True,
    number: int = 3,
    prefix: str = "IM",
) -> list[Path]:
    """A CT series of one file a slice, in shuffled names. `change(dataset, z)` edits a slice before
    it is written."""
    folder.mkdir(parents=True, exist_ok=True)
    voxels = sitk.GetArrayFromImage(image)
    names = np.random.default_rng(0).permutation(len(voxels)) if shuffle else np.arange(len(voxels))
    series, study = generate_uid(), generate_uid()
    paths = []
    for z, pixels in enumerate(voxels):
        dataset = dicom_slice(image, pixels, z, series=series, study=study, number=number)
        if change is not None:
            change(dataset, z)
        paths.append(folder / f"{prefix}{names[z]:04d}")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def dicom_slice(
    image: sitk.Image, pixels: np.ndarray, z: int, *, series: str, study: str, number: int
) -> FileDataset:
    """One CT slice with slope 2 and intercept -1024 (even HU survive exactly), a canary in every
    text field."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SeriesNumber = (
        study,
        series,
        number,
    )
    dataset.Modality = "CT"
    add_patient(dataset)
    direction = np.asarray(image.GetDirection()).reshape(3, 3)
    dataset.ImageOrientationPatient = [*direction[:, 0].round(8), *direction[:, 1].round(8)]
    dataset.ImagePositionPatient = list(np.round(image.TransformIndexToPhysicalPoint((0, 0, z)), 6))
    dataset.PixelSpacing = [image.GetSpacing()[1], image.GetSpacing()[0]]
    dataset.SliceThickness = image.GetSpacing()[2]
    add_pixels(dataset, pixels)
    return dataset


def add_patient(dataset: Dataset) -> None:
    """What identifies a patient, in the fields that hold it and in those that should not."""
    for keyword in (
        "PatientName",
        "PatientID",
        "InstitutionName",
        "StudyDescription",
        "SeriesDescription",
        "ReferringPhysicianName",
        "PatientComments",
        "ImageComments",
        "ProtocolName",
        "AccessionNumber",
        "StationName",
        "OperatorsName",
    ):
        setattr(dataset, keyword, CANARY[:16])
    dataset.PatientBirthDate = "19700101"
    dataset.add_new(0x00091001, "LT", CANARY)


def add_pixels(dataset: Dataset, pixels: np.ndarray) -> None:
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = (
        16,
        16,
        15,
        0,
    )
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 2, -1024, "HU"
    dataset.PixelData = np.round((pixels.astype(np.float64) + 1024) / 2).astype("<u2").tobytes()


def write_multi_frame(path: Path, image: sitk.Image, *, order: Sequence[int] | None = None) -> Path:
    """An Enhanced CT of all slices in one file, its frames in the given order."""
    voxels = sitk.GetArrayFromImage(image)
    order = list(range(len(voxels))) if order is None else list(order)
    dataset = dicom_slice(
        image, voxels[0], 0, series=generate_uid(), study=generate_uid(), number=1
    )
    for keyword in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
        "RescaleType",
    ):
        delattr(dataset, keyword)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    direction = np.asarray(image.GetDirection()).reshape(3, 3)
    shared = Dataset()
    shared.PlaneOrientationSequence = _one(
        ImageOrientationPatient=[*direction[:, 0], *direction[:, 1]]
    )
    shared.PixelMeasuresSequence = _one(
        PixelSpacing=[image.GetSpacing()[1], image.GetSpacing()[0]],
        SliceThickness=image.GetSpacing()[2],
    )
    shared.PixelValueTransformationSequence = _one(
        RescaleSlope=2, RescaleIntercept=-1024, RescaleType="HU"
    )
    dataset.SharedFunctionalGroupsSequence = DicomSequence([shared])
    frames = []
    for z in order:
        frame = Dataset()
        frame.PlanePositionSequence = _one(
            ImagePositionPatient=list(image.TransformIndexToPhysicalPoint((0, 0, z)))
        )
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = DicomSequence(frames)
    dataset.NumberOfFrames = len(order)
    dataset.PixelData = (
        np.round((voxels[order].astype(np.float64) + 1024) / 2).astype("<u2").tobytes()
    )
    dataset.save_as(path, enforce_file_format=True)
    return path


def _one(**fields: Any) -> DicomSequence:
    item = Dataset()
    for keyword, value in fields.items():
        setattr(item, keyword, value)
    return DicomSequence([item])


def write_report(path: Path, sop_class: str, modality: str) -> Path:
    """DICOM without an image."""
    dataset = dicom_slice(
        phantom(), body()[0], 0, series=generate_uid(), study=generate_uid(), number=9
    )
    del dataset.PixelData
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.UID(sop_class)
    dataset.Modality = modality
    dataset.save_as(path, enforce_file_format=True)
    return path
