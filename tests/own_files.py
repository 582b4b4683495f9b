"""What a reader of the tutorials brings: drawn CT studies with a table of reports, and drawn images
with a table of questions."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from PIL import Image, ImageDraw
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from tests.imaging.tiny import SPACING, body, phantom, write_series

CASES = 8
SIDES = ("left", "right")
LOCALIZER, GAPS = "case3/scout", "case5/thick"
"""Series that cannot be used."""
IMAGES, ASKED = 14, 10
"""Drawn images, and those of them that the table has questions about."""


def ct_studies(folder: Path) -> None:
    """`data/studies/caseN/{thin,thick}` and `data/reports.csv`: patients with one study of two series each.

    A block on one side of each body is what its report speaks of. There are one localizer and one
    series with missing slices.
    """
    rows = []
    for case in range(1, CASES + 1):
        side = SIDES[case % 2]
        thin = with_block(side, size=case % 3)
        thick = sitk.Resample(thin, [*thin.GetSize()[:2], 8], sitk.Transform(), sitk.sitkLinear,
                              thin.GetOrigin(), [*SPACING[:2], 7.5], thin.GetDirection(), -1000.0)  # fmt: skip
        place = folder / "data" / "studies" / f"case{case}"
        study, frame = generate_uid(), generate_uid()

        def change(
            dataset: Dataset, z: int, *, case: int = case, uids: tuple[str, str] = (study, frame)
        ) -> None:
            dataset.StudyInstanceUID, dataset.FrameOfReferenceUID = uids
            dataset.PatientID, dataset.AccessionNumber = f"patient-{case}", f"A{1000 + case}"
            dataset.BodyPartExamined = "CHEST"
            dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]

        write_series(place / "thin", thin, change=change, number=1)
        files = write_series(place / "thick", thick, change=change, number=2)
        if f"{place.name}/thick" == GAPS:
            for file in files[3:5]:
                file.unlink()
        if f"{place.name}/scout" == LOCALIZER:

            def scout(dataset: Dataset, z: int) -> None:
                change(dataset, z)
                dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

            write_series(place / "scout", thin[:, :, 4:6], change=scout, number=3)
        rows.append({"AccessionNumber": f"A{1000 + case}", "report": f"Nodule in the {side} lung."})
    write_table(folder / "data" / "reports.csv", rows)


def with_block(side: str, *, size: int) -> sitk.Image:
    """The phantom with a block of 900 HU at one side."""
    voxels = body()
    x = 16 if side == "left" else 4
    voxels[4 : 6 + size, 9:15, x : x + 5] = 900
    image = sitk.GetImageFromArray(voxels)
    image.CopyInformation(phantom())
    return image


def image_table(folder: Path) -> None:
    """`data/images/*.png` and `data/questions.csv`: a drawn disc for each patient, two questions about
    most of them; the last images are in no table."""
    (folder / "data" / "images").mkdir(parents=True)
    rows = []
    for number in range(IMAGES):
        side, x = SIDES[number % 2], (70 if number % 2 == 0 else 10) + number
        noise = np.random.default_rng(number).integers(0, 60, (96, 96), np.uint8)
        image = Image.fromarray(noise)
        ImageDraw.Draw(image).ellipse((x, 40, x + 14, 54), fill=230)
        name = f"{number:02d}.png"
        image.save(folder / "data" / "images" / name)
        if number >= ASKED:
            continue
        for question, answer in (("Where is the disc?", side), ("Is there a disc?", "yes")):
            rows.append({
                "id": f"q{len(rows)}", "patient": f"p{number}", "image": name, "question": question,
                "answer": answer,
            })  # fmt: skip
    write_table(folder / "data" / "questions.csv", rows)


def write_table(file: Path, rows: list[dict[str, str]]) -> None:
    """A CSV with a header."""
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)
