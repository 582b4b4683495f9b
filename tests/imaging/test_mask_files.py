"""Masks from every form of a record, on the grid of the image; and all the way to the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image, ImageDraw
from scipy.ndimage import binary_dilation, binary_erosion

from medm.errors import MediaError
from medm.imaging import ImagePreprocess, VolumePreprocess, prepare, rle
from medm.imaging.geometry import Geometry
from medm.imaging.label_maps import write_label_map
from medm.imaging.mask_files import check_mask, read_mask
from medm.imaging.nifti import write_nifti
from medm.imaging.placement import Placement
from medm.imaging.polygons import fill_polygons
from medm.imaging.transforms import reoriented
from medm.imaging.volumes import read_volume
from medm.types import MaskSource
from tests.imaging.rasters import png, tiff, written
from tests.imaging.test_placement import ORIENTATIONS, body, dice, grid
from tests.imaging.tiny import phantom, write_series

LABELS = np.arange(12, dtype=np.uint8).reshape(3, 4)
FLAT = Placement.of_source((3, 4))


def mask_of(**fields: Any) -> MaskSource:
    return MaskSource(token=0, media=0, field="masks.0", **fields)


def read(folder: Path, placement: Placement = FLAT, **fields: Any) -> np.ndarray:
    found = read_mask(mask_of(**fields), folder, placement)
    assert found.dtype == bool
    assert found.shape == placement.source_shape
    return found


# Labels of images


def palette(labels: np.ndarray, bits: int = 8) -> Image.Image:
    image = Image.fromarray(labels, "P")
    image.putpalette([255 - value // 3 for value in range(3 * 2**bits)])
    return image


def save(folder: Path, form: str) -> str:
    name = f"m.{form.split('-')[0]}"
    path = folder / name
    if form == "npy":
        np.save(path, LABELS.astype(np.int64))
    elif form == "npy-float":
        np.save(path, LABELS.astype(np.float32))
    elif form == "png-16":
        Image.fromarray(LABELS.astype(np.uint16) * 1000).save(path)
    elif form == "png-palette":
        palette(LABELS).save(path)
    elif form == "png-palette-transparent":
        palette(LABELS).save(path, transparency=0)
    elif form == "png-palette-4":
        palette(LABELS, 4).save(path, bits=4)
    elif form == "png-gray-4":
        written(path, png(LABELS.astype(np.uint16), 0, bits=4))
    elif form == "png-rgb":
        Image.fromarray(np.stack([LABELS] * 3, axis=-1)).save(path)
    elif form == "png-rgba":
        opaque = np.full_like(LABELS, 255)
        Image.fromarray(np.stack([LABELS, LABELS, LABELS, opaque], axis=-1)).save(path)
    elif form == "png-transparent-gray":
        Image.fromarray(LABELS).save(path, transparency=0)
    else:
        Image.fromarray(LABELS).save(path)
    return name


@pytest.mark.parametrize(
    "form",
    [
        "png", "png-16", "png-palette", "png-palette-transparent", "png-palette-4", "png-gray-4",
        "png-rgb", "png-rgba", "png-transparent-gray", "tif", "bmp", "npy", "npy-float",
    ],
)  # fmt: skip
def test_the_label_of_an_image_is_the_stored_number(tmp_path: Path, form: str) -> None:
    name = save(tmp_path, form)
    factor = 1000 if form == "png-16" else 1
    np.testing.assert_array_equal(read(tmp_path, path=name, value=7 * factor), LABELS == 7)
    np.testing.assert_array_equal(read(tmp_path, path=name), LABELS != 0)
    assert not read(tmp_path, path=name, value=200).any(), "a label that does not occur"
    assert check_mask(mask_of(path=name), tmp_path, (3, 4)) is None


def test_bits_and_booleans_are_0_and_1(tmp_path: Path) -> None:
    inside = LABELS % 3 == 0
    Image.fromarray(inside).save(tmp_path / "m.png")
    assert Image.open(tmp_path / "m.png").mode == "1"
    np.save(tmp_path / "m.npy", inside)
    for name in ("m.png", "m.npy"):
        np.testing.assert_array_equal(read(tmp_path, path=name, value=1), inside)
        np.testing.assert_array_equal(read(tmp_path, path=name), inside)


def test_the_exif_orientation_of_a_mask_is_applied(tmp_path: Path) -> None:
    """6: the stored rows are the columns of the upright image, from right to left."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(LABELS))).save(tmp_path / "m.png", exif=exif)
    np.testing.assert_array_equal(read(tmp_path, path="m.png", value=7), LABELS == 7)
    assert check_mask(mask_of(path="m.png"), tmp_path, (3, 4)) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("m.jpg", "JPEG changes values"),
        ("color.png", "label map in color"),
        ("alpha.png", "transparent pixels"),
        ("white.tif", "0 is white"),
        ("half.npy", "are no labels; expected whole numbers"),
        ("nan.npy", "are no labels"),
        ("wide.png", "3 x 5 voxels for an image of 3 x 4"),
        ("gone.png", "no such file"),
        ("../m.png", r"\.\."),
    ],
)
def test_what_is_no_mask_is_refused_with_its_field(tmp_path: Path, name: str, reason: str) -> None:
    Image.fromarray(LABELS).save(tmp_path / "m.jpg")
    Image.fromarray(np.stack([LABELS, LABELS, LABELS + 1], axis=-1)).save(tmp_path / "color.png")
    Image.fromarray(np.stack([LABELS] * 4, axis=-1)).save(tmp_path / "alpha.png")
    np.save(tmp_path / "half.npy", LABELS / 2)
    np.save(tmp_path / "nan.npy", np.where(LABELS == 3, np.nan, 1.0))
    Image.fromarray(np.zeros((3, 5), np.uint8)).save(tmp_path / "wide.png")
    written(tmp_path / "white.tif", tiff(LABELS, photometric=0))
    with pytest.raises(MediaError, match=reason) as caught:
        read(tmp_path, path=name)
    assert caught.value.field == "masks.0"
    if name in ("m.jpg", "white.tif"):  # the header tells: no need to decode
        with pytest.raises(MediaError, match=reason) as caught:
            check_mask(mask_of(path=name), tmp_path, (3, 4))
        assert caught.value.field == "masks.0"


