"""Masks become files that other readers find on the grid of their image or volume."""

from __future__ import annotations

import io
import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medm.errors import MediaError
from medm.imaging import ImagePreprocess, VolumePreprocess, prepare, rle
from medm.imaging.geometry import Geometry
from medm.imaging.label_maps import read_label_map
from medm.imaging.mask_files import read_mask
from medm.imaging.mask_output import (
    WrittenLabels,
    mask_file_name,
    write_labels,
    write_mask,
    write_masks,
)
from medm.imaging.placement import Placement
from medm.types import MaskSource
from tests.imaging.tiny import on_grid, phantom

PLANE = Placement.of_source((3, 4))
SPACE = Placement.of_source(
    (2, 3, 4), Geometry(np.array([5.0, 2.0, 1.5]), np.eye(3)[:, ::-1], np.array([1.0, 2.0, 3.0]))
)


def a_mask(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) > 0.5


def test_the_mask_of_an_image_is_an_8_bit_png(tmp_path: Path) -> None:
    mask = a_mask((3, 4))
    write_mask(tmp_path / "m.png", mask, PLANE)
    with Image.open(tmp_path / "m.png") as image:
        assert (image.mode, image.size, image.format) == ("L", (4, 3), "PNG")
        np.testing.assert_array_equal(np.asarray(image), mask * 255)
    first = (tmp_path / "m.png").read_bytes()
    write_mask(tmp_path / "m.png", mask.astype(np.float32), PLANE)
    assert (tmp_path / "m.png").read_bytes() == first


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_the_mask_of_a_volume_is_nifti_of_bytes(suffix: str, tmp_path: Path) -> None:
    mask = a_mask((2, 3, 4))
    write_mask(tmp_path / f"m{suffix}", mask, SPACE)
    image = sitk.ReadImage(str(tmp_path / f"m{suffix}"))
    assert image.GetPixelIDValue() == sitk.sitkUInt8
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), mask)
    assert image.GetSpacing() == (1.5, 2.0, 5.0)
    assert image.GetOrigin() == (1.0, 2.0, 3.0)


def test_an_empty_mask_is_a_file_of_zeros(tmp_path: Path) -> None:
    write_mask(tmp_path / "m.nii.gz", np.zeros((2, 3, 4), bool), SPACE)
    assert not sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "m.nii.gz"))).any()


@pytest.mark.parametrize(
    ("mask", "placement", "name", "reason"),
    [
        (np.zeros((4, 3)), PLANE, "m.png", "a mask of 4 x 3 for a file of 3 x 4"),
        (np.zeros((1, 3, 4)), PLANE, "m.png", "a mask of 1 x 3 x 4 for a file of 3 x 4"),
        (np.full((3, 4), 0.5), PLANE, "m.png", r"values 0\.5\.\.0\.5 are no mask"),
        (np.full((3, 4), 255, np.uint8), PLANE, "m.png", r"255\.\.255 are no mask"),
        (np.full((3, 4), np.nan), PLANE, "m.png", "are no mask"),
        (np.zeros((3, 4), bool), PLANE, "m.nii.gz", r"a mask of an image; expected .* \.png"),
        (np.zeros((2, 3, 4), bool), SPACE, "m.png", r"of a volume; expected .* \.nii\.gz or \.nii"),
    ],
)
def test_what_is_no_mask_is_refused(
    mask: np.ndarray, placement: Placement, name: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(MediaError, match=reason):
        write_mask(tmp_path / name, mask, placement)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("placement", "name"), [(PLANE, "m.png"), (SPACE, "m.nii.gz")])
