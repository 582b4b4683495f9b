"""Overlay sheets show every mask in its color where it is, and say what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image, ImageDraw

from medm.errors import MediaError
from medm.imaging import ImagePreprocess, VolumePreprocess, prepare
from medm.imaging.mask_colors import COLORS, mask_color
from medm.imaging.overlay import overlay_sheet, save_overlay_sheet
from medm.imaging.placement import Placement
from medm.imaging.volumes import read_volume
from tests.imaging.tiny import CANARY, on_grid, phantom, write_series


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, int], str]]:
    """Every text that is drawn, and where."""
    texts: list[tuple[tuple[int, int], str]] = []
    draw = ImageDraw.ImageDraw.text

    def recorded(self: Any, place: tuple[int, int], text: str, *args: Any, **options: Any) -> None:
        texts.append((place, text))
        draw(self, place, text, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", recorded)
    return texts


def words(drawn: list[tuple[tuple[int, int], str]]) -> list[str]:
    return [text for _, text in drawn]


def a_volume(folder: Path, direction: np.ndarray | None = None) -> tuple[Path, Placement]:
    image = phantom()
    if direction is not None:
        image = on_grid(image, direction, (1.5, 2.0, 5.0), (26, 20, 12))
    sitk.WriteImage(image, str(folder / "ct.nii.gz"))
    prepared = prepare(folder / "ct.nii.gz", VolumePreprocess(windows=[[-1000, 1000]], size=None))
    return folder / "ct.nii.gz", prepared.placement


def test_the_contour_of_an_image_is_the_outline_of_its_mask() -> None:
    """By hand: 16 x 16 pixels, eight times enlarged; a square of 8 x 8 has an outline of 252."""
    pixels = np.full((16, 16, 3), 40, np.uint8)
    mask = np.zeros((16, 16), bool)
    mask[4:12, 6:14] = True
    placement = Placement.of_source((16, 16))
    sheet = overlay_sheet(pixels, [("a", mask)], placement, style="contour", tile=128)
    tile = np.asarray(sheet)[-(128 + 8) : -8, 4:132]
    colored = (tile == COLORS[0]).all(axis=-1)
    outline = np.zeros((128, 128), bool)
    outline[32:96, 48:112] = True
    outline[33:95, 49:111] = False
    assert outline.sum() == 252
    assert not (colored & ~outline).any()
    assert colored.sum() > 235  # the mask's number covers some of it
    filled = overlay_sheet(pixels, [("a", mask)], placement, style="fill", tile=128)
    inner = np.asarray(filled)[-(128 + 8) : -8, 4:132][80, 80]
    np.testing.assert_array_equal(inner, np.round(0.7 * 40 + 0.3 * np.array(COLORS[0])))


def test_a_mask_of_one_pixel_is_visible_in_a_large_image() -> None:
    mask = np.zeros((2000, 3000), bool)
    mask[1500, 2500] = True
    sheet = overlay_sheet(
        np.zeros((2000, 3000, 3), np.uint8), [("dot", mask)], Placement.of_source(mask.shape)
    )
    tile = np.asarray(sheet)[-(512 + 8) : -8, 4:516]
    rows, columns = np.nonzero((tile == COLORS[0]).all(axis=-1))
    assert abs(rows.mean() - (85.3 + 1500 * 512 / 3000)) < 1.5
    assert abs(columns.mean() - 2500 * 512 / 3000) < 1.5


def test_legend_scale_and_slices_are_said(tmp_path: Path, drawn: list[Any]) -> None:
    path, placement = a_volume(tmp_path)
    voxels = read_volume(path).voxels
    head = voxels == 500
    masks = [("bone", voxels > 600), ("head", head), ("nothing", voxels > 5000)]
    overlay_sheet(path, masks, placement, window=(-1000, 800))
    said = words(drawn)
    for line in (
        "ct.nii.gz",
        "12 x 20 x 26 voxels (raw), window -1000..800",
        "1  bone: 36 voxels (0.54 ml)",  # 36 * 1.5 * 2 * 5 mm^3
        "2  head: 9 voxels (0.135 ml)",
        "3  nothing: 0 voxels (0 ml)",
        "axial slice 6/12",
        "coronal slice 9/20",
        "sagittal slice 19/26",
        "axial slice 10/12",
        "10 mm",
        "Not for clinical use.",
    ):
        assert line in said, line
    assert not head[5].any() and head[9].any()


def test_the_slice_of_the_largest_area_is_shown(tmp_path: Path, drawn: list[Any]) -> None:
    """Of each mask; slices are counted as in the file, whose first slice is at the head here."""
    path, placement = a_volume(tmp_path, np.diag([1.0, 1.0, -1.0]))
    masks = np.zeros((3, *placement.source_shape), bool)
    masks[0, 2, 3:9, 3:9] = masks[0, 3, 3:5, 3:5] = True
    masks[1, 8, 3:5, 3:5] = masks[1, 7, 3, 3] = True
    masks[2, 8, 10, 10] = True
    overlay_sheet(path, [(str(number), mask) for number, mask in enumerate(masks)], placement)
    captions = [text for text in words(drawn) if text.startswith("axial")]
    assert captions == ["axial slice 3/12", "axial slice 9/12"]


def test_a_mask_at_the_left_is_at_the_mark_of_the_left(tmp_path: Path, drawn: list[Any]) -> None:
    """Whatever the axes of the file are."""
    for number, direction in enumerate(
        [np.eye(3), np.diag([-1.0, -1.0, 1.0]), np.diag([1.0, -1.0, -1.0])]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        drawn.clear()
        path, placement = a_volume(folder, direction)
        bone = read_volume(path).voxels > 600  # at the patient's left
        sheet = overlay_sheet(
            path, [("bone", bone)], placement, style="fill", window=(0, 1), tile=128
        )
        marks = {text: place[0] for place, text in drawn if text in ("L", "R")}
        assert marks["R"] < 64 < marks["L"]
        tile = np.asarray(sheet)[-(128 + 16 + 8) :][:128, 4:132].astype(int)
        colored = np.argwhere(tile[..., 0] - tile[..., 2] > 40)[:, 1]
        assert np.median(colored[(colored > 12) & (colored < 116)]) > 64, direction


def test_a_reference_is_drawn_beside_the_prediction(tmp_path: Path, drawn: list[Any]) -> None:
    """The same phrase has the same color and number in both; the second "nodule" is the second."""
    first, second = np.zeros((2, 40, 60), bool)
    first[5:15, 5:15] = True
    second[25:35, 40:50] = True
    sheet = overlay_sheet(
        np.full((40, 60, 3), 30, np.uint8),
        [("nodule", first), ("nodule", second)],
        Placement.of_source((40, 60)),
        reference=[("nodule", first), ("missed", second)],
        style="contour",
        tile=120,
    )
    tiles = np.asarray(sheet)[-(120 + 16 + 8) :][:120]
    predicted, wanted = tiles[:, 4:124], tiles[:, 128:248]

    def colors(tile: np.ndarray) -> list[int]:
        return [n for n in range(7) if (tile == COLORS[n]).all(axis=-1).sum() > 20]

    assert (colors(predicted), colors(wanted)) == ([0, 1], [0, 2])
    for line in (
        "1  nodule: predicted 100 pixels, reference 100 pixels",
        "2  nodule: predicted 100 pixels, reference no mask",
        "3  missed: predicted no mask, reference 100 pixels",
        "predicted",
        "reference",
        "20 px",
    ):
        assert line in words(drawn), words(drawn)


def test_a_sheet_is_equal_for_equal_arguments(tmp_path: Path) -> None:
    path, placement = a_volume(tmp_path)
    masks = [("bone", read_volume(path).voxels > 200)]
    for name in ("a.png", "b.png"):
        save_overlay_sheet(tmp_path / name, path, masks, placement, reference=masks)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert (image.format, image.info) == ("PNG", {})


def test_thick_slices_are_shown_in_their_own_plane(tmp_path: Path, drawn: list[Any]) -> None:
    """Sagittal slices of 5 mm: the slices of the masks are sagittal."""
    image = sitk.GetImageFromArray(np.zeros((6, 20, 22), np.int16))
    image.SetSpacing((1.0, 1.0, 5.0))
    image.SetDirection([0, 0, 1, 1, 0, 0, 0, 1, 0])  # the slices follow the patient's left
    sitk.WriteImage(image, str(tmp_path / "mr.nii"))
    masks = np.zeros((2, 6, 20, 22), bool)
    masks[0, 2, 4:12, 4:12] = masks[1, 4, 3:5, 3:5] = True
    placement = Placement.of_source((6, 20, 22), read_volume(tmp_path / "mr.nii").geometry)
    overlay_sheet(tmp_path / "mr.nii", [("a", masks[0]), ("b", masks[1])], placement)
    captions = [text for text in words(drawn) if text.startswith("sagittal")]
    assert captions == ["sagittal slice 3/6", "sagittal slice 5/6"]


def test_no_masks_and_no_direction(tmp_path: Path, drawn: list[Any]) -> None:
    voxels = np.random.default_rng(0).normal(size=(6, 8, 10)).astype(np.float32)
    overlay_sheet(voxels, [], Placement.of_source((6, 8, 10)))
    assert "no masks" in words(drawn)
    assert any("direction unknown, sides not marked" in text for text in words(drawn))
    assert not {"L", "R"} & set(words(drawn))
    assert "axis 0, slice 4/6" in words(drawn)


def test_slices_beyond_the_limit_are_counted(drawn: list[Any]) -> None:
    masks = np.zeros((8, 10, 8, 8), bool)
    for number, mask in enumerate(masks):
        mask[number + 1, 2, 2] = True
    overlay_sheet(
        np.zeros((10, 8, 8), np.int16),
        [(f"m{number}", mask) for number, mask in enumerate(masks)],
        Placement.of_source((10, 8, 8)),
        slices=3,
    )
    # One of the eight is a plane of its own.
    assert "4 further slices with the largest area of a mask are not shown" in words(drawn)


def test_deep_images_and_color_images(tmp_path: Path) -> None:
    deep = (np.arange(40 * 30).reshape(40, 30) * 20).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    placement = prepare(tmp_path / "deep.png", ImagePreprocess(size=[8, 8])).placement
    sheet = overlay_sheet(tmp_path / "deep.png", [], placement, window=(0, 1), tile=40)
    assert np.asarray(sheet)[-(40 + 8) : -8, 4:44][5, 20].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("source", "mask", "reason"),
    [
        (np.zeros((4, 5), np.uint8), np.zeros((4, 6)), "a mask of 4 x 6 for a file of 4 x 5"),
        (np.zeros((4, 6), np.uint8), np.zeros((4, 5)), "4 x 6 for masks of 4 x 5"),
        (np.zeros((4, 5), np.uint8), np.full((4, 5), 0.5), "are no mask"),
    ],
)
def test_masks_of_another_image_are_refused(
    source: np.ndarray, mask: np.ndarray, reason: str
) -> None:
    with pytest.raises(MediaError, match=reason):
        overlay_sheet(source, [("a", mask)], Placement.of_source((4, 5)))


def test_nothing_of_the_header_is_shown(tmp_path: Path, drawn: list[Any]) -> None:
    write_series(tmp_path / "ct", phantom())
    placement = Placement.of_source((12, 20, 26), read_volume(tmp_path / "ct").geometry)
    overlay_sheet(tmp_path / "ct", [], placement)
    assert not [text for text in words(drawn) if CANARY.split("^")[0].lower() in text.lower()]


def test_colors_repeat_after_seven() -> None:
    assert len(set(COLORS)) == 7
    assert mask_color(7) == COLORS[0]
