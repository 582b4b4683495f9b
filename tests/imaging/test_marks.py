"""Marks on images: which pixels they change, and marks that do not lie in the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medm.errors import MediaError
from medm.imaging import ImagePreprocess, load_pixels
from medm.imaging.images import read_image, shown
from medm.imaging.marks import COLOR, Mark, MarkedImage, box_around, draw, edge
from medm.imaging.probe import probe

GRAY = 100


def canvas(height: int = 40, width: int = 50) -> np.ndarray:
    return np.full((height, width, 3), GRAY, np.uint8)


def green(pixels: np.ndarray) -> np.ndarray:
    """(H, W) bool, pixels in the color of marks."""
    return (pixels == np.asarray(COLOR)).all(axis=-1)


def square(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((40, 50), bool)
    mask[top:bottom, left:right] = True
    return mask


def test_a_box_has_a_line_of_two_pixels_one_inside_and_one_outside() -> None:
    marked = green(draw(canvas(), [Mark("r", box=(10, 5, 20, 15))]))
    outer, inner = square(4, 9, 16, 21), square(6, 11, 14, 19)
    assert (marked == (outer & ~inner)).all()


def test_a_box_as_large_as_the_image_is_seen_on_all_sides() -> None:
    marked = green(draw(canvas(), [Mark("r", box=(0, 0, 50, 40))]))
    assert marked[0].all() and marked[-1].all() and marked[:, 0].all() and marked[:, -1].all()
    assert not marked[1:-1, 1:-1].any()


def test_an_outline_is_two_pixels_wide_and_leaves_the_area() -> None:
    mask = square(10, 10, 20, 20)
    marked = green(draw(canvas(), [Mark("r", outline=mask)]))
    assert (marked == edge(mask)).all()
    assert marked[15, 9] and marked[15, 10] and not marked[15, 8] and not marked[15, 11]
    assert not marked[12:18, 12:18].any()


def test_an_area_is_tinted_and_nothing_else() -> None:
    mask = square(10, 10, 20, 20)
    result = draw(canvas(), [Mark("r", area=mask)])
    assert (result[mask] == [50, 178, 50]).all()  # half of 100, and half of (0, 255, 0)
    assert (result[~mask] == GRAY).all()


@pytest.mark.parametrize(("side", "radius"), [(60, 5), (1000, 10)])
def test_a_point_is_a_disc_around_it(side: int, radius: int) -> None:
    marked = green(draw(canvas(side, side), [Mark("r", point=(30, 20))]))
    assert marked[20, 30 - radius] and marked[20, 30 + radius] and marked[20 + radius, 30]
    assert not marked[20, 30 - radius - 1] and not marked[20 + radius, 30 + radius]
    assert abs(int(marked.sum()) / (np.pi * (radius + 0.5) ** 2) - 1) < 0.1


def test_drawing_leaves_its_input() -> None:
    pixels = canvas()
    draw(pixels, [Mark("r", box=(1, 1, 9, 9)), Mark("r", area=square(0, 0, 5, 5))])
    assert (pixels == GRAY).all()


def test_a_box_around_a_mask() -> None:
    assert box_around(square(3, 4, 9, 17)) == (4, 3, 17, 9)


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        (Mark("regions.0", box=(0, 0, 51, 9)), r"x2 <= 50 .*50 x 40 pixels"),
        (Mark("regions.0", box=(-1, 0, 9, 9)), r"box \[-1, 0, 9, 9\]"),
        (Mark("regions.0", point=(50, 3)), r"0 <= x < 50"),
        (Mark("regions.0", outline=np.ones((50, 40), bool)), r"a mask of 40 x 50 pixels"),
        (Mark("regions.0", area=np.zeros((40, 50), bool)), r"empty mask"),
    ],
)
@pytest.mark.parametrize("decode", [False, True])
def test_marks_outside_of_the_image_are_refused(
    mark: Mark, words: str, decode: bool, tmp_path: Path
) -> None:
    Image.fromarray(canvas()).save(tmp_path / "a.png")
    marked = MarkedImage(tmp_path / "a.png", (mark,))
    with pytest.raises(MediaError, match=words) as caught:
        if decode:
            load_pixels(marked, ImagePreprocess(size=[8, 8]))
        else:
            probe(marked, kind="image")
    assert caught.value.field == "regions.0"


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "late.png", "a.tif"])
def test_the_size_of_a_turned_image_is_that_of_the_upright_one(name: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / name
    Image.fromarray(canvas()).save(file, exif=exif)
    if name == "late.png":  # the block stands behind the pixels
        data = file.read_bytes()
        start = data.index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        last = data.index(b"IEND") - 4
        file.write_bytes(data[:start] + data[end:last] + data[start:end] + data[last:])
    marked = MarkedImage(file, (Mark("r", box=(0, 0, 40, 50)),))
    probe(marked, kind="image")
    assert marked.read(ImagePreprocess(size=[8, 8])).pixels.shape == (50, 40, 3)


def test_marks_are_in_pixels_of_the_file_and_reach_the_prepared_image(tmp_path: Path) -> None:
    Image.fromarray(canvas(80, 80)).save(tmp_path / "a.png")
    marked = MarkedImage(
        tmp_path / "a.png", (Mark("r", area=np.pad(np.ones((40, 80), bool), ((40, 0), (0, 0)))),)
    )
    preprocess = ImagePreprocess(size=[4, 4], mean=[0.0], std=[1.0], interpolation="nearest")
    pixels = load_pixels(marked, preprocess)
    assert pixels.shape == (3, 4, 4)
    assert np.allclose(pixels[:, :2], GRAY / 255)
    assert np.allclose(pixels[:, 2:], np.array([50, 178, 50])[:, None, None] / 255)


def test_a_deep_gray_image_is_shown_in_its_window() -> None:
    values = np.linspace(0, 4000, 40 * 50).reshape(40, 50).astype(np.uint16)
    result = shown(ImagePreprocess(size=[8, 8], window=[1000, 3000]), read_image(values))
    expected = np.round((np.clip(values.astype(float), 1000, 3000) - 1000) / 2000 * 255)
    assert result.shape == (40, 50, 3) and result.dtype == np.uint8
    assert (result == result[..., :1]).all()
    assert np.abs(result[..., 0] - expected).max() <= 1


def test_gray_and_color_of_8_bits_are_shown_as_they_are() -> None:
    gray = np.arange(40 * 50, dtype=np.uint8).reshape(40, 50)
    color = np.stack([gray, gray[::-1], 255 - gray], axis=-1)
    preprocess = ImagePreprocess(size=[8, 8])
    assert (shown(preprocess, read_image(gray)) == gray[..., None]).all()
    assert (shown(preprocess, read_image(color)) == color).all()
