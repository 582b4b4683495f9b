"""The contact sheet shows what the model gets, and marks the patient's sides where they are
known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image, ImageDraw

from medm.errors import MediaError
from medm.imaging import ImagePreprocess, VolumePreprocess
from medm.imaging.geometry import Geometry
from medm.imaging.mask_colors import mask_color
from medm.imaging.nifti import write_nifti
from medm.imaging.preview import contact_sheet, save_contact_sheet
from tests.imaging.tiny import CANARY, phantom, write_series


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


@pytest.mark.parametrize(
    ("orientation", "left", "right", "top", "bottom"),
    [("SPL", "R", "L", "A", "P"), ("IAR", "L", "R", "P", "A")],
)
def test_sides_of_the_patient(
    tmp_path: Path, drawn: list[Any], orientation: str, left: str, right: str, top: str, bottom: str
) -> None:
    write_series(tmp_path / "ct", phantom())
    preprocess = VolumePreprocess(orientation=orientation, size=[4, 20, 26])
    sheet = contact_sheet(tmp_path / "ct", preprocess, slices=1, tile=104)
    marks = {text: place for place, text in drawn if text in "LRAPSI"}
    assert set(marks) == {left, right, top, bottom}
    assert marks[left][0] < 52 < marks[right][0]
    assert marks[top][1] < 40 < marks[bottom][1]
    # The bone at the patient's left is where the mark says.
    tile = np.asarray(sheet.convert("L"))[-(80 + 16 + 8) :, 4:108]
    bright = tile[20:60, 20:84].max(axis=0).argmax()  # without the marks
    assert (bright > 32) == (marks["L"][0] > 52)


def test_slices_windows_and_numbers_are_said(tmp_path: Path, drawn: list[Any]) -> None:
    sitk.WriteImage(phantom(), str(tmp_path / "ct.nii"))
    preprocess = VolumePreprocess(
        size=[8, 20, 26], windows=[[-1000, 1000], [-160, 240]], crop_foreground=0.1
    )
    save_contact_sheet(tmp_path / "ct.nii", preprocess, tmp_path / "sheet.png", slices=4)
    texts = [text for _, text in drawn]
    for line in (
        "ct.nii",
        "12 x 20 x 26 voxels (raw) to 8 x 20 x 26, axes SPL",
        "2/8  -1000..1000",
        "8/8  -160..240",
    ):
        assert line in texts
    assert any("Not for clinical use" in text for text in texts)
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.info == {}
    assert sheet.width >= 3 * 192


def test_unknown_sides_are_not_marked(tmp_path: Path, drawn: list[Any]) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(5, 6, 7)))
    contact_sheet(tmp_path / "a.npy", VolumePreprocess(size=[4, 6, 7], scale="minmax"))
    texts = [text for _, text in drawn]
    assert not {"L", "R"} & set(texts)
    assert any("direction unknown, sides not marked" in text for text in texts)


def test_an_image_is_shown_as_normalised_and_back(tmp_path: Path, drawn: list[Any]) -> None:
    pixels = np.full((10, 20, 3), (250, 100, 0), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    sheet = np.asarray(
        contact_sheet(
            tmp_path / "a.png",
            ImagePreprocess(size=[64, 64], fit="pad", mean=[0.2, 0.4, 0.6]),
            tile=64,
        )
    )
    middle = sheet[-(8 + 32)]
    assert [250, 100, 0] in middle.tolist()
    assert [51, 102, 153] in sheet[-(8 + 60)].tolist()  # the bands are `mean`
    assert "20 x 10, 8 bits, to 64 x 64 (pad)" in [text for _, text in drawn]


def test_nothing_of_the_header_is_shown(tmp_path: Path, drawn: list[Any]) -> None:
    write_series(tmp_path / "ct", phantom())
    contact_sheet(tmp_path / "ct", VolumePreprocess(size=[2, 4, 4]))
    assert not [text for _, text in drawn if CANARY.split("^")[0].lower() in text.lower()]


def test_outlines_of_masks_lie_on_the_prepared_pixels(tmp_path: Path, drawn: list[Any]) -> None:
    """A volume turned over, and an image whose sides are cropped: edges are colored, areas not."""
    inside = np.zeros((4, 40, 40), np.uint8)
    inside[1:3, 4:20, 10:30] = 1
    geometry = Geometry(np.array([5.0, 1.0, 1.0]), -np.eye(3)[:, [2, 1, 0]], np.zeros(3))
    write_nifti(tmp_path / "v.nii", inside.astype(np.int16) * 300 - 150, geometry)
    write_nifti(tmp_path / "m.nii", inside, geometry)
    preprocess = VolumePreprocess(size=[4, 40, 40], windows=[[-2000, 2000]], orientation="SPL")
    sheet = contact_sheet(
        tmp_path / "v.nii", preprocess, slices=4, tile=40, masks=[tmp_path / "m.nii"]
    )
    assert any(text == "m.nii" for _, text in drawn)
    assert count(sheet, 0) >= 2 * (2 * 16 + 2 * 20 - 4), "two slices, and the legend"

    Image.fromarray(np.full((40, 80), 100, np.uint8)).save(tmp_path / "i.png")
    for number, columns in enumerate((slice(30, 50), slice(0, 15))):
        mask = np.zeros((40, 80), np.uint8)
        mask[10:30, columns] = 255
        Image.fromarray(mask).save(tmp_path / f"m{number}.png")
    files = [tmp_path / "m0.png", tmp_path / "m1.png"]
    cropped = ImagePreprocess(size=[40, 40], fit="crop")
    sheet = contact_sheet(tmp_path / "i.png", cropped, tile=40, masks=files)
    tile = np.asarray(sheet)[-48:-8, 4:44]
    edge = (np.abs(tile.astype(int) - mask_color(0)) < 3).all(axis=-1)
    rows, columns = np.nonzero(edge)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 29, 10, 29)
    assert edge.sum() == 4 * 20 - 4
    assert not (np.abs(tile.astype(int) - mask_color(1)) < 3).all(axis=-1).any(), "cropped away"
    with pytest.raises(MediaError, match="no such file") as caught:
        contact_sheet(tmp_path / "i.png", cropped, masks=[tmp_path / "gone.png"])
    assert caught.value.field == "mask"


def count(sheet: Image.Image, number: int) -> int:
    """Pixels of a sheet in the color of a mask."""
    distance = np.abs(np.asarray(sheet).astype(int) - mask_color(number))
    return int((distance < 40).all(axis=-1).sum())
