"""DICOM SEG lies on its series: every frame on the image whose pixels the mask was made from."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, generate_uid

from medm import __version__
from medm.errors import DeviceError, MediaError
from medm.imaging import ImagePreprocess, VolumePreprocess, prepare
from medm.imaging.dicom_seg import ABNORMALITY, UNKNOWN_STRUCTURE, find_code, write_dicom_seg
from medm.imaging.mask_output import NamedMasks
from medm.imaging.placement import Placement
from medm.imaging.volumes import read_volume
from tests.imaging.tiny import (
    CANARY,
    add_pixels,
    body,
    dicom_slice,
    on_grid,
    phantom,
    write_multi_frame,
    write_series,
)

FRAME = generate_uid()
pytestmark = pytest.mark.skipif(
    find_spec("highdicom") is None, reason="highdicom comes with the extra 'dicom'"
)


def complete(dataset: Dataset, z: int) -> None:
    """Elements that a scanner writes and that the drawn series lack."""
    dataset.FrameOfReferenceUID = FRAME
    dataset.InstanceNumber = z + 1
    dataset.StudyDate, dataset.StudyTime, dataset.PatientSex = "20240131", "101500", "F"
    dataset.StudyID, dataset.PatientAge = "S1", "054Y"


def turned(angles: tuple[float, float, float], flips: tuple[int, int, int]) -> np.ndarray:
    turn = sitk.Euler3DTransform()
    turn.SetRotation(*angles)
    return np.asarray(turn.GetMatrix()).reshape(3, 3) @ np.diag(flips).astype(float)


SERIES: dict[str, Callable[[], sitk.Image]] = {
    "straight": phantom,
    "oblique": lambda: on_grid(
        phantom(), turned((0.2, 0.1, -0.3), (1, 1, 1)), (1.5, 2.0, 5.0), (26, 20, 12)
    ),
    "reversed": lambda: on_grid(
        phantom(), turned((0, 0.1, 0), (1, 1, -1)), (1.5, 2.0, 5.0), (26, 20, 12)
    ),
    "prone": lambda: on_grid(
        phantom(), turned((0, 0, 0), (-1, -1, 1)), (1.5, 2.0, 4.0), (26, 20, 14)
    ),
    "coronal": lambda: on_grid(
        phantom(), turned((np.pi / 2, 0, 0), (1, 1, 1)), (1.5, 4.0, 2.5), (26, 14, 15)
    ),
}


def structures(voxels: np.ndarray) -> NamedMasks:
    """Two masks that overlap, by thresholds of the voxels, and an empty one."""
    return [("Liver", voxels > 0), ("bone, left rib", voxels > 200), ("nothing", voxels > 9000)]


def volume_placement(path: Path) -> Placement:
    return prepare(path, VolumePreprocess(windows=[[-1000, 1000]], size=None)).placement


def hounsfield(dataset: Dataset) -> np.ndarray:
    return dataset.pixel_array * 2.0 - 1024


@pytest.mark.parametrize("name", SERIES)
def test_every_frame_lies_on_the_image_that_it_was_drawn_on(name: str, tmp_path: Path) -> None:
    """Read with pydicom alone: the threshold of the referenced file's own pixels is the frame."""
    files = write_series(tmp_path / "ct", SERIES[name](), change=complete)
    voxels = read_volume(tmp_path / "ct").voxels
    masks = structures(voxels)
    write_dicom_seg(tmp_path / "seg.dcm", masks, tmp_path / "ct", volume_placement(tmp_path / "ct"))
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    sources = {(read := pydicom.dcmread(file)).SOPInstanceUID: read for file in files}
    one = next(iter(sources.values()))
    assert seg.Modality == "SEG"
    assert seg.SegmentationType == "BINARY"
    assert (seg.FrameOfReferenceUID, seg.StudyInstanceUID) == (FRAME, one.StudyInstanceUID)
    assert seg.SeriesInstanceUID != one.SeriesInstanceUID
    (referenced,) = seg.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == one.SeriesInstanceUID
    listed = {item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence}
    assert listed == set(sources)
    shared = seg.SharedFunctionalGroupsSequence[0]
    np.testing.assert_allclose(
        shared.PlaneOrientationSequence[0].ImageOrientationPatient, one.ImageOrientationPatient
    )
    np.testing.assert_allclose(shared.PixelMeasuresSequence[0].PixelSpacing, one.PixelSpacing)
    thresholds = {1: 0, 2: 200}
    found = dict.fromkeys(thresholds, 0)
    for pixels, group in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        number = int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        (derived,) = group.DerivationImageSequence[0].SourceImageSequence
        source = sources[derived.ReferencedSOPInstanceUID]
        assert derived.ReferencedSOPClassUID == source.SOPClassUID
        np.testing.assert_array_equal(pixels, hounsfield(source) > thresholds[number])
        np.testing.assert_allclose(
            group.PlanePositionSequence[0].ImagePositionPatient, source.ImagePositionPatient
        )
        found[number] += int(pixels.sum())
    assert found == {1: int((voxels > 0).sum()), 2: int((voxels > 200).sum())}
    assert found[2] > 0


