"""Every format gives the same voxels in the same place; left stays left."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless

from medm.errors import MediaError
from medm.imaging import VolumePreprocess, load_pixels
from medm.imaging.geometry import Geometry
from medm.imaging.transforms import reoriented
from medm.imaging.volumes import Volume, read_volume
from tests.imaging.tiny import SHAPE, body, on_grid, phantom, write_multi_frame, write_series


def rotation(*degrees: float) -> np.ndarray:
    """About x, y and z in turn."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        turn = np.eye(3)
        i, j = [k for k in range(3) if k != axis]
        turn[[i, i, j, j], [i, j, i, j]] = [
            np.cos(angle),
            -np.sin(angle),
            np.sin(angle),
            np.cos(angle),
        ]
        matrix = matrix @ turn
    return matrix


def by_simpleitk(path: Path) -> tuple[np.ndarray, Geometry]:
    """The same file through an independent reader."""
    image = sitk.ReadImage(str(path))
    direction = np.asarray(image.GetDirection()).reshape(3, 3)[:, ::-1]
    return sitk.GetArrayFromImage(image), Geometry(
        np.asarray(image.GetSpacing())[::-1], direction, np.asarray(image.GetOrigin())
    )


def assert_same_place(volume: Volume, expected: Geometry) -> None:
    assert volume.geometry is not None
    np.testing.assert_allclose(volume.geometry.spacing, expected.spacing, rtol=1e-5)
    np.testing.assert_allclose(volume.geometry.direction, expected.direction, atol=1e-5)
    np.testing.assert_allclose(volume.geometry.origin, expected.origin, atol=1e-3)


@pytest.mark.parametrize(
    "grid", [np.eye(3), rotation(10, -20, 30), np.diag([-1.0, 1, -1]), np.eye(3)[:, [2, 0, 1]]]
)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".mhd"])
@pytest.mark.parametrize("packed", [False, True])
def test_files_agree_with_simpleitk(
    tmp_path: Path, suffix: str, packed: bool, grid: np.ndarray
) -> None:
    path = tmp_path / f"ct{suffix}"
    sitk.WriteImage(on_grid(phantom(), grid, (1.5, 2.0, 5.0), (26, 20, 12)), str(path), packed)
    voxels, geometry = by_simpleitk(path)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.voxels, voxels)
    assert volume.voxels.dtype == np.int16
    assert volume.unit == "raw"  # none of these formats can say that its numbers are HU
    assert_same_place(volume, geometry)


@pytest.mark.parametrize("kind", [sitk.sitkUInt8, sitk.sitkInt8, sitk.sitkUInt16, sitk.sitkInt32, sitk.sitkUInt32,
                                  sitk.sitkFloat32, sitk.sitkFloat64])  # fmt: skip
@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_every_kind_of_number(tmp_path: Path, suffix: str, kind: int) -> None:
    path = tmp_path / f"ct{suffix}"
    values = sitk.Cast(sitk.Clamp(phantom(), lowerBound=0, upperBound=100), kind)
    sitk.WriteImage(values, str(path), True)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.voxels, np.clip(body(), 0, 100))
    assert volume.voxels.dtype == (
        np.float32 if kind in (sitk.sitkFloat32, sitk.sitkFloat64) else np.int16
    )


def test_values_beyond_16_bits_are_kept(tmp_path: Path) -> None:
    values = np.full((2, 2, 3), 70_000, dtype=np.int32)
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "a.nrrd"))
    volume = read_volume(tmp_path / "a.nrrd")
    assert volume.voxels.dtype == np.float32
    np.testing.assert_array_equal(volume.voxels, values)


def test_big_endian_and_scaled_nifti(tmp_path: Path) -> None:
    """A NIfTI-1 header written field by field: big-endian, int16, slope 0.5, intercept -10, qform
    turned about x."""
    path = tmp_path / "a.nii"
    header = np.zeros(352, dtype=np.uint8)

    def put(at: int, values: object, kind: str) -> None:
        raw = np.asarray(values, dtype=">" + kind).reshape(-1).view(np.uint8)
        header[at : at + len(raw)] = raw

    put(0, 348, "i4")
    put(40, [3, 4, 3, 2, 1, 1, 1, 1], "i2")
    put(70, [4, 16], "i2")
    put(76, [-1, 1.5, 2, 3], "f4")  # qfac -1: z is flipped
    put(108, [352, 0.5, -10], "f4")
    put(252, [1, 0], "i2")
    put(256, [1, 0, 0, 7, 8, 9], "f4")  # half a turn about x; offset 7, 8, 9 (RAS)
    header[123] = 2
    header[344:348] = list(b"n+1\0")
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    path.write_bytes(header.tobytes() + voxels.astype(">i2").tobytes())
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.voxels, voxels * 0.5 - 10)
    assert volume.geometry is not None
    # RAS steps: x (1.5,0,0), y (0,-2,0), z (0,0,-3) * qfac; as LPS x is negated, y turned to +, z
    # stays.
    assert volume.geometry.axes == "SPR"
    np.testing.assert_allclose(volume.geometry.spacing, [3, 2, 1.5])
    np.testing.assert_allclose(volume.geometry.origin, [-7, -8, 9])
    assert_same_place(volume, by_simpleitk(path)[1])


