"""Tiles of images of any shape: which grid, which pixels, and how many from the header alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import GotOcr2ImageProcessorPil

from medm.errors import RecipeError
from medm.imaging import (
    ImagePreprocess,
    VolumePreprocess,
    fingerprint,
    load_pixels,
    prepare,
    preprocess_from_dict,
)
from medm.imaging.options import Tiles
from medm.imaging.preview import contact_sheet
from medm.imaging.probe import count_items
from medm.imaging.tiles import num_items, tile_grid

IMAGENET: dict[str, Any] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth noise, so that a resize does not average everything away."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def tiled(**fields: Any) -> ImagePreprocess:
    return ImagePreprocess(**({"size": [16, 16], "tiles": Tiles(), **IMAGENET} | fields))


@pytest.mark.parametrize(
    ("size", "limits", "grid"),
    [
        ((1024, 1024), {}, (3, 3)),  # 2 x 2 and 3 x 3 are as square; 9 tiles are 1.7 of the image
        ((448, 448), {}, (1, 1)),  # 2 x 2 would be four times the image
        ((634, 634), {}, (2, 2)),  # 401956 > 0.5 * 4 * 448 * 448 = 401408
        ((633, 633), {}, (1, 1)),  # 400689 is not
        ((600, 800), {}, (3, 4)),  # 4 / 3 exactly; 480000 pixels do not matter without a tie
        ((400, 1200), {}, (1, 3)),  # 2 x 6 has 12 tiles, five times the image
        ((900, 2700), {}, (2, 6)),
        ((5000, 100), {}, (12, 1)),  # 0.02: the narrowest grid
        ((100, 5000), {}, (1, 12)),
        ((1024, 1024), {"max": 6}, (2, 2)),
        ((100, 100), {"min": 2}, (2, 2)),  # 2 x 1 and 1 x 2 are further away
        ((448, 449), {"max": 1}, (1, 1)),
    ],
)
def test_grids_by_hand(
    size: tuple[int, int], limits: dict[str, int], grid: tuple[int, int]
) -> None:
    assert tile_grid(size, Tiles(**limits), (448, 448)) == grid


@pytest.mark.parametrize(("least", "most"), [(1, 12), (1, 6), (2, 5), (4, 4)])
def test_number_of_tiles_is_that_of_transformers(least: int, most: int) -> None:
    theirs = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448})
    ours = tiled(size=[448, 448], tiles=Tiles(min=least, max=most))
    rng = np.random.default_rng(7)
    sizes = [tuple(int(side) for side in rng.integers(1, 3000, 2)) for _ in range(200)]
    sizes += [(s, s) for s in (1, 447, 448, 449, 633, 634, 896, 1267, 1268)]
    for height, width in sizes:
        options = {"crop_to_patches": True, "min_patches": least, "max_patches": most}
        expected = theirs.get_number_of_image_patches(height, width, options)
        assert num_items(ours, (height, width)) == expected


@pytest.mark.parametrize(
    ("height", "width"), [(37, 61), (61, 37), (16, 16), (23, 23), (50, 150), (11, 97), (48, 49)]
)
def test_pixels_are_those_of_transformers(height: int, width: int) -> None:
    image = noise(height, width)
    theirs = GotOcr2ImageProcessorPil(
        size={"height": 16, "width": 16},
        crop_to_patches=True,
        image_mean=IMAGENET["mean"],
        image_std=IMAGENET["std"],
    )
    expected = np.asarray(theirs(image, return_tensors="np")["pixel_values"])
    np.testing.assert_allclose(load_pixels(image, tiled()), expected, atol=2e-6)


def test_tiles_are_the_whole_image_cut_row_by_row_and_the_thumbnail_is_last() -> None:
    image = noise(40, 60)  # 3 / 2: 2 rows of 3
    prepared = prepare(image, tiled())
    assert prepared.pixels.shape == (7, 3, 16, 16)
    plain = {"size": [32, 48], "tiles": None}
    whole = prepare(image, tiled(**plain))
    rows = [np.concatenate(list(prepared.pixels[r : r + 3]), axis=-1) for r in (0, 3)]
    np.testing.assert_array_equal(np.concatenate(rows, axis=-2), whole.pixels)
    np.testing.assert_array_equal(prepared.pixels[-1], load_pixels(image, tiled(tiles=None)))
    assert prepared.placement == whole.placement
    assert prepared.placement.shape == (32, 48)
    assert prepared.placement.source_shape == (40, 60)


def test_one_tile_has_no_thumbnail_and_a_thumbnail_can_be_left_out() -> None:
    assert load_pixels(noise(16, 16), tiled()).shape == (1, 3, 16, 16)
    assert load_pixels(noise(40, 60), tiled(tiles=Tiles(thumbnail=False))).shape[0] == 6
    assert load_pixels(noise(40, 60), tiled(tiles=Tiles(max=1))).shape[0] == 1
    assert [tiled(tiles=Tiles(max=n)).max_items for n in (12, 1)] == [13, 1]
    assert tiled(tiles=Tiles(thumbnail=False)).max_items == 12
    assert (ImagePreprocess().max_items, VolumePreprocess().max_items) == (1, 1)


def test_deep_and_gray_images_are_windowed_before_they_are_cut(tmp_path: Path) -> None:
    values = np.linspace(-1000, 1000, 40 * 60, dtype=np.float32).reshape(40, 60).astype(np.int16)
    np.save(tmp_path / "ct.npy", values)
    how = tiled(window=[-500.0, 500.0], channels=1, mean=[0.0], std=[1.0], interpolation="bilinear")
    pixels = load_pixels(tmp_path / "ct.npy", how)
    assert pixels.shape == (7, 1, 16, 16)
    assert pixels.min() == 0 and pixels.max() == 1
    assert pixels[0].max() < pixels[5].min()  # the values grow from the first row to the last


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_header_tells_the_number_of_items(tmp_path: Path, orientation: int) -> None:
    """17 x 48 pixels are one row of 3 tiles; turned they are a column, in another metric."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for height, width in ((17, 48), (30, 47), (16, 16), (21, 100)):
        path = tmp_path / f"{height}x{width}.png"
        noise(height, width).save(path, exif=exif)
        expected = len(load_pixels(path, tiled()))
        assert count_items(path, tiled()) == expected
        stream = io.BytesIO(path.read_bytes())
        stream.seek(5)
        assert count_items(stream, tiled()) == expected
        assert count_items(path, ImagePreprocess()) == 1


