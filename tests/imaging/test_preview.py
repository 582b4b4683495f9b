"""The contact sheet shows what the model gets, and marks the patient's sides where they are
known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image, ImageDraw

from medm.imaging import ImagePreprocess, VolumePreprocess
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