@pytest.mark.parametrize("name", SERIES)
def test_highdicom_reads_the_masks_of_the_sorted_slices(name: str, tmp_path: Path) -> None:
    import highdicom

    files = write_series(tmp_path / "ct", SERIES[name](), change=complete)
    masks = structures(read_volume(tmp_path / "ct").voxels)
    write_dicom_seg(tmp_path / "seg.dcm", masks, tmp_path / "ct", volume_placement(tmp_path / "ct"))
    heads = [pydicom.dcmread(file) for file in files]
    normal = np.cross(*np.reshape(heads[0].ImageOrientationPatient, (2, 3)))
    heads.sort(key=lambda head: float(np.dot(normal, head.ImagePositionPatient)))
    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert seg.number_of_segments == 3
    pixels = seg.get_pixels_by_source_instance(
        [head.SOPInstanceUID for head in heads],
        ignore_spatial_locations=True,
        assert_missing_frames_are_empty=True,
    )
    np.testing.assert_array_equal(pixels, np.stack([mask for _, mask in masks], axis=-1))
    volume = seg.get_volume(combine_segments=False)
    placement = volume_placement(tmp_path / "ct")
    for number, (_, mask) in enumerate(masks[:2]):
        found = world(volume.array[..., number] > 0, volume.affine[:3])
        np.testing.assert_allclose(found, world(mask, np.asarray(placement.affine)), atol=1e-3)


