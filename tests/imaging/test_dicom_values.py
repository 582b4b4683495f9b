"""DICOM from stored numbers to shades (PS3.3 C.11, C.7.6.16): known answers, and pydicom's where it
has them."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from medm.errors import MediaError
from medm.imaging import ImagePreprocess, VolumePreprocess, load_pixels
from medm.imaging.images import read_image
from medm.imaging.notices import collected
from medm.imaging.preview import contact_sheet
from medm.imaging.volumes import read_volume
from tests.imaging.tiny import CANARY, body, dicom_slice, phantom, write_multi_frame, write_series

PLAIN: dict[str, Any] = {
    "size": [2, 4],
    "channels": 1,
    "mean": [0.0],
    "std": [1.0],
    "interpolation": "nearest",
}
RAMP = np.arange(8, dtype=np.uint16).reshape(2, 4)
FALLING = [700, 600, 500, 400, 300, 200, 100, 0]


def table(
    entries: list[int] | bytes, *, descriptor: list[int] | None = None, kind: str = "US"
) -> Sequence:
    """A sequence of one lookup table."""
    item = Dataset()
    item.add_new(0x00283002, "US", descriptor or [len(entries), 0, 16])
    item.add_new(0x00283006, "OW" if isinstance(entries, bytes) else "US", entries)
    if kind:
        item.ModalityLUTType = kind
    return Sequence([item])


def cr(
    path: Path,
    change: Callable[[Dataset], None] | None = None,
    *,
    pixels: np.ndarray = RAMP,
    implicit: bool = False,
    rle: bool = False,
) -> Path:
    """A CR of 2 x 4 pixels, 12 of 16 bits, without rescale and window; each is 8 x 8 in RLE, which
    GDCM needs."""
    if rle:
        pixels = np.kron(pixels, np.ones((8, 8), dtype=np.uint16))
    dataset = dicom_slice(phantom(), pixels, 0, series="1.2", study="1.3", number=1)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = (
        ComputedRadiographyImageStorage
    )
    dataset.Modality = "CR"
    del dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType
    dataset.BitsStored, dataset.HighBit = 12, 11
    dataset.PixelData = pixels.astype("<u2").tobytes()
    if change is not None:
        change(dataset)
    if rle:
        dataset.compress(RLELossless)
    if implicit:
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=True)
    return path


def values(path: Path) -> np.ndarray:
    pixels = read_image(path).pixels
    return pixels[:: len(pixels) // 2, :: pixels.shape[1] // 4].ravel()


def shades(path: Path, window: list[float] | None = None) -> np.ndarray:
    return load_pixels(path, ImagePreprocess(**PLAIN, window=window))[0].ravel()


ENCODINGS: list[dict[str, bool]] = [{}, {"implicit": True}, {"rle": True}]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_a_modality_table_gives_the_values(
    tmp_path: Path, encoding: dict[str, bool], photometric: str
) -> None:
    def change(dataset: Dataset) -> None:
        dataset.ModalityLUTSequence = table(FALLING)
        dataset.PhotometricInterpretation = photometric

    path = cr(tmp_path / "a.dcm", change, **encoding)
    np.testing.assert_array_equal(values(path), FALLING)
    assert read_image(path).full_range == (0, 65535)
    expected = np.array(FALLING) / 700
    shown = shades(path, [0, 700])
    np.testing.assert_allclose(
        shown, expected if photometric == "MONOCHROME2" else 1 - expected, atol=1e-6
    )
    assert photometric == "MONOCHROME1" or (shown[0], round(float(shown[3]), 3), shown[7]) == (
        1,
        0.571,
        0,
    )


@pytest.mark.parametrize(
    ("entries", "descriptor", "expected"),
    [
        (
            [10, 20, 30],
            [3, 2, 16],
            [10, 10, 10, 20, 30, 30, 30, 30],
        ),  # what lies outside takes the nearest entry
        (
            bytes([1, 2, 3, 4, 5, 6, 7, 0]),
            [7, 0, 8],
            [1, 2, 3, 4, 5, 6, 7, 7],
        ),  # two entries a word
        (np.arange(8, dtype="<u2")[::-1].tobytes(), [8, 0, 12], [7, 6, 5, 4, 3, 2, 1, 0]),
        ([5], [1, 0, 16], [5] * 8),
    ],
)
@pytest.mark.parametrize("implicit", [False, True])
def test_layouts_of_tables(
    tmp_path: Path,
    entries: list[int] | bytes,
    descriptor: list[int],
    expected: list[int],
    implicit: bool,
) -> None:
    def change(dataset: Dataset) -> None:
        dataset.ModalityLUTSequence = table(entries, descriptor=descriptor)

    path = cr(tmp_path / "a.dcm", change, implicit=implicit)
    np.testing.assert_array_equal(read_image(path).pixels.ravel(), expected)


def test_a_table_of_65536_entries_and_signed_numbers(tmp_path: Path) -> None:
    """A length of 0 means 65536, and the first input is signed where the pixels are."""
    pixels = np.array([[-32768, -1, 0, 1], [2, 3, 4, 32767]], dtype=np.int16)
    entries = np.arange(65536, dtype="<u2")

    def change(dataset: Dataset) -> None:
        dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit = 1, 16, 15
        dataset.ModalityLUTSequence = table(entries.tobytes(), descriptor=[0, 32768, 16])

    path = cr(tmp_path / "a.dcm", change, pixels=pixels.view(np.uint16))
    np.testing.assert_array_equal(read_image(path).pixels, pixels.astype(np.int32) + 32768)


@pytest.mark.parametrize("sequence", ["ModalityLUTSequence", "VOILUTSequence"])
@pytest.mark.parametrize(
    ("entries", "descriptor", "reason"),
    [
        (
            [1, 2, 3],
            [4, 0, 16],
            r"declares 4 entries of 16 bits, LUTData \(0028,3006\) holds 3 entries",
        ),
        (
            bytes(6),
            [8, 0, 16],
            r"declares 8 entries of 16 bits, LUTData \(0028,3006\) holds 6 bytes",
        ),
        ([1, 2, 3], [3, 0, 33], "declares entries of 33 bits; expected 8 to 16"),
        ([1, 2, 3], [3, 0, 0], "declares entries of 0 bits"),
        ([1, 2, 3], [3, 0], r"LUTDescriptor \(0028,3002\) does not hold three numbers"),
        (
            [1, 2, 5000],
            [3, 0, 12],
            r"declares entries of 12 bits, LUTData \(0028,3006\) holds 5000",
        ),
        ([1, 2, 3], [0, 0, 16], "declares 65536 entries of 16 bits"),
    ],
)
def test_tables_that_contradict_their_descriptor_are_refused(
    tmp_path: Path, sequence: str, entries: list[int] | bytes, descriptor: list[int], reason: str
) -> None:
    def change(dataset: Dataset) -> None:
        setattr(dataset, sequence, table(entries, descriptor=descriptor))

    tag = {"ModalityLUTSequence": "0028,3000", "VOILUTSequence": "0028,3010"}[sequence]
    with pytest.raises(MediaError, match=rf"a\.dcm: DICOM .* LUT Sequence \({tag}\): .*{reason}"):
        read_image(cr(tmp_path / "a.dcm", change))


def test_a_table_beside_slope_and_intercept(tmp_path: Path) -> None:
    def change(slope: float) -> Callable[[Dataset], None]:
        def both(dataset: Dataset) -> None:
            dataset.ModalityLUTSequence = table(FALLING)
            dataset.RescaleSlope, dataset.RescaleIntercept = slope, 0

        return both

    np.testing.assert_array_equal(read_image(cr(tmp_path / "a", change(1))).pixels.ravel(), FALLING)
    with pytest.raises(
        MediaError, match=r"Modality LUT Sequence \(0028,3000\) beside RescaleSlope 2 and .* 0"
    ):
        read_image(cr(tmp_path / "b", change(2)))


@pytest.mark.parametrize(("kind", "unit"), [("US", "raw"), ("OD", "raw"), ("HU", "HU")])
def test_a_table_on_slices_of_ct(tmp_path: Path, kind: str, unit: str) -> None:
    """Applied; Hounsfield units only where the table says so."""

    def change(dataset: Dataset, _: int) -> None:
        del dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType
        dataset.ModalityLUTSequence = table(
            np.arange(1024, dtype="<u2")[::-1].tobytes(), descriptor=[1024, 0, 16], kind=kind
        )

    write_series(tmp_path / "ct", phantom(), change=change)
    volume = read_volume(tmp_path / "ct")
    np.testing.assert_array_equal(volume.voxels, 1023 - (body() + 1024) // 2)
    assert volume.unit == unit
    if unit == "raw":
        with pytest.raises(MediaError, match="`scale: hu` is declared"):
            load_pixels(tmp_path / "ct", VolumePreprocess(size=[4, 4, 4]))


def test_a_series_in_which_only_some_slices_have_a_transform_is_refused(tmp_path: Path) -> None:
    def one_table(dataset: Dataset, z: int) -> None:
        dataset.Modality = "MR"
        if z == 3:
            del dataset.RescaleSlope, dataset.RescaleIntercept
            dataset.ModalityLUTSequence = table(FALLING)

    def one_without(dataset: Dataset, z: int) -> None:
        dataset.Modality = "MR"
        if z == 3:
            del dataset.RescaleSlope, dataset.RescaleIntercept

    write_series(tmp_path / "a", phantom(), change=one_table)
    with pytest.raises(
        MediaError, match=r"1 of 12 slices of the series have a Modality LUT Sequence \(0028,3000\)"
    ):
        read_volume(tmp_path / "a")
    write_series(tmp_path / "b", phantom(), change=one_without)
    with pytest.raises(MediaError, match="some slices of the series have RescaleSlope"):
        read_volume(tmp_path / "b")


WINDOWS: dict[str, tuple[float, float, str | None, list[float]]] = {
    "linear": (4, 5, None, [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]),  # (x - 3.5) / 4 + 0.5
    "linear named": (4, 5, "LINEAR", [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]),
    "linear of width 1": (4, 1, None, [0, 0, 0, 0, 1, 1, 1, 1]),  # white above 3.5
    "exact": (4, 4, "LINEAR_EXACT", [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]),  # (x - 4) / 4 + 0.5
    "exact below 1": (4, 0.5, "LINEAR_EXACT", [0, 0, 0, 0, 0.5, 1, 1, 1]),
    "sigmoid": (4, 4, "SIGMOID", list(1 / (1 + np.exp(-(np.arange(8) - 4.0))))),  # -4 (x - 4) / 4
}


@pytest.mark.parametrize("case", WINDOWS)
@pytest.mark.parametrize("place", ["top", "shared", "frame", "frame before shared"])
def test_windows_and_their_functions(tmp_path: Path, case: str, place: str) -> None:
    center, width, function, expected = WINDOWS[case]

    def window(target: Dataset) -> None:
        target.WindowCenter, target.WindowWidth = (
            [center, 99],
            [width, 99],
        )  # alternatives: the first counts
        if function:
            target.VOILUTFunction = function

    def change(dataset: Dataset) -> None:
        if place == "top":
            window(dataset)
            return
        other, wanted = Dataset(), Dataset()
        other.WindowCenter, other.WindowWidth = 1, 2
        window(wanted)
        shared, frame = Dataset(), Dataset()
        if place != "frame":
            shared.FrameVOILUTSequence = Sequence([wanted if place == "shared" else other])
        if place != "shared":
            frame.FrameVOILUTSequence = Sequence([wanted])
        dataset.SharedFunctionalGroupsSequence = Sequence([shared])
        dataset.PerFrameFunctionalGroupsSequence = Sequence([frame])
        dataset.WindowCenter, dataset.WindowWidth = 1, 2

    path = cr(tmp_path / "a.dcm", change)
    np.testing.assert_allclose(shades(path), expected, atol=1e-6)
    np.testing.assert_allclose(
        shades(path, [0, 7]), np.arange(8) / 7, atol=1e-6
    )  # a recipe's window comes first
    if place == "top" and width > 1:
        dataset = pydicom.dcmread(path)
        theirs = apply_voi_lut(dataset.pixel_array, dataset).ravel() / 4095
        np.testing.assert_allclose(shades(path), theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("center", "width", "function", "reason"),
    [
        (
            4,
            0.5,
            "LINEAR",
            r"WindowWidth \(0028,1051\) 0.5 with VOILUTFunction LINEAR is not applied",
        ),
        (4, 0, "LINEAR_EXACT", r"WindowWidth \(0028,1051\) 0 with VOILUTFunction LINEAR_EXACT"),
        (4, -3, "SIGMOID", r"WindowWidth \(0028,1051\) -3 with VOILUTFunction SIGMOID"),
        (4, None, "LINEAR", r"WindowWidth \(0028,1051\) without a number"),
        (4, 4, "CANARY", r"unknown VOILUTFunction \(0028,1056\)"),
    ],
)
def test_windows_that_cannot_be_applied_are_named(
    tmp_path: Path,
    center: float,
    width: float | None,
    function: str,
    reason: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("medm.imaging.notices._logged", set())

    def change(dataset: Dataset) -> None:
        dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = center, width, function

    np.testing.assert_allclose(
        shades(cr(tmp_path / "a.dcm", change)), np.arange(8) / 4095, atol=1e-6
    )
    assert re.search(reason, caplog.text)
    assert CANARY[:6].upper() not in caplog.text


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_voi_table_gives_the_shades(tmp_path: Path, encoding: dict[str, bool]) -> None:
    """After slope and intercept: inputs of the table are values, and may be negative."""

    def change(dataset: Dataset) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = 2, -6  # -6, -4 ... 8
        item = table([0, 1000, 3000, 4095], descriptor=[4, 65536 - 4, 12], kind="")[0]
        dataset.VOILUTSequence = Sequence([item, table(FALLING)[0]])
        dataset.WindowCenter, dataset.WindowWidth = 0, 2  # an alternative to the table

    path = cr(tmp_path / "a.dcm", change, **encoding)
    expected = (
        np.array([0, 0, 3000, 4095, 4095, 4095, 4095, 4095]) / 4095
    )  # inputs -6, -4, -2, 0 ...
    np.testing.assert_allclose(shades(path), expected, atol=1e-6)
    np.testing.assert_allclose(shades(path, [-6, 8]), np.arange(8) / 7, atol=1e-6)
    contact_sheet(path, ImagePreprocess(**PLAIN))


def test_both_tables_as_pydicom_applies_them(tmp_path: Path) -> None:
    def change(dataset: Dataset) -> None:
        dataset.ModalityLUTSequence = table(FALLING)
        dataset.VOILUTSequence = table(list(range(0, 4000, 5)), descriptor=[800, 0, 12], kind="")

    path = cr(tmp_path / "a.dcm", change)
    dataset = pydicom.dcmread(path)
    theirs = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    np.testing.assert_allclose(shades(path), theirs.ravel() / 4095, atol=1e-6)


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize(
    ("value", "limit", "black"), [(0, None, [0]), (6, 7, [6, 7]), (7, 6, [6, 7]), (99, None, [])]
)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_padding_is_shown_black(
    tmp_path: Path,
    photometric: str,
    value: int,
    limit: int | None,
    black: list[int],
    encoding: dict[str, bool],
) -> None:
    def change(dataset: Dataset) -> None:
        dataset.PhotometricInterpretation = photometric
        dataset.PixelPaddingValue = value
        if limit is not None:
            dataset.PixelPaddingRangeLimit = limit

    expected = np.arange(8) / 7 if photometric == "MONOCHROME2" else 1 - np.arange(8) / 7
    expected[black] = 0
    np.testing.assert_allclose(
        shades(cr(tmp_path / "a.dcm", change, **encoding), [0, 7]), expected, atol=1e-6
    )


def test_padding_of_a_volume_is_as_dark_as_the_darkest_voxel(tmp_path: Path) -> None:
    """With `scale: minmax` a padding of -2000 would otherwise decide where black is."""
    voxels = body().copy()
    voxels[:, :2, :] = 3000

    def change(dataset: Dataset, _: int) -> None:
        dataset.Modality = "MR"
        dataset.PixelPaddingValue = (3000 + 1024) // 2

    image = phantom()
    padded = type(image)(image)
    for x in range(padded.GetWidth()):
        for y in range(2):
            for z in range(padded.GetDepth()):
                padded[x, y, z] = 3000
    write_series(tmp_path / "mr", padded, change=change)
    voxels[:, :2, :] = -1000
    np.testing.assert_array_equal(read_volume(tmp_path / "mr").voxels, voxels)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_overlays_in_unused_bits_are_left_out(tmp_path: Path, encoding: dict[str, bool]) -> None:
    pixels = RAMP | np.uint16(0x8000) | np.uint16(0x1000)
    path = cr(tmp_path / "a.dcm", pixels=pixels, **encoding)
    np.testing.assert_array_equal(values(path), RAMP.ravel())


def not_applied(element: str) -> Callable[[Dataset], None]:
    def change(dataset: Dataset) -> None:
        if element.startswith("Real World"):
            shared = Dataset()
            shared.RealWorldValueMappingSequence = Sequence([Dataset()])
            dataset.SharedFunctionalGroupsSequence = Sequence([shared])
            dataset.PerFrameFunctionalGroupsSequence = Sequence([Dataset()])
        elif element.startswith("overlay"):
            dataset.add_new(0x60020010, "US", 2)
        elif element.startswith("Presentation LUT Shape"):
            dataset.PresentationLUTShape = "INVERSE"
        elif element.startswith("Presentation LUT Sequence"):
            dataset.PresentationLUTSequence = table(FALLING)
        else:
            dataset.MaskSubtractionSequence = Sequence([Dataset()])

    return change


@pytest.mark.parametrize(
    "element",
    ["Real World Value Mapping Sequence (0040,9096)", "overlay of group 6002",
     "Presentation LUT Shape (2050,0020) INVERSE, which contradicts MONOCHROME2,",
     "Presentation LUT Sequence (2050,0010)", "Mask Subtraction Sequence (0028,6100)"],
)  # fmt: skip
def test_what_is_not_applied_is_named(
    tmp_path: Path, element: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medm.imaging.notices._logged", set())
    read_image(cr(tmp_path / "a.dcm", not_applied(element)))
    assert f"a.dcm: DICOM {element} is not applied" in caplog.text


def test_presentation_lut_shape_that_agrees_is_not_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(dataset: Dataset) -> None:
        dataset.PhotometricInterpretation, dataset.PresentationLUTShape = "MONOCHROME1", "INVERSE"

    assert read_image(cr(tmp_path / "a.dcm", change)).inverted
    assert not caplog.records


def regrouped(path: Path, change: Callable[[Dataset, list[Dataset]], None]) -> Path:
    """A multi-frame CT whose functional groups are changed."""
    write_multi_frame(path, phantom())
    dataset = pydicom.dcmread(path)
    change(
        dataset.SharedFunctionalGroupsSequence[0], list(dataset.PerFrameFunctionalGroupsSequence)
    )
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_the_rescale_type_of_functional_groups_decides_the_unit(tmp_path: Path) -> None:
    def electron_density(shared: Dataset, _: list[Dataset]) -> None:
        shared.PixelValueTransformationSequence[0].RescaleType = "ED"

    def by_frame(shared: Dataset, frames: list[Dataset]) -> None:
        for frame in frames:
            frame.PixelValueTransformationSequence = shared.PixelValueTransformationSequence
        del shared.PixelValueTransformationSequence

    def some_frames(shared: Dataset, frames: list[Dataset]) -> None:
        by_frame(shared, frames)
        del frames[3].PixelValueTransformationSequence

    assert read_volume(regrouped(tmp_path / "a", electron_density)).unit == "raw"
    volume = read_volume(regrouped(tmp_path / "b", by_frame))
    assert volume.unit == "HU"
    np.testing.assert_array_equal(volume.voxels, body())
    with pytest.raises(MediaError, match=r"\(0028,9145\) stands in 11 of 12 frames"):
        read_volume(regrouped(tmp_path / "c", some_frames))


def test_compressed_pixels_are_decoded_without_the_header_of_the_patient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medm.imaging import dicom_pixels

    seen = []

    class Recorder:
        def decode(self, path: Path, name: str, *, max_items: int) -> np.ndarray:
            seen.append(path.read_bytes())
            return np.zeros((1, 16, 32), np.uint16)

    monkeypatch.setattr(dicom_pixels, "DECODER", Recorder())
    read_image(cr(tmp_path / "a.dcm", rle=True))
    before_pixels = seen[0].partition(struct.pack("<2H", 0x7FE0, 0x0010))[0]
    assert CANARY[:6].encode() not in before_pixels
    assert len(before_pixels) < 500


def test_slopes_that_differ_by_frame_are_applied_to_each(tmp_path: Path) -> None:
    """As in PET. One frame takes the shared pair."""

    def differ(shared: Dataset, frames: list[Dataset]) -> None:
        for number, frame in enumerate(frames[:-1]):
            item = Dataset()
            item.RescaleSlope, item.RescaleIntercept, item.RescaleType = (
                number + 1,
                -1024 + number,
                "HU",
            )
            frame.PixelValueTransformationSequence = Sequence([item])

    def vanish(shared: Dataset, frames: list[Dataset]) -> None:
        differ(shared, frames)
        frames[2].PixelValueTransformationSequence[0].RescaleSlope = 0

    stored = (body().astype(np.int32) + 1024) // 2
    slopes = np.array([*range(1, 12), 2])[:, None, None]
    intercepts = np.array([*range(-1024, -1013), -1024])[:, None, None]
    volume = read_volume(regrouped(tmp_path / "a", differ))
    np.testing.assert_array_equal(volume.voxels, stored * slopes + intercepts)
    with pytest.raises(
        MediaError, match=r"\(0028,9145\) gives 11 of 12 frames a RescaleSlope that is not 0"
    ):
        read_volume(regrouped(tmp_path / "b", vanish))


@pytest.mark.parametrize("vr", ["OW", "OB"])
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_big_endian_bytes(tmp_path: Path, vr: str, photometric: str) -> None:
    """In words, two pixels change places; slope and MONOCHROME1 are treated as in other files."""

    def change(dataset: Dataset) -> None:
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.RescaleSlope, dataset.RescaleIntercept = 10, -5
        dataset.PhotometricInterpretation = photometric
        pixels = RAMP.astype(np.uint8).tobytes()
        dataset.PixelData = (
            np.frombuffer(pixels, "<u2").astype(">u2").tobytes() if vr == "OW" else pixels
        )
        dataset["PixelData"].VR = vr
        dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian

    path = tmp_path / "a.dcm"
    dataset = pydicom.dcmread(cr(path))
    change(dataset)
    turned = Dataset(dataset)
    turned.file_meta, turned.preamble = dataset.file_meta, bytes(128)
    turned.save_as(path, implicit_vr=False, little_endian=False, enforce_file_format=True)
    decoded = read_image(path)
    np.testing.assert_array_equal(decoded.pixels.ravel(), np.arange(8) * 10 - 5)
    assert decoded.inverted == (photometric == "MONOCHROME1")
    np.testing.assert_array_equal(pydicom.dcmread(path).pixel_array.ravel(), np.arange(8))


@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_an_inverted_volume_is_named(tmp_path: Path, modality: str) -> None:
    """Except in Hounsfield units, whose windows say what is white."""

    def change(dataset: Dataset, _: int) -> None:
        dataset.Modality, dataset.PhotometricInterpretation = modality, "MONOCHROME1"

    write_series(tmp_path / "a", phantom(), change=change)
    with collected() as notices:
        np.testing.assert_array_equal(read_volume(tmp_path / "a").voxels, body())
    assert [notice.kind for notice in notices] == (["inverted"] if modality == "MR" else [])


@pytest.mark.parametrize("implicit", [False, True])
def test_mutated_tables_and_windows_give_pixels_or_a_media_error(
    tmp_path: Path, implicit: bool
) -> None:
    def change(dataset: Dataset) -> None:
        dataset.ModalityLUTSequence = table(FALLING)
        dataset.VOILUTSequence = table(list(range(800)), descriptor=[800, 0, 12], kind="")
        dataset.PixelPaddingValue, dataset.PixelPaddingRangeLimit = 3, 4
        dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = 4, 4, "SIGMOID"

    path = cr(tmp_path / "a.dcm", change, implicit=implicit)
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for number in range(300):
        data = bytearray(whole)
        for at in generator.integers(132, len(data), generator.integers(1, 8)):
            data[at] = generator.integers(0, 256)
        path.write_bytes(data[: generator.integers(132, len(data))] if number % 5 == 0 else data)
        try:
            assert np.isfinite(shades(path)).all()
        except MediaError as error:
            refused += 1
            assert CANARY[:6].lower() not in str(error).lower()
    assert 50 < refused < 300