def test_descriptions_without_tiles_are_those_of_earlier_versions() -> None:
    """Names of cache entries and saved processors, as version 0.5 wrote them."""
    assert fingerprint(ImagePreprocess()) == "5dc00a431e9f08d2"
    assert "tiles" not in ImagePreprocess().model_dump()
    how = tiled()
    assert preprocess_from_dict(how.model_dump()) == how
    names = {
        fingerprint(how),
        fingerprint(tiled(tiles=None)),
        fingerprint(tiled(tiles=Tiles(max=6))),
    }
    assert len(names) == 3


def test_impossible_tiles_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"min: expected at most max \(4\), found 5"):
        preprocess_from_dict({"kind": "image", "tiles": {"min": 5, "max": 4}})
    with pytest.raises(RecipeError, match=r"tiles: .*expected fit 'squash', found 'pad'"):
        preprocess_from_dict({"kind": "image", "tiles": {}, "fit": "pad"})


def test_the_preview_shows_the_whole_image(tmp_path: Path) -> None:
    noise(40, 60).save(tmp_path / "a.png")
    with_tiles = contact_sheet(tmp_path / "a.png", tiled())
    plain = contact_sheet(tmp_path / "a.png", tiled(size=[32, 48], tiles=None))
    assert with_tiles.height == plain.height
