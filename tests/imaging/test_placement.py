"""Masks and points survive preparation and the way back, in every geometry that preprocessing can
make."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medm.errors import MediaError
from medm.imaging import Augment, ImagePreprocess, VolumePreprocess, prepare
from medm.imaging.augment import augment, augment_prepared
from medm.imaging.decoded_image import DecodedImage
from medm.imaging.geometry import Geometry
from medm.imaging.images import prepare_image
from medm.imaging.label_maps import LabelMap, check_geometry, read_label_map, write_label_map
from medm.imaging.nifti import write_nifti
from medm.imaging.placement import Placement, Prepared
from medm.imaging.transforms import prepare_volume
from medm.imaging.volumes import Volume, read_volume
from tests.imaging.tiny import on_grid, phantom, write_series

few = settings(max_examples=25, deadline=None, derandomize=True)

ORIENTATIONS = [
    "".join(letters)
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for letters in itertools.product(*axes)
]


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * (first & second).sum() / max(first.sum() + second.sum(), 1)


def body(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """An ellipsoid near the middle, two thirds of each side wide: touches no face, and is unlike
    its mirror image."""
    sides, axes = np.asarray(shape), (slice(None), *[None] * len(shape))
    center, radius = sides * rng.uniform(0.44, 0.56, len(shape)), sides * 0.33
    places = (np.indices(shape) + 0.5 - center[axes]) / radius[axes]
    inside: np.ndarray = (places**2).sum(axis=0) < 1
    inside[tuple(slice(0, side // 2) for side in shape)] = False
    return inside


def rotation(angles: tuple[float, float, float]) -> np.ndarray:
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        turn, (i, j) = np.eye(3), [other for other in range(3) if other != axis]
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def grid(
    orientation: str, spacing: tuple[float, float, float], angles: tuple[float, float, float]
) -> Geometry:
    """A grid whose axes follow the letters, turned by angles in radians."""
    direction = np.zeros((3, 3))
    for column, letter in enumerate(orientation):
        axis, sign = {
            "L": (0, 1),
            "R": (0, -1),
            "P": (1, 1),
            "A": (1, -1),
            "S": (2, 1),
            "I": (2, -1),
        }[letter]
        direction[axis, column] = sign
    return Geometry(
        np.asarray(spacing), rotation(angles) @ direction, np.array([-30.0, 12.5, 700.0])
    )


def volume(mask: np.ndarray, geometry: Geometry | None) -> Volume:
    return Volume(np.where(mask, 500, -900).astype(np.int16), "v", geometry=geometry)


def shown(prepared: Prepared) -> np.ndarray:
    """The mask in the prepared pixels of `volume` and of images that are white where the mask
    is."""
    return prepared.pixels[0] > 0.5


PLAIN: dict[str, Any] = {"windows": [[-900, 500]], "size": None}


@pytest.mark.parametrize("wanted", ["SPL", "RAS", "IAR"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_reorientation_loses_nothing(orientation: str, wanted: str) -> None:
    """All 48 orientations: a mask of random voxels is in the pixels, and back in its own grid, to
    the voxel."""
    mask = np.random.default_rng(0).random((3, 4, 5)) > 0.5
    prepared = prepare_volume(
        VolumePreprocess(**PLAIN, orientation=wanted),
        volume(mask, grid(orientation, (1, 2, 3), (0, 0, 0))),
    )
    moved = prepared.placement.to_prepared(mask)
    np.testing.assert_array_equal(moved, shown(prepared))
    assert moved.dtype == bool
    np.testing.assert_array_equal(prepared.placement.to_source(moved), mask)


@few
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(3, 4, 5), (2, 6, 3)]),
    st.sampled_from([1, 2, 3, 4]),
)
def test_integer_upscaling_and_padding_lose_nothing(
    seed: int, shape: tuple[int, int, int], factor: int
) -> None:
    labels = np.random.default_rng(seed).integers(0, 9, shape).astype(np.uint8)
    placement = Placement.of_source(shape).resized([side * factor for side in shape])
    upscaled = placement.to_prepared(labels)
    np.testing.assert_array_equal(upscaled, np.kron(labels, np.ones((factor,) * 3, np.uint8)))
    np.testing.assert_array_equal(placement.to_source(upscaled), labels)
    padded = placement.boxed([-1, -2, -3], [side + 6 for side in placement.shape])
    inside = padded.to_prepared(labels, fill=77)
    assert (inside == 77).sum() == inside.size - upscaled.size
    np.testing.assert_array_equal(padded.to_source(inside), labels)


ANGLES = st.tuples(*[st.sampled_from([-0.5, -0.2, 0.0, 0.01, 0.3])] * 3)
VOLUMES: list[dict[str, Any]] = [
    {"size": None},
    {"size": [14, 18, 22]},
    {"size": [40, 44, 48]},
    {"size": None, "spacing": [1.0, 1.0, 1.0]},
    {"size": [30, 34, 38], "spacing": [1.5, 1.2, 1.0]},
    {"size": None, "spacing": [2.0, 2.0, 2.0], "interpolation": "area"},
    {"size": [20, 20, 20], "interpolation": "area"},
    {"size": [20, 20, 20], "interpolation": "nearest"},
    {"size": None, "crop_foreground": 0.5},
    {"size": [16, 16, 16], "crop_foreground": 0.5},
    {"size": [24, 24, 24], "spacing": [1.0, 1.0, 1.0], "crop_foreground": 0.5},
    {"size": [20, 20, 20], "oblique": "keep"},
    {"size": [20, 20, 20], "orientation": None},
]


@few
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(ORIENTATIONS),
    st.sampled_from([(1.0, 1.0, 1.0), (2.5, 1.0, 0.8), (0.7, 1.1, 1.9)]),
    ANGLES,
    st.sampled_from(VOLUMES),
)
def test_masks_survive_preparation_of_volumes(
    seed: int,
    orientation: str,
    spacing: tuple[float, float, float],
    angles: tuple[float, float, float],
    fields: dict[str, Any],
) -> None:
    """Oblique and anisotropic grids. The mask agrees with the pixels, which SimpleITK and PyTorch
    resample."""
    geometry = grid(orientation, spacing, angles)
    mask = body((20, 26, 24), np.random.default_rng(seed))
    preprocess = VolumePreprocess(**{**PLAIN, **fields})
    prepared = prepare_volume(preprocess, volume(mask, geometry))
    moved = prepared.placement.to_prepared(mask)
    assert moved.shape == prepared.pixels.shape[1:]
    least = 0.82 if moved.sum() < mask.sum() else 0.9  # a coarser grid keeps less
    assert dice(moved, shown(prepared)) > 0.85
    back = prepared.placement.to_source(moved)
    assert back.shape == mask.shape
    assert dice(back, mask) > least
    soft = prepared.placement.to_source(prepared.pixels[0], interpolation="linear")
    assert dice(soft > 0.5, mask) > least


IMAGES = list(itertools.product(("squash", "crop", "pad"), ([24, 24], [60, 40], [33, 90])))


@few
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(40, 30), (31, 61), (24, 24), (37, 90)]),
    st.sampled_from(IMAGES),
)
def test_masks_survive_preparation_of_images(
    seed: int, shape: tuple[int, int], how: tuple[str, list[int]]
) -> None:
    fit, size = how
    mask = body(shape, np.random.default_rng(seed))
    plain = {"mean": [0.0], "std": [1.0], "channels": 1, "interpolation": "bilinear"}
    image = DecodedImage(mask.astype(np.uint8) * 255, "i")
    prepared = prepare_image(ImagePreprocess(fit=fit, size=size, **plain), image)  # type: ignore[arg-type]
    moved = prepared.placement.to_prepared(mask)
    assert moved.shape == tuple(size)
    if shown(prepared).sum() > 30:
        assert dice(moved, shown(prepared)) > 0.85
    back = prepared.placement.to_source(moved)
    assert back.shape == shape
    visible = prepared.placement.to_source(np.ones(size, bool))
    assert not (back & ~visible).any()
    if (mask & visible).sum() > 60:
        assert dice(back, mask & visible) > 0.8


@few
@given(st.integers(0, 2**32 - 1), st.sampled_from(ORIENTATIONS), st.sampled_from(VOLUMES))
def test_points_return_to_where_they_were(
    seed: int, orientation: str, fields: dict[str, Any]
) -> None:
    """And a bright voxel stands where its center is sent, within half a voxel."""
    rng = np.random.default_rng(seed)
    geometry = grid(orientation, (2.0, 1.0, 0.8), tuple(rng.uniform(-0.5, 0.5, 3)))
    mask = body((20, 26, 24), rng)
    prepared = prepare_volume(VolumePreprocess(**{**PLAIN, **fields}), volume(mask, geometry))
    points = rng.uniform(0, 20, (7, 3))
    there = prepared.placement.points_to_prepared(points)
    np.testing.assert_allclose(prepared.placement.points_to_source(there), points, atol=1e-9)
    center = prepared.placement.points_to_prepared(np.argwhere(mask).mean(axis=0)[None])
    found = np.argwhere(shown(prepared)).mean(axis=0)
    assert np.abs(center - found).max() < 0.5


def test_by_hand() -> None:
    """A volume of 4 x 2 voxels in depth and columns: padded, cropped, shrunk and turned around."""
    labels = np.arange(8, dtype=np.uint8).reshape(4, 1, 2)
    source = Placement.of_source(labels.shape)
    padded = source.boxed([-1, 0, 0], [6, 1, 2])
    assert padded.to_prepared(labels, fill=9).ravel().tolist() == [
        9,
        9,
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        9,
        9,
    ]
    cropped = source.boxed([1, 0, 1], [2, 1, 1])
    assert cropped.to_prepared(labels).ravel().tolist() == [3, 5]
    assert cropped.to_source(np.full((2, 1, 1), 7)).ravel().tolist() == [0, 0, 0, 7, 0, 7, 0, 0]
    # Half as many slices: the centers of the results lie between two slices, of which the later one
    # is taken.
    shrunk = source.resized([2, 1, 2])
    assert shrunk.to_prepared(labels).ravel().tolist() == [2, 3, 6, 7]
    assert shrunk.points_to_source(np.array([[0, 0, 0], [1, 0, 1]])).tolist() == [
        [0.5, 0, 0],
        [2.5, 0, 1],
    ]
    soft = shrunk.to_source(np.array([0.0, 1.0]).repeat(2).reshape(2, 1, 2), interpolation="linear")
    assert soft[:, 0, 0].tolist() == [0, 0.25, 0.75, 1]
    turned = source.permuted([2, 0, 1]).flipped(1)  # axes (columns, depth from the end, rows)
    assert turned.to_prepared(labels).ravel().tolist() == [6, 4, 2, 0, 7, 5, 3, 1]
    assert turned.points_to_prepared(np.array([[3, 0, 1]])).tolist() == [[1, 0, 0]]


@few
@given(st.integers(0, 2**32 - 1))
def test_soft_maps_of_parallel_and_turned_grids_agree(seed: int) -> None:
    """The two ways of interpolation give one result where a grid is turned by less than a ten
    thousandth."""
    rng = np.random.default_rng(seed)
    values = rng.random((2, 4, 5, 6)).astype(np.float32)
    straight = (
        Placement.of_source((7, 8, 9)).permuted([2, 0, 1]).flipped(1).boxed([1, -2, 1], [7, 9, 6])
    )
    straight = straight.resized((4, 5, 6))
    turned = straight.sampled(rotation((1e-5, 1e-5, 1e-5)), np.zeros(3), (4, 5, 6))
    one, other = (
        each.to_source(values, interpolation="linear", fill=-9) for each in (straight, turned)
    )
    inside = (one > -1) & (other > -1)
    assert inside.mean() > 0.2
    np.testing.assert_allclose(one[inside], other[inside], atol=1e-3)
    assert ((one < -1) == (other < -1)).mean() > 0.85


def test_letterbox_by_hand() -> None:
    """2 x 4 pixels to 4 x 4: a row of padding above and below."""
    pixels = np.arange(8, dtype=np.uint8).reshape(2, 4) * 30
    preprocess = ImagePreprocess(fit="pad", size=[4, 4], channels=1, mean=[0.0], std=[1.0])
    placement = prepare_image(preprocess, DecodedImage(pixels, "i")).placement
    assert placement == Placement((2, 4), (4, 4), ((1, 0, -1), (0, 1, 0)))
    assert placement.points_to_prepared(np.array([[0, 3]])).tolist() == [[1, 3]]


def test_several_masks_at_once_and_other_sizes_are_refused() -> None:
    placement = Placement.of_source((2, 3)).resized((4, 6))
    masks = np.random.default_rng(0).random((5, 2, 3)) > 0.5
    there = placement.to_prepared(masks)
    assert there.shape == (5, 4, 6)
    np.testing.assert_array_equal(there[3], placement.to_prepared(masks[3]))
    turned = placement.sampled(rotation((0.3, 0, 0))[1:, 1:], np.zeros(2), (5, 5))
    np.testing.assert_array_equal(turned.to_prepared(masks)[3], turned.to_prepared(masks[3]))
    with pytest.raises(MediaError, match="a mask of 4 x 6 does not fit the file: expected 2 x 3"):
        placement.to_prepared(there[0])
    with pytest.raises(
        MediaError, match="a mask of 5 x 2 x 3 does not fit the prepared grid: expected 4 x 6"
    ):
        placement.to_source(masks)


@few
@given(st.sampled_from(ORIENTATIONS), ANGLES, st.sampled_from(VOLUMES))
def test_a_placement_is_plain_json_and_equal_after_it(
    orientation: str, angles: tuple[float, float, float], fields: dict[str, Any]
) -> None:
    geometry = grid(orientation, (2.0, 1.0, 0.8), angles)
    mask = body((20, 26, 24), np.random.default_rng(0))
    placement = prepare_volume(
        VolumePreprocess(**{**PLAIN, **fields}), volume(mask, geometry)
    ).placement
    again = Placement.from_dict(json.loads(json.dumps(placement.to_dict())))
    assert again == placement
    assert hash(again) == hash(placement)
    assert again.geometry is not None
    np.testing.assert_allclose(again.geometry.steps, geometry.steps, atol=1e-12)
    np.testing.assert_array_equal(again.geometry.origin, geometry.origin)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shape": [4]}, "two grids of as many axes"),
        ({"shape": [0, 4]}, "two grids of as many axes"),
        ({"matrix": [[1, 0, 0]]}, "matrix: expected 2 rows of 3 numbers"),
        ({"matrix": [[1, 0, 0], [1, 0, 0]]}, "can be inverted"),
        ({"matrix": [[1, 0, 0], [0, 1, float("nan")]]}, "finite numbers"),
        ({"source_shape": "big"}, "source_shape"),
        ({"affine": [[1, 0, 0, 0]] * 3}, "affine: expected 2 rows"),
    ],
)
def test_what_is_no_placement_is_refused(change: dict[str, object], reason: str) -> None:
    good = Placement.of_source((2, 3)).to_dict()
    with pytest.raises(ValueError, match=reason):
        Placement.from_dict({**good, **change})


# Files


@pytest.fixture
def oblique(tmp_path: Path) -> Path:
    """A CT in slices of 5 mm, tilted by eleven degrees."""
    path = tmp_path / "ct.nii.gz"
    sitk.WriteImage(
        on_grid(phantom(), rotation((0.2, 0.1, 0)), (1.5, 2.0, 5.0), (26, 20, 12)), str(path)
    )
    return path


def test_a_label_map_is_written_on_the_grid_of_its_file(oblique: Path, tmp_path: Path) -> None:
    """SimpleITK, another reader, finds the same size, spacing, origin and direction in both
    files."""
    prepared = prepare(oblique, VolumePreprocess(windows=[[-1000, 1000]], size=[24, 40, 52]))
    labels = np.where(prepared.pixels[0] > 0.6, 3, 0)
    write_label_map(
        tmp_path / "labels.nii.gz", prepared.placement.to_source(labels), prepared.placement
    )
    image, written = sitk.ReadImage(str(oblique)), sitk.ReadImage(str(tmp_path / "labels.nii.gz"))
    assert written.GetSize() == image.GetSize()
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(written, get)(), getattr(image, get)(), atol=1e-5)
    bone = sitk.GetArrayFromImage(image) > 200
    assert dice(sitk.GetArrayFromImage(written) == 3, bone) > 0.7
    read = read_label_map(tmp_path / "labels.nii.gz", prepared.placement)
    assert read.labels.dtype == np.uint8
    np.testing.assert_array_equal(read.labels, sitk.GetArrayFromImage(written))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_written_label_map_is_read_on_the_same_grid(orientation: str, tmp_path: Path) -> None:
    """Oblique, in all 48 orientations, half of them left-handed: by medm, and by SimpleITK."""
    placement = Placement.of_source((3, 4, 5), grid(orientation, (5, 2, 1.5), (0.2, -0.1, 0.3)))
    labels = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    write_label_map(tmp_path / "m.nii", labels, placement)
    np.testing.assert_array_equal(read_label_map(tmp_path / "m.nii", placement).labels, labels)
    own, other = placement.geometry, sitk.ReadImage(str(tmp_path / "m.nii"))
    assert own is not None
    np.testing.assert_array_equal(sitk.GetArrayFromImage(other), labels)
    np.testing.assert_allclose(other.GetOrigin(), own.origin, atol=1e-4)
    corner = other.TransformIndexToPhysicalPoint((4, 3, 2))
    np.testing.assert_allclose(corner, own.steps @ [2, 3, 4] + own.origin, atol=1e-3)


def test_a_label_map_of_a_file_without_direction_has_none(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(24).reshape(2, 3, 4))
    placement = prepare(
        tmp_path / "a.npy", VolumePreprocess(scale="minmax", size=[4, 4, 4])
    ).placement
    write_label_map(tmp_path / "m.nii", np.ones((2, 3, 4), bool), placement)
    found = read_volume(tmp_path / "m.nii")
    assert found.geometry is None
    assert found.voxels.tolist() == np.ones((2, 3, 4), int).tolist()


def test_a_dicom_series_and_its_label_map(tmp_path: Path) -> None:
    """The grid is the one that the reader builds, slices sorted by position, whatever the names of
    the files."""
    write_series(tmp_path / "ct", phantom())
    prepared = prepare(tmp_path / "ct", VolumePreprocess(windows=[[-1000, 1000]], size=None))
    bone = read_volume(tmp_path / "ct").voxels > 200
    np.testing.assert_array_equal(prepared.placement.to_prepared(bone), prepared.pixels[0] > 0.6)
    write_label_map(tmp_path / "m.nii.gz", bone, prepared.placement)
    np.testing.assert_array_equal(
        read_label_map(tmp_path / "m.nii.gz", prepared.placement).labels, bone
    )


@pytest.mark.parametrize(
    ("geometry", "shape", "reason"),
    [
        (
            grid("SPL", (5, 2, 1.5), (0, 0, 0)),
            (4, 5, 6),
            "a label map of 4 x 5 x 6 voxels for an image of 4 x 5 x 7",
        ),
        (
            grid("SPL", (5, 2, 1), (0, 0, 0)),
            (4, 5, 7),
            "voxels of 5, 2, 1 mm .* voxels of 5, 2, 1.5 mm",
        ),
        (grid("IPL", (5, 2, 1.5), (0, 0, 0)), (4, 5, 7), "with axes IPL, .* with axes SPL"),
        (
            grid("SPL", (5, 2, 1.5), (0.1, 0, 0)),
            (4, 5, 7),
            r"up to .* mm apart, expected at most 0\.15",
        ),
    ],
)
def test_a_label_map_of_another_grid_is_refused(
    geometry: Geometry, shape: tuple[int, ...], reason: str
) -> None:
    placement = Placement.of_source((4, 5, 7), grid("SPL", (5, 2, 1.5), (0, 0, 0)))
    with pytest.raises(MediaError, match=f"m: .*{reason}"):
        check_geometry(LabelMap(np.zeros(shape, np.uint8), "m", geometry), placement)
    close = grid("SPL", (5, 2, 1.5), (1e-4, 0, 0))
    check_geometry(LabelMap(np.zeros((4, 5, 7), np.uint8), "m", close), placement)


def test_what_is_no_label_map_is_refused(tmp_path: Path) -> None:
    placement = Placement.of_source((2, 3, 4))
    for labels in (np.full((2, 3, 4), -1), np.full((2, 3, 4), 0.5), np.full((2, 3, 4), 2**33)):
        with pytest.raises(MediaError, match=r"are no labels; expected whole numbers from 0 on"):
            write_label_map(tmp_path / "m.nii", labels, placement)
    with pytest.raises(MediaError, match=r"ends with \.nii"):
        write_label_map(tmp_path / "m.png", np.zeros((2, 3, 4)), placement)
    with pytest.raises(MediaError, match="expected a volume"):
        write_label_map(tmp_path / "m.nii", np.zeros((2, 3)), Placement.of_source((2, 3)))
    with pytest.raises(MediaError, match="less than 32768"):
        write_nifti(tmp_path / "m.nii", np.zeros((1, 1, 40_000), np.uint8), None)
    assert list(tmp_path.iterdir()) == []


def test_a_label_map_of_an_image(tmp_path: Path) -> None:
    placement = Placement.of_source((3, 4))
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(labels).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_label_map(tmp_path / "m.png", placement).labels, labels)
    Image.fromarray(np.stack([labels] * 3, axis=-1)).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(read_label_map(tmp_path / "gray.png", placement).labels, labels)
    Image.fromarray(np.stack([labels, labels, labels + 1], axis=-1)).save(tmp_path / "color.png")
    with pytest.raises(MediaError, match="label map in color"):
        read_label_map(tmp_path / "color.png", placement)


# Augmentation


@few
@given(st.integers(0, 2**32 - 1), st.sampled_from([(20, 28), (12, 20, 24)]), st.booleans())
def test_masks_follow_augmentation(seed: int, shape: tuple[int, ...], mirror: bool) -> None:
    """The same random numbers give the same pixels as without a placement, and the mask moves with
    them."""
    options = Augment.model_construct(
        rotate=20.0, scale=0.2, shift=0.1, mirror=mirror, brightness=0.1, contrast=0.1, gamma=0.1
    )
    rng = np.random.default_rng(seed)
    mask = body(shape, rng)
    pixels = np.stack([mask, rng.random(shape)]).astype(np.float32)
    source = Prepared(pixels, Placement.of_source(shape))
    moved = augment_prepared(options, source, np.random.default_rng(seed))
    np.testing.assert_array_equal(
        moved.pixels, augment(options, pixels, np.random.default_rng(seed))
    )
    followed = moved.placement.to_prepared(mask)
    middle = (moved.pixels[0].max() + moved.pixels[0].min()) / 2
    spatial = options.model_copy(update={"brightness": 0.0, "contrast": 0.0, "gamma": 0.0})
    warped = augment(spatial, pixels, np.random.default_rng(seed))[0] > 0.5
    assert middle > 0
    assert dice(followed, warped) > 0.9
    assert dice(moved.placement.to_source(followed), mask) > 0.85


def test_augmentation_of_intensities_keeps_the_placement() -> None:
    source = Prepared(
        np.random.default_rng(0).random((1, 4, 5)).astype(np.float32), Placement.of_source((4, 5))
    )
    moved = augment_prepared(Augment(brightness=0.2), source, np.random.default_rng(0))
    assert moved.placement is source.placement
    assert (moved.pixels != source.pixels).any()