def test_dicom_series_is_sorted_by_place_and_in_hounsfield(tmp_path: Path) -> None:
    image = on_grid(phantom(), rotation(0, 0, 20), (1.5, 2.0, 5.0), (26, 20, 12))
    write_series(tmp_path / "ct", image)
    volume = read_volume(tmp_path / "ct")
    np.testing.assert_allclose(
        volume.voxels, sitk.GetArrayFromImage(image), atol=1
    )  # slope 2 rounds odd values
    assert volume.unit == "HU"
    assert volume.modality == "CT"
    direction = np.asarray(image.GetDirection()).reshape(3, 3)[:, ::-1]
    assert_same_place(
        volume, Geometry(np.array([5, 2, 1.5]), direction, np.asarray(image.GetOrigin()))
    )


def test_multi_frame_dicom_is_sorted_by_place(tmp_path: Path) -> None:
    path = write_multi_frame(
        tmp_path / "enhanced.dcm", phantom(), order=[3, 0, 1, 2, 11, 10, 9, 8, 7, 6, 5, 4]
    )
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.voxels, body())
    assert volume.unit == "HU"
    assert volume.geometry is not None
    np.testing.assert_allclose(volume.geometry.spacing, [5, 2, 1.5])
    assert volume.geometry.axes == "SPL"


def test_series_of_a_folder_are_named_or_the_largest_is_taken(tmp_path: Path) -> None:
    write_series(tmp_path / "study", phantom(), number=3, prefix="A")
    write_series(tmp_path / "study" / "more", phantom()[:, :, 2:8], number=4, prefix="B")
    assert read_volume(tmp_path / "study#4").voxels.shape == (6, 20, 26)
    assert read_volume(tmp_path / "study", series="3").voxels.shape == SHAPE
    assert read_volume(tmp_path / "study", several="largest").voxels.shape == SHAPE
    assert load_pixels(
        tmp_path / "study", VolumePreprocess(series="largest", size=[4, 4, 4])
    ).shape == (1, 4, 4, 4)