# Run lengths and polygons


def test_run_lengths_and_absent_targets(tmp_path: Path) -> None:
    inside = LABELS % 5 == 1
    for compressed in (False, True):
        code = rle.encode(inside, compressed=compressed)
        np.testing.assert_array_equal(read(tmp_path, rle=code), inside)
        assert check_mask(mask_of(rle=code), tmp_path, (3, 4)) is True
    empty = rle.encode(np.zeros((3, 4), bool))
    assert not read(tmp_path, rle=empty).any()
    assert check_mask(mask_of(rle=empty), tmp_path, (3, 4)) is False
    assert not read(tmp_path).any()
    assert check_mask(mask_of(), tmp_path, (3, 4)) is False
    volume = np.random.default_rng(0).random((3, 4, 5)) > 0.5
    placement = Placement.of_source((3, 4, 5))
    np.testing.assert_array_equal(read(tmp_path, placement, rle=rle.encode(volume)), volume)


@pytest.mark.parametrize(
    ("fields", "field", "reason"),
    [
        ({"rle": {"size": [4, 3], "counts": [12]}}, "rle.size", "4 x 3 for an image of 3 x 4"),
        ({"rle": {"size": [3, 4], "counts": [11]}}, "rle.counts", "11 voxels in all"),
        ({"polygons": ((0, 0, 1, 1, 1, 0), (0, 0, 9, 1, 1, 0))}, "polygons.1", r"\(9, 1\) lies"),
    ],
)
def test_codes_that_do_not_fit_the_image_are_refused_with_their_field(
    tmp_path: Path, fields: Any, field: str, reason: str
) -> None:
    for call in (
        lambda: read(tmp_path, **fields),
        lambda: check_mask(mask_of(**fields), tmp_path, (3, 4)),
    ):
        with pytest.raises(MediaError, match=reason) as caught:
            call()
        assert caught.value.field == f"masks.0.{field}"