def test_an_error_leaves_the_old_file(
    placement: Placement, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    write_mask(path, np.ones(placement.source_shape, bool), placement)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_mask(path, np.zeros(placement.source_shape, bool), placement)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == [name]


def test_one_file_for_each_mask(tmp_path: Path) -> None:
    masks = [("Left lung", a_mask((3, 4), 1)), ("nodule", a_mask((3, 4), 2)),
             ("nodule", a_mask((3, 4), 3))]  # fmt: skip
    paths = write_masks(tmp_path / "new", masks, PLANE, prefix="scan-")
    assert [path.name for path in paths] == [
        "scan-000-left-lung.png",
        "scan-001-nodule.png",
        "scan-002-nodule.png",
    ]
    for path, (_, mask) in zip(paths, masks, strict=True):
        np.testing.assert_array_equal(read_label_map(path, PLANE).labels > 0, mask)
    assert write_masks(tmp_path / "none", [], SPACE) == []


@pytest.mark.parametrize(
    ("phrase", "name"),
    [
        ("Left lung, lower lobe", "007-left-lung-lower-lobe.nii.gz"),
        ("../../etc/passwd", "007-etc-passwd.nii.gz"),
        ("a\0b\n", "007-a-b.nii.gz"),
        ("肺结节", "007.nii.gz"),
        ("", "007.nii.gz"),
        ("x" * 300, f"007-{'x' * 40}.nii.gz"),
    ],
)
def test_a_phrase_is_a_part_of_a_name_and_never_a_path(phrase: str, name: str) -> None:
    assert mask_file_name(7, phrase, SPACE) == name


@pytest.mark.parametrize(("placement", "name"), [(PLANE, "all.png"), (SPACE, "all.nii.gz")])
def test_a_label_map_of_all_masks_by_hand(
    placement: Placement, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The later of two masks takes the voxel that both have, and the loss is counted."""
    liver, lesion, nothing = np.zeros((3, *placement.source_shape), bool)
    liver[..., 0, :3] = lesion[..., 0, 2:] = True
    with caplog.at_level(logging.WARNING):
        written = write_labels(
            tmp_path / name, [("Leber", liver), ("病变", lesion), ("none", nothing)], placement
        )
    overlap = int((liver & lesion).sum())
    assert written == WrittenLabels({1: "Leber", 2: "病变", 3: "none"}, overlap)
    assert f"{overlap} voxels belong to several masks" in caplog.text
    labels = read_label_map(tmp_path / name, placement).labels
    np.testing.assert_array_equal(labels, np.where(lesion, 2, np.where(liver, 1, 0)))
    about = json.loads((tmp_path / "all.json").read_text("utf-8"))
    assert about == {"labels": {"1": "Leber", "2": "病变", "3": "none"}, "overlap": overlap}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json", name]


def test_a_label_map_of_more_masks_than_a_byte_has_numbers(tmp_path: Path) -> None:
    masks = [(str(number), np.zeros((2, 3, 4), bool)) for number in range(300)]
    masks[299][1][1, 2, 3] = True
    write_labels(tmp_path / "all.nii", masks, SPACE)
    assert read_label_map(tmp_path / "all.nii", SPACE).labels[1, 2, 3] == 300
    flat = [(phrase, np.zeros((3, 4), bool)) for phrase, _ in masks]
    for few in ([], flat):
        with pytest.raises(MediaError, match=rf"expected 1 to 255 masks .*, found {len(few)}"):
            write_labels(tmp_path / "all.png", few, PLANE)


@pytest.mark.parametrize(("placement", "suffix"), [(PLANE, ".png"), (SPACE, ".nii.gz")])
def test_a_written_mask_is_a_mask_of_a_record(
    placement: Placement, suffix: str, tmp_path: Path
) -> None:
    """Predictions can be trained on: `read_mask` gives back what was written, by each way."""
    mask = a_mask(placement.source_shape)
    write_mask(tmp_path / f"m{suffix}", mask, placement)
    write_labels(tmp_path / f"all{suffix}", [("other", ~mask), ("this", mask)], placement)
    for source in (
        MaskSource(token=0, media=0, field="masks.0", path=f"m{suffix}"),
        MaskSource(token=0, media=0, field="masks.0", path=f"all{suffix}", value=2),
        MaskSource(token=0, media=0, field="masks.0", rle=rle.encode(mask)),
    ):
        np.testing.assert_array_equal(read_mask(source, tmp_path, placement), mask)


# Files of every kind: the mask returns through preparation to the grid of its file.


def drawn(shape: tuple[int, int]) -> np.ndarray:
    """An ellipse without symmetry of the image, bright on dark."""
    rows, columns = np.indices(shape) + 0.5
    inside = ((rows / shape[0] - 0.45) / 0.33) ** 2 + ((columns / shape[1] - 0.55) / 0.36) ** 2 < 1
    inside[: shape[0] // 2, : shape[1] // 2] = False
    return np.asarray(inside)


def _rgb(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(np.repeat(np.where(mask, 250, 5).astype(np.uint8)[..., None], 3, -1))


def _palette(mask: np.ndarray) -> Image.Image:
    image = Image.fromarray(np.where(mask, 1, 2).astype(np.uint8), "P")
    image.putpalette([9, 9, 9, 250, 250, 250, 5, 5, 5])
    return image


def _turned(mask: np.ndarray) -> Image.Image:
    """Stored on its side; EXIF orientation 6 says so."""
    image = _rgb(mask).transpose(Image.Transpose.ROTATE_90)
    image.getexif()[274] = 6
    return image


IMAGES: dict[str, Callable[[np.ndarray], Image.Image]] = {
    "rgb.png": _rgb,
    "gray.png": lambda mask: _rgb(mask).convert("L"),
    "palette.png": _palette,
    "16 bit.png": lambda mask: Image.fromarray(np.where(mask, 60_000, 900).astype(np.uint16)),
    "16 bit.tif": lambda mask: Image.fromarray(np.where(mask, 60_000, 900).astype(np.uint16)),
    "alpha.png": lambda mask: _rgb(mask).convert("RGBA"),
    "turned.png": _turned,
}


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
@pytest.mark.parametrize("name", IMAGES)
def test_masks_of_images_of_every_kind_return(name: str, fit: str, tmp_path: Path) -> None:
    """The mask that a model would draw in the prepared pixels is a PNG in the image's own size."""
    truth = drawn((37, 61))
    image = IMAGES[name](truth)
    image.save(tmp_path / name, exif=image.getexif())
    plain = {"mean": [0.0], "std": [1.0], "channels": 1, "interpolation": "bilinear"}
    prepared = prepare(tmp_path / name, ImagePreprocess(fit=fit, size=[48, 56], **plain))  # type: ignore[arg-type]
    predicted = prepared.pixels[0] > 0.5
    soft = prepared.placement.to_source(prepared.pixels[0], interpolation="linear")
    seen = prepared.placement.to_source(np.ones((48, 56), bool))
    for back in (prepared.placement.to_source(predicted), soft > 0.5):
        write_mask(tmp_path / "m.png", back & seen, prepared.placement)
        with Image.open(tmp_path / "m.png") as written:
            assert written.size == (61, 37)
            found = np.asarray(written) == 255
        both = (found & truth & seen).sum()
        assert 2 * both / (found.sum() + (truth & seen).sum()) > 0.93
        # Only the outline may differ, by the rounding to the nearest pixel.
        assert not (found ^ (truth & seen))[_far_from_outline(truth) & seen].any()


def _far_from_outline(mask: np.ndarray) -> np.ndarray:
    """Voxels whose whole neighborhood lies on one side of the outline."""
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    inner = sitk.GetArrayFromImage(sitk.BinaryErode(image, [2] * mask.ndim))
    outer = sitk.GetArrayFromImage(sitk.BinaryDilate(image, [2] * mask.ndim))
    return np.asarray((inner == 1) | (outer == 0))


def test_the_pixels_of_a_turned_image_are_upright(tmp_path: Path) -> None:
    truth = drawn((37, 61))
    image = _turned(truth)
    image.save(tmp_path / "t.png", exif=image.getexif())
    with Image.open(tmp_path / "t.png") as stored:
        assert stored.size == (37, 61)
    placement = prepare(tmp_path / "t.png", ImagePreprocess(size=[48, 56])).placement
    assert placement.source_shape == truth.shape


few = settings(max_examples=20, deadline=None, derandomize=True)
SUFFIXES = [".nii.gz", ".nrrd", ".mha"]
VOLUMES = [
    {"size": None},
    {"size": [18, 26, 22]},
    {"size": None, "spacing": [1.5, 1.5, 1.5]},
    {"size": [30, 34, 38], "spacing": [1.5, 1.2, 1.0], "crop_foreground": 0.5},
    {"size": [20, 24, 28], "oblique": "keep"},
    {"size": [20, 24, 28], "orientation": None},
]
FLIPS = list(itertools.product((1, -1), repeat=3))


@few
@given(
    st.sampled_from(SUFFIXES),
    st.sampled_from([(0.0, 0.0, 0.0), (0.3, -0.2, 0.1), (0.0, 0.5, 0.0)]),
    st.sampled_from([(1.5, 2.0, 5.0), (1.0, 1.0, 1.0), (2.5, 0.9, 1.7)]),
    st.sampled_from(FLIPS),
    st.sampled_from(VOLUMES),
)
def test_masks_of_volumes_return_to_the_world(
    tmp_path_factory: pytest.TempPathFactory,
    suffix: str,
    angles: tuple[float, float, float],
    spacing: tuple[float, float, float],
    flips: tuple[int, int, int],
    fields: dict[str, object],
) -> None:
    """Oblique, anisotropic, flipped, cropped and padded: SimpleITK finds both files on one grid,
    and the centroid of the written mask where the structure is in mm."""
    folder = tmp_path_factory.mktemp("v")
    size = [int(26 * 1.5 / spacing[0]), int(20 * 2 / spacing[1]), int(12 * 5 / spacing[2])]
    truth = _ball(
        on_grid(phantom(), _rotation(angles) @ np.diag(flips).astype(float), spacing, size)
    )
    image = sitk.Cast(truth, sitk.sitkInt16) * 1000 - 900
    sitk.WriteImage(image, str(folder / f"v{suffix}"))
    preprocess = VolumePreprocess.model_validate({"windows": [[-900, 100]], **fields})
    prepared = prepare(folder / f"v{suffix}", preprocess)
    soft = prepared.placement.to_source(prepared.pixels[0], interpolation="linear")
    write_mask(folder / "m.nii.gz", soft > 0.5, prepared.placement)
    written = sitk.ReadImage(str(folder / "m.nii.gz"))
    assert written.GetSize() == image.GetSize()
    for index in itertools.product(*[(0, side - 1) for side in size]):
        np.testing.assert_allclose(
            written.TransformIndexToPhysicalPoint(index),
            image.TransformIndexToPhysicalPoint(index),
            atol=1e-3,
        )
    shape = sitk.LabelShapeStatisticsImageFilter()
    places = []
    for one in (written, truth):
        shape.Execute(sitk.Cast(one, sitk.sitkUInt8))
        places.append(np.asarray(shape.GetCentroid(1)))
    assert np.linalg.norm(places[0] - places[1]) < 0.5 * max(spacing)
    found, wanted = sitk.GetArrayFromImage(written) > 0, sitk.GetArrayFromImage(truth) > 0
    assert 2 * (found & wanted).sum() / (found.sum() + wanted.sum()) > 0.88


def _ball(image: sitk.Image) -> sitk.Image:
    """A ball of 11 mm beside the middle of a grid, without an axis of symmetry of the grid."""
    shape = image.GetSize()[::-1]
    steps = np.asarray(image.GetDirection()).reshape(3, 3) * np.asarray(image.GetSpacing())
    indices = np.indices(shape).reshape(3, -1)[::-1]
    world = steps @ indices + np.asarray(image.GetOrigin())[:, None]
    middle = np.asarray(
        image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()])
    )
    inside = np.linalg.norm(world - (middle + np.array([3, -2, 4]))[:, None], axis=0) < 11
    ball = sitk.GetImageFromArray(inside.reshape(shape).astype(np.uint8))
    ball.CopyInformation(image)
    return ball


def _rotation(angles: tuple[float, float, float]) -> np.ndarray:
    turn = sitk.Euler3DTransform()
    turn.SetRotation(*angles)
    return np.asarray(turn.GetMatrix()).reshape(3, 3)


def test_masks_of_images_in_memory_have_their_size(tmp_path: Path) -> None:
    stream = io.BytesIO()
    _rgb(drawn((20, 30))).save(stream, "PNG")
    prepared = prepare(io.BytesIO(stream.getvalue()), ImagePreprocess(size=[8, 8]))
    back = prepared.placement.to_source(np.ones((8, 8), bool))
    write_mask(tmp_path / "m.png", back, prepared.placement)
    with Image.open(tmp_path / "m.png") as image:
        assert image.size == (30, 20)