def test_arrays_and_slices_have_no_place(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", body())
    np.save(tmp_path / "m3d.npy", body()[None])
    np.savez_compressed(tmp_path / "a.npz", body())
    np.save(tmp_path / "fortran.npy", np.asfortranarray(body().astype(">f8")))
    for name in ("a.npy", "m3d.npy", "a.npz", "fortran.npy"):
        volume = read_volume(tmp_path / name)
        np.testing.assert_array_equal(volume.voxels, body())
        assert volume.geometry is None
    (tmp_path / "slices").mkdir()
    for z, pixels in enumerate(np.clip(body(), 0, 255).astype(np.uint8)):
        sitk.WriteImage(
            sitk.GetImageFromArray(pixels), str(tmp_path / "slices" / f"slice_{z + 1}.png")
        )
    volume = read_volume(tmp_path / "slices")  # slice_10 comes after slice_9
    np.testing.assert_array_equal(volume.voxels, np.clip(body(), 0, 255))
    assert volume.geometry is None


@pytest.mark.parametrize("orientation", ["SPL", "LPS", "RAS", "IAR", "PSR"])
def test_reorienting_moves_every_voxel_to_its_place(orientation: str) -> None:
    """Each voxel of the result lies where it lay, and the axes are those of the letters."""
    generator = np.random.default_rng(0)
    voxels = generator.normal(size=(3, 4, 5))
    geometry = Geometry(
        np.array([5.0, 2.0, 1.0]),
        rotation(5, -3, 8)[:, [1, 2, 0]] * [1, -1, 1],
        np.array([1.0, 2, 3]),
    )
    moved, new = reoriented(voxels, geometry, orientation)
    assert new.axes == orientation

    def places(array: np.ndarray, where: Geometry) -> dict[float, tuple[float, ...]]:
        return {
            float(array[index]): tuple(
                np.round(where.origin + where.direction @ (where.spacing * index), 6)
            )
            for index in np.ndindex(array.shape)
        }

    assert places(moved, new) == places(voxels, geometry)


GRIDS = {
    "axis-aligned": (np.eye(3), (1.5, 2.0, 5.0), (26, 20, 12)),
    "flipped": (np.diag([-1.0, -1.0, 1.0]), (1.5, 2.0, 5.0), (26, 20, 12)),
    "sagittal": (np.eye(3)[:, [1, 2, 0]], (2.0, 5.0, 1.5), (20, 12, 26)),
    "finer": (np.eye(3), (0.75, 1.0, 2.5), (52, 40, 24)),
    "oblique": (rotation(12, -7, 15), (1.0, 1.0, 2.5), (60, 60, 40)),
}


@pytest.mark.parametrize("form", [".nii.gz", ".nrrd", ".mha", "series", "multi-frame"])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_same_anatomy_gives_the_same_tensor(tmp_path: Path, grid: str, form: str) -> None:
    preprocess = VolumePreprocess(
        spacing=[5.0, 2.0, 1.5], size=[12, 20, 26], windows=[[-1000, 1000]]
    )
    anatomy = sitk.Cast(
        sitk.DiscreteGaussian(phantom(), 9.0), sitk.sitkInt16
    )  # 3 mm: what a scanner resolves
    sitk.WriteImage(anatomy, str(tmp_path / "truth.nii"))
    truth = load_pixels(tmp_path / "truth.nii", preprocess)
    image = on_grid(anatomy, *GRIDS[grid])
    if form == "series":
        path = tmp_path / "ct"
        write_series(path, image)
    elif form == "multi-frame":
        path = write_multi_frame(tmp_path / "ct.dcm", image)
    else:
        path = tmp_path / f"ct{form}"
        sitk.WriteImage(image, str(path))
    pixels = load_pixels(path, preprocess)
    assert pixels.shape == truth.shape == (1, 12, 20, 26)
    error = np.abs(pixels - truth)
    if grid in ("axis-aligned", "flipped", "sagittal"):
        assert (
            error.max() < 2.1 / 2000
        )  # one HU from the rounding of the test's own grid, one from the DICOM slope
    else:
        # Measured: 0.0066 and 0.043 (finer grid, there and back), 0.0047 and 0.039 (oblique). A
        # shift of half a voxel along any axis gives at least 0.0106 and 0.08, and a mirrored body
        # 0.16 at the bone.
        assert error.mean() < 0.008
        assert error.max() < 0.06
    assert np.abs(pixels - truth[..., ::-1]).max() > 0.1
    bone = np.unravel_index(
        pixels[0].argmax(), pixels[0].shape
    )  # 700 HU, at the patient's left only
    assert bone[2] > 15


REAL = Path(__file__).parents[2] / "examples" / "quickstart" / "data"
STORED = {
    "flipped.nii.gz": (np.diag([-1.0, -1.0, 1.0]), (4.5, 4.5, 5.0), (0, 1, 2)),
    "sagittal.nrrd": (np.eye(3)[:, [1, 2, 0]], (4.5, 5.0, 4.5), (1, 2, 0)),
    "finer.mha": (np.eye(3), (3.0, 3.0, 4.0), (0, 1, 2)),
    "oblique-series": (rotation(12, -7, 15), (4.0, 4.0, 4.0), (0, 1, 2)),
    "upside-down-series": (np.diag([1.0, -1.0, -1.0]), (4.5, 4.5, 5.0), (0, 1, 2)),
}
"""Name, direction, spacing, and which axis of the body each axis of the file follows."""
MEAN_ERROR, TAIL_ERROR = 0.004, 0.02
"""Measured worst, of values in 0..1: 0.0027 on average and 0.015 for one voxel in a thousand, on
the turned grid."""


@pytest.fixture(scope="module", params=["chest-ct-1", "chest-ct-2"])
def chest(request: pytest.FixtureRequest) -> tuple[sitk.Image, sitk.Image]:
    """A real chest CT and the mask of its mass, both in 4.5 x 4.5 x 5 mm; the mask is 1000 inside
    and -1000 outside."""
    ct = sitk.ReadImage(str(REAL / f"{request.param}.nii.gz"))
    mask = sitk.ReadImage(str(REAL / f"{request.param}.lesion.nii.gz"))
    lesion = sitk.Cast(mask > 0, sitk.sitkFloat32) * 2000 - 1000
    coarse = [
        sitk.BinShrink(sitk.Cast(image, sitk.sitkFloat32), [3, 3, 1]) for image in (ct, lesion)
    ]
    # Smoothed to what a grid of 5 mm can hold, or the resampling of the test itself would blur it.
    return sitk.Cast(sitk.DiscreteGaussian(coarse[0], 50.0), sitk.sitkInt16), sitk.Cast(
        coarse[1], sitk.sitkInt16
    )


@pytest.mark.parametrize("form", STORED)
def test_a_real_ct_and_its_lesion_through_every_format(
    tmp_path: Path, chest: tuple[sitk.Image, sitk.Image], form: str
) -> None:
    """The same anatomy in other formats, axes, spacing and slice order is the same tensor; the mass
    keeps its side."""
    direction, spacing, axes = STORED[form]
    whole = chest[0].GetSize()
    preprocess = VolumePreprocess(spacing=[5.0, 4.5, 4.5], size=list(whole[::-1]))
    found, truth = [], []
    for name, image in zip(("ct", "lesion"), chest, strict=True):
        sitk.WriteImage(image, str(tmp_path / f"{name}-truth.nii"))
        truth.append(load_pixels(tmp_path / f"{name}-truth.nii", preprocess)[0])
        extent = np.asarray(whole) * image.GetSpacing()
        room = 1.6 if "oblique" in form else 1.0  # the corners of a turned box
        size = [round(room * extent[axis] / step) for axis, step in zip(axes, spacing, strict=True)]
        stored = on_grid(image, direction, spacing, size)
        path = tmp_path / f"{name}-{form}"
        if form.endswith("series"):
            write_series(path, stored)
        else:
            sitk.WriteImage(stored, str(path), True)
        found.append(load_pixels(path, preprocess)[0])
    inside = (slice(2, -2),) * 3  # beyond the outer faces the test's own grid has nothing
    error = np.abs(found[0] - truth[0])[inside]
    mirrored = np.abs(found[0] - truth[0][..., ::-1])[inside]
    assert error.mean() < MEAN_ERROR
    assert np.quantile(error, 0.999) < TAIL_ERROR
    assert mirrored.mean() > 4 * MEAN_ERROR
    centres = [
        [float((np.indices(a.shape)[axis] * a).sum() / a.sum()) for axis in range(3)]
        for a in (found[1], truth[1])
    ]
    np.testing.assert_allclose(*centres, atol=0.5)

    # Against the patient: in SPL slices grow to the head, rows to the back, columns to the left.
    lesion = chest[1]
    z, y, x = (axis.mean() for axis in np.nonzero(sitk.GetArrayFromImage(lesion) > 0))
    place = np.asarray(lesion.TransformContinuousIndexToPhysicalPoint((x, y, z)))
    middle = np.asarray(
        lesion.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in whole])
    )
    towards = (np.asarray(centres[0]) - (np.asarray(whole[::-1]) - 1) / 2)[::-1] * (
        4.5,
        4.5,
        5.0,
    )  # left, back, head in mm
    np.testing.assert_allclose(towards, place - middle, atol=3.0)
    assert (
        abs(towards[0]) > 20
    )  # the mass is clearly on one side, so this test would see it change sides