def world(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Positions in mm of the voxels of a mask, in an order of their own."""
    places = np.argwhere(mask) @ affine[:, :3].T + affine[:, 3]
    rounded = np.round(places, 2)
    return places[np.lexsort(rounded.T)]


def test_what_a_segment_says(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", phantom(), change=complete)
    mask = body() > 0
    phrases = ["liver", "Mass", "肺 结节\\\n", "", "x" * 200, "a rash"]
    write_dicom_seg(
        tmp_path / "seg.dcm",
        [(phrase, mask) for phrase in phrases],
        tmp_path / "ct",
        volume_placement(tmp_path / "ct"),
        codes={"a rash": ABNORMALITY},
    )
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    segments = list(seg.SegmentSequence)
    assert [segment.SegmentLabel for segment in segments] == [
        "liver",
        "Mass",
        "肺 结节",
        "mask 4",
        "x" * 64,
        "a rash",
    ]
    types = [segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning for segment in segments]
    assert types == ["Liver", "Mass", "Tissue", "Tissue", "Tissue", ABNORMALITY.type[2]]
    categories = [s.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning for s in segments]
    assert categories[:3] == [
        "Anatomical Structure",
        "Morphologically Abnormal Structure",
        "Tissue",
    ]
    (algorithm,) = segments[0].SegmentationAlgorithmIdentificationSequence
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("medm", __version__)
    assert algorithm.AlgorithmFamilyCodeSequence[0].CodeMeaning == "Artificial Intelligence"
    assert segments[0].SegmentAlgorithmType == "AUTOMATIC"
    assert "not for clinical use" in seg.ContentDescription
    assert "not for clinical use" in seg.SeriesDescription
    assert seg.ContentLabel == "NOT_CLINICAL"
    assert len({tuple(segment.RecommendedDisplayCIELabValue) for segment in segments}) == 6


@pytest.mark.parametrize(
    ("phrase", "meaning"),
    [("Liver", "Liver"), ("  lung ", "Lung"), ("edema", "Edema"), ("no such thing", "Tissue"),
     ("background", "Tissue"), ("left lung nodule", "Tissue")],
)  # fmt: skip
def test_codes_are_those_of_the_lists_or_claim_nothing(phrase: str, meaning: str) -> None:
    code = find_code(phrase)
    assert code.type[2] == meaning
    assert (code == UNKNOWN_STRUCTURE) == (meaning == "Tissue")


def test_all_masks_empty(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", phantom(), change=complete)
    placement = volume_placement(tmp_path / "ct")
    write_dicom_seg(
        tmp_path / "seg.dcm",
        [("Liver", np.zeros(placement.source_shape, bool))],
        tmp_path / "ct",
        placement,
    )
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert int(seg.NumberOfFrames) == len(body())
    assert not seg.pixel_array.any()


def test_the_frames_of_a_multi_frame_file(tmp_path: Path) -> None:
    """Stored in another order than their positions."""
    order = [3, 0, 11, 5, 1, 2, 4, 6, 10, 9, 8, 7]
    path = write_multi_frame(tmp_path / "ct.dcm", phantom(), order=order)
    source = pydicom.dcmread(path)
    source.FrameOfReferenceUID = FRAME
    source.save_as(path)
    voxels = read_volume(path).voxels
    write_dicom_seg(tmp_path / "seg.dcm", [("Bone", voxels > 200)], path, volume_placement(path))
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    values = hounsfield(source)
    seen = 0
    for pixels, group in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        (derived,) = group.DerivationImageSequence[0].SourceImageSequence
        assert derived.ReferencedSOPInstanceUID == source.SOPInstanceUID
        frame = int(derived.ReferencedFrameNumber) - 1
        np.testing.assert_array_equal(pixels, values[frame] > 200)
        position = source.PerFrameFunctionalGroupsSequence[frame].PlanePositionSequence[0]
        np.testing.assert_allclose(
            group.PlanePositionSequence[0].ImagePositionPatient, position.ImagePositionPatient
        )
        seen += int(pixels.sum())
    assert seen == int((voxels > 200).sum()) > 0


def one_image(path: Path, *, radiograph: bool) -> Path:
    dataset = dicom_slice(
        phantom(), body()[6], 6, series=generate_uid(), study=generate_uid(), number=1
    )
    if radiograph:
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "SliceThickness"):
            delattr(dataset, keyword)
        uid = DigitalXRayImageStorageForPresentation
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = uid
        dataset.Modality = "DX"
    else:
        dataset.FrameOfReferenceUID = FRAME
    add_pixels(dataset, body()[6])
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("radiograph", [True, False])
def test_the_mask_of_a_single_image(radiograph: bool, tmp_path: Path) -> None:
    """A slice of a CT with its position; a radiograph, which has none."""
    path = one_image(tmp_path / "one.dcm", radiograph=radiograph)
    placement = prepare(path, ImagePreprocess(size=[32, 32])).placement
    source = pydicom.dcmread(path)
    mask = hounsfield(source) > 200
    write_dicom_seg(tmp_path / "seg.dcm", [("Bone", mask)], path, placement)
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    np.testing.assert_array_equal(np.squeeze(seg.pixel_array), mask)
    (group,) = seg.PerFrameFunctionalGroupsSequence
    (derived,) = group.DerivationImageSequence[0].SourceImageSequence
    assert derived.ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert seg.get("FrameOfReferenceUID") == (None if radiograph else FRAME)


def test_the_patient_is_where_the_standard_puts_it_and_nowhere_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also in letters of another character set; values that the standard forbids are left out."""

    def change(dataset: Dataset, z: int) -> None:
        complete(dataset, z)
        dataset.SpecificCharacterSet = "GB18030"
        dataset.PatientName = f"王^{CANARY}"
        dataset.PatientSex = CANARY[:16].upper()
        dataset.PatientBirthDate = "19700101"
        dataset.StudyDate = "last week"

    with pytest.warns(UserWarning, match="Invalid value|invalid"):
        write_series(tmp_path / "ct", phantom(), change=change)
    with caplog.at_level(logging.DEBUG):
        write_dicom_seg(
            tmp_path / "seg.dcm",
            [("Liver", body() > 0)],
            tmp_path / "ct",
            volume_placement(tmp_path / "ct"),
        )
    assert "Canary" not in caplog.text
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert str(seg.PatientName) == f"王^{CANARY}"
    assert (seg.PatientSex, seg.StudyDate) == ("", "")
    assert seg.PatientBirthDate == "19700101"
    holders = {e.keyword for e in seg.iterall() if "Canary" in str(e.value) and e.VR != "SQ"}
    assert holders == {"PatientName", "PatientID", "AccessionNumber", "ReferringPhysicianName"}
    assert "PatientAge" not in seg


@pytest.mark.parametrize(
    ("masks", "reason"),
    [
        ([], "at least one mask"),
        ([("a", np.zeros((12, 20), bool))], r"mask 1 \('a'\): a mask of 12 x 20 for a file of 12"),
        ([("a", body())], "are no mask"),
    ],
)
def test_what_is_no_mask_is_refused(masks: NamedMasks, reason: str, tmp_path: Path) -> None:
    write_series(tmp_path / "ct", phantom(), change=complete)
    with pytest.raises(MediaError, match=reason):
        write_dicom_seg(
            tmp_path / "seg.dcm", masks, tmp_path / "ct", volume_placement(tmp_path / "ct")
        )
    assert not (tmp_path / "seg.dcm").exists()


def test_other_images_than_those_of_the_masks_are_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", phantom(), change=complete)
    placement = volume_placement(tmp_path / "ct")
    masks = [("a", body() > 0)]

    def moved(dataset: Dataset, z: int) -> None:
        complete(dataset, z)
        dataset.ImagePositionPatient[0] += 4

    write_series(tmp_path / "moved", phantom(), change=moved)
    write_series(tmp_path / "bare", phantom())
    half = sitk.RegionOfInterest(phantom(), [26, 20, 6], [0, 0, 0])
    write_series(tmp_path / "half", half, change=complete)
    for name, reason in (
        ("moved", "moved: the series lies elsewhere in the patient"),
        ("half", "half: images of 6 x 20 x 26 for masks of 12 x 20 x 26"),
        ("bare", "FrameOfReferenceUID missing or empty"),
        ("none", "none: no such file or folder"),
    ):
        with pytest.raises(MediaError, match=reason) as raised:
            write_dicom_seg(tmp_path / "seg.dcm", masks, tmp_path / name, placement)
        assert "Canary" not in str(raised.value)


def test_one_of_several_series_by_its_number(tmp_path: Path) -> None:
    for number in (3, 4):
        write_series(
            tmp_path / "ct", phantom(), change=complete, number=number, prefix=f"S{number}"
        )
    source = Path(f"{tmp_path / 'ct'}#4")
    write_dicom_seg(tmp_path / "s.dcm", [("a", body() > 0)], source, volume_placement(source))
    seg = pydicom.dcmread(tmp_path / "s.dcm")
    uid = pydicom.dcmread(next((tmp_path / "ct").glob("S4*"))).SeriesInstanceUID
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == uid


def test_missing_highdicom_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(DeviceError, match=r"pip install 'highdicom' \(or 'medm\[dicom\]'\)"):
        write_dicom_seg(
            tmp_path / "s.dcm", [("a", np.zeros((2, 2)))], tmp_path, Placement.of_source((2, 2))
        )


def test_an_error_of_highdicom_does_not_quote_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import highdicom

    def fail(**_: Any) -> None:
        raise ValueError(f"bad value {CANARY}")

    write_series(tmp_path / "ct", phantom(), change=complete)
    monkeypatch.setattr(highdicom.seg, "Segmentation", fail)
    with pytest.raises(MediaError, match=r"cannot make a SEG .* \(ValueError\)") as raised:
        write_dicom_seg(
            tmp_path / "s.dcm",
            [("a", body() > 0)],
            tmp_path / "ct",
            volume_placement(tmp_path / "ct"),
        )
    assert CANARY not in str(raised.value)
    assert raised.value.__suppress_context__