def test_outlines_are_of_images(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="outlines are for images") as caught:
        read(tmp_path, Placement.of_source((3, 4, 5)), polygons=((0, 0, 1, 1, 1, 0),))
    assert caught.value.field == "masks.0.polygons"


def pixels(*rows: str) -> np.ndarray:
    return np.array([[letter == "#" for letter in row] for row in rows])


@pytest.mark.parametrize(
    ("polygons", "expected"),
    [
        ([[1, 0, 3, 0, 3, 2, 1, 2]], pixels(".###.", ".###.", ".###.", ".....")),
        # Centers at 1, 2 and 1, 2 lie inside; Pillow would cut 0.6 down to 0.
        ([[0.6, 0.6, 2.9, 0.6, 2.9, 2.4, 0.6, 2.4]], pixels(".....", ".##..", ".##..", ".....")),
        ([[0, 0, 3, 0, 0, 3]], pixels("####.", "###..", "##...", "#....")),
        # Two outlines are united, also where they overlap.
        ([[0, 0, 2, 0, 2, 0], [1, 0, 4, 0, 4, 1, 1, 1]], pixels("#####", ".####", ".....", ".....")),
        # The whole image, with the right border written as its width.
        ([[0, 0, 5, 0, 5, 4, 0, 4]], np.ones((4, 5), bool)),
        # A bow tie: both halves, by the even-odd rule.
        ([[0, 0, 4, 3, 4, 0, 0, 3]], pixels("#...#", "##.##", "##.##", "#...#")),
    ],
)  # fmt: skip
def test_outlines_by_hand(polygons: Any, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(fill_polygons(polygons, (4, 5)), expected)


@pytest.mark.parametrize("seed", range(10))
def test_outlines_of_whole_numbers_are_filled_as_by_pillow_but_for_their_borders(seed: int) -> None:
    """A convex outline: Pillow also draws border pixels whose center lies just outside."""
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
    corners = np.rint(np.stack([20 + 15 * np.cos(angles), 16 + 12 * np.sin(angles)], axis=1))
    own = fill_polygons([corners.ravel().tolist()], (33, 40))
    image = Image.new("1", (40, 33))
    ImageDraw.Draw(image).polygon(corners.ravel().tolist(), fill=1, outline=1)
    theirs = np.array(image)
    assert not (own & ~theirs).any()
    assert (theirs & ~own).sum() <= 30
    backwards = fill_polygons([corners[::-1].ravel().tolist()], (33, 40))
    np.testing.assert_array_equal(backwards, own)


# Volumes


@pytest.mark.parametrize("suffix", ["nii", "nii.gz", "nrrd", "mha", "npy"])
def test_a_label_of_a_volume(tmp_path: Path, suffix: str) -> None:
    placement = Placement.of_source((3, 4, 5), grid("SPL", (5, 2, 1.5), (0.2, -0.1, 0.3)))
    labels = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    if suffix == "npy":
        np.save(tmp_path / "m.npy", labels)
    else:
        write_label_map(tmp_path / "whole.nii", labels, placement)
        sitk.WriteImage(sitk.ReadImage(str(tmp_path / "whole.nii")), str(tmp_path / f"m.{suffix}"))
    found = read(tmp_path, placement, path=f"m.{suffix}", value=42)
    np.testing.assert_array_equal(found, labels == 42)
    source = mask_of(path=f"m.{suffix}")
    assert check_mask(source, tmp_path, (3, 4, 5)) is None
    with pytest.raises(MediaError, match="3 x 4 x 5 for an image of 3 x 4 x 6") as caught:
        check_mask(source, tmp_path, (3, 4, 6))
    assert caught.value.field == "masks.0"


@pytest.mark.parametrize("orientation", ORIENTATIONS[::5])
def test_axes_of_a_label_map_follow_those_of_its_volume(tmp_path: Path, orientation: str) -> None:
    """The same voxels stored in another order, as converters of DICOM write them."""
    geometry = grid("SPL", (5, 2, 1.5), (0.2, -0.1, 0.3))
    labels = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    turned, other = reoriented(labels, geometry, orientation)
    write_nifti(tmp_path / "m.nii", np.ascontiguousarray(turned), other)
    placement = Placement.of_source((3, 4, 5), geometry)
    np.testing.assert_array_equal(read(tmp_path, placement, path="m.nii", value=42), labels == 42)
    moved = Geometry(other.spacing, other.direction, other.origin + 1)
    write_nifti(tmp_path / "m.nii", np.ascontiguousarray(turned), moved)
    with pytest.raises(MediaError, match=r"corners are up to 1\.73 mm apart") as caught:
        read(tmp_path, placement, path="m.nii")
    assert caught.value.field == "masks.0"


def test_a_mask_of_a_dicom_series(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", phantom())
    volume = read_volume(tmp_path / "ct")
    placement = Placement.of_source(volume.voxels.shape, volume.geometry)
    write_label_map(tmp_path / "m.nii.gz", volume.voxels > 200, placement)
    found = read(tmp_path, placement, path="m.nii.gz", value=1)
    np.testing.assert_array_equal(found, volume.voxels > 200)
    assert 0 < found.sum() < found.size


PREPARATIONS: dict[str, dict[str, Any]] = {
    "anisotropic": {"size": [10, 12, 14], "orientation": None},
    "flipped": {"size": None, "orientation": "IAR"},
    "oblique, straightened": {"size": None, "orientation": "SPL", "oblique": "resample"},
    "spacing, cropped": {"spacing": [3.0, 3.0, 3.0], "size": [8, 10, 10], "orientation": "RAS"},
    "spacing, padded": {"spacing": [2.0, 2.0, 2.0], "size": [30, 30, 30], "orientation": "SPL"},
}


@pytest.mark.parametrize("name", PREPARATIONS)
def test_a_mask_lies_on_the_pixels_that_the_model_sees(tmp_path: Path, name: str) -> None:
    """A volume that is white in the mask: file to target grid, against the prepared pixels."""
    geometry = grid("LSA", (1.5, 2.0, 4.0), (0.3, 0.2, -0.1))
    inside = body((20, 16, 12), np.random.default_rng(3))
    write_nifti(tmp_path / "v.nii", np.where(inside, 500, -900).astype(np.int16), geometry)
    write_nifti(tmp_path / "m.nii", np.where(inside, 4, 0).astype(np.uint8), geometry)
    described = VolumePreprocess(windows=[[-900, 500]], **PREPARATIONS[name])
    prepared = prepare(tmp_path / "v.nii", described)
    found = read(tmp_path, prepared.placement, path="m.nii", value=4)
    np.testing.assert_array_equal(found, inside)
    target, white = prepared.placement.to_prepared(found), prepared.pixels[0] > 0.5
    near = np.ones((3, 3, 3), bool)
    assert target.sum() > 100
    assert not (target & ~binary_dilation(white, near)).any(), "within a voxel"
    assert not (binary_erosion(white, near) & ~target).any()
    back = prepared.placement.to_source(target)
    shown = prepared.placement.to_source(np.ones(target.shape, bool))
    assert dice(back, inside & shown) > 0.75


@pytest.mark.parametrize("form", ["RGB", "P", "I;16"])
@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_a_mask_lies_on_the_prepared_image(tmp_path: Path, form: str, fit: str) -> None:
    inside = body((30, 41), np.random.default_rng(4))
    shade = np.where(inside, 255, 0).astype(np.uint8)
    image = {
        "RGB": lambda: Image.fromarray(np.stack([shade] * 3, axis=-1)),
        "P": lambda: Image.fromarray(shade).convert("P"),
        "I;16": lambda: Image.fromarray(shade.astype(np.uint16) * 257),
    }[form]()
    image.save(tmp_path / "i.png")
    Image.fromarray(inside.astype(np.uint8)).save(tmp_path / "m.png")
    described = ImagePreprocess(size=[24, 24], fit=fit, mean=[0.0] * 3, std=[1.0] * 3)
    prepared = prepare(tmp_path / "i.png", described)
    target = prepared.placement.to_prepared(read(tmp_path, prepared.placement, path="m.png"))
    assert dice(target, prepared.pixels[0] > 0.5) > 0.95