def test_a_compressed_volume_is_the_uncompressed_one(tmp_path: Path) -> None:
    """RLE: as a series, and as one file of frames."""
    write_series(tmp_path / "raw", phantom())
    plain = read_volume(tmp_path / "raw")

    def compress(dataset: Dataset, _: int) -> None:
        dataset.compress(RLELossless)

    write_series(tmp_path / "rle", phantom(), change=compress)
    frames = write_multi_frame(
        tmp_path / "frames.dcm", phantom(), order=[3, 0, 1, 2, 11, 10, 9, 8, 7, 6, 5, 4]
    )
    dataset = pydicom.dcmread(frames)
    dataset.compress(RLELossless)
    dataset.save_as(tmp_path / "frames-rle.dcm", enforce_file_format=True)
    for name in ("rle", "frames-rle.dcm"):
        volume = read_volume(tmp_path / name)
        np.testing.assert_array_equal(volume.voxels, plain.voxels)
        assert volume.unit == "HU"
        assert plain.geometry is not None
        assert_same_place(volume, plain.geometry)


def test_a_packed_volume_may_have_members_and_be_nearly_empty(tmp_path: Path) -> None:
    """Members as bgzip writes them, zeros behind them, and pieces that unpack to a thousand times
    their size."""
    voxels = np.zeros((24, 1024, 700), np.int16)
    voxels[3, 5, 7] = 1234
    nib = tmp_path / "plain.nii"
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(nib))
    content = nib.read_bytes()
    packed = tmp_path / "members.nii.gz"
    packed.write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]) + bytes(300))
    assert np.array_equal(read_volume(packed).voxels, voxels)
    packed.write_bytes(packed.read_bytes()[:-310])
    with pytest.raises(MediaError, match="truncated or damaged"):
        read_volume(packed)
