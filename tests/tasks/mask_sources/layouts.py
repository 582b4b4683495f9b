"""Tiny drawn copies of the sources of grounded records, each in its published layout.

Each has usable rows, and rows and files of each kind that is left out. Every mask has another
number of pixels, so that a record shows by its numbers which masks it links.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medm.imaging.geometry import Geometry
from medm.imaging.nifti import write_nifti
from tests.tasks.layouts import m3d_refseg, put_array, put_image, put_json

SIZE = (40, 30)
"""Width and height of the images."""


@dataclass(frozen=True)
class Expected:
    """One record, without its question."""

    files: list[str]
    reply: str
    masks: list[list[int | None]] = field(default_factory=list)
    """Of each `[SEG]` the pixels of its masks; None for an absent target."""
    phrases: list[str | None] = field(default_factory=list)
    """Words that the reader links to each `[SEG]`."""


@dataclass(frozen=True)
class Layout:
    """How to write one, and the records that it gives."""

    build: Callable[[Path], None]
    expected: list[Expected]
    left_out: dict[str, int]
    """Reason to number of rows or files."""
    annotations: str
    """A file without which the source cannot be read."""


def put_mask(path: Path, pixels: int, top: int = 5, left: int = 5) -> None:
    """A PNG whose mask is a row of so many pixels."""
    mask = np.zeros(SIZE[::-1], np.uint8)
    mask[top, left : left + pixels] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def sentences(*texts: str) -> list[dict[str, str]]:
    return [{"raw": text, "sent": text} for text in texts]


def coco(root: Path, *, extra: tuple[dict[str, Any], ...] = ()) -> None:
    """A set of the BiomedParse layout whose ids do not fit."""
    for name in ("a_CT_liver", "b_CT_liver", "alone_CT_liver", "stray_CT_liver"):
        put_image(root / f"train/{name}.png", SIZE)
    put_mask(root / "train_mask/a_CT_liver_tumor.png", 3)
    put_mask(root / "train_mask/a_CT_liver_hepatic+vessel.png", 4)
    put_mask(root / "train_mask/b_CT_liver_tumor.png", 5)
    put_mask(root / "train_mask/b_CT_liver_left+lobe.png", 7)
    put_mask(root / "train_mask/stray.png", 6)
    rows: list[dict[str, Any]] = [
        {
            "file_name": "b_CT_liver.png",
            "image_id": 1,
            "mask_file": "b_CT_liver_tumor.png",
            "sentences": sentences("tumor in liver CT", "mass in liver CT", "tumor in liver CT"),
        },
        {
            "file_name": "a_CT_liver.png",
            "image_id": 2,
            "mask_file": "a_CT_liver_tumor.png",
            "sentences": sentences("tumor in liver CT"),
        },
        # No mask_file: named by the sentence. No sentences: named by the mask.
        {"file_name": "a_CT_liver.png", "sentences": sentences("hepatic vessel in liver CT")},
        {"file_name": "b_CT_liver.png", "mask_file": "b_CT_liver_left+lobe.png"},
        {"file_name": "away_CT_liver.png", "mask_file": "x.png", "sentences": sentences("x")},
        {"file_name": "a_CT_liver.png", "mask_file": "away.png", "sentences": sentences("x")},
        {"file_name": "a_CT_liver.png", "mask_file": "a_CT_liver_tumor.png", "sentences": "x"},
        {
            "file_name": "a_CT_liver.png",
            "mask_file": "a_CT_liver_tumor.png",
            "sentences": sentences("the [SEG] of x"),
        },
        {"file_name": "../../x.png", "mask_file": "x.png", "sentences": sentences("x")},
        {"image_id": 3},
        *extra,
    ]
    names = ("a_CT_liver", "b_CT_liver", "alone_CT_liver")
    images = [{"id": 7 - n, "file_name": f"{name}.png"} for n, name in enumerate(names)]
    put_json(root / "train.json", {"images": images, "annotations": rows})


COCO_LEFT_OUT = {
    "a file is missing": 2,
    "rows that cannot be used": 3,
    "a file that cannot be used": 1,
    "images without an annotation": 1,
    "image files that no row names": 1,
    "mask files that no row names": 1,
}


def biomedparse(root: Path) -> None:
    coco(root / "MSD-Liver")
    put_image(root / "Second/train/c_MR_brain.png", SIZE)
    put_mask(root / "Second/train_mask/c_MR_brain_glioma.png", 9)
    row = {
        "file_name": "c_MR_brain.png",
        "mask_file": "c_MR_brain_glioma.png",
        "sentences": sentences("glioma in brain MR"),
    }
    put_json(root / "Second/train.json", {"annotations": [row]})


def disease(root: Path) -> None:
    for name in ("a", "b"):
        put_image(root / f"Disease/Lung/train/{name}_X-ray_chest.png", SIZE)
        put_mask(root / f"Disease/Lung/train_mask/{name}_X-ray_chest_m.png", 3)
    rows = [
        {
            "file_name": "a_X-ray_chest.png",
            "mask_file": "a_X-ray_chest_m.png",
            "sentences": sentences("Pneumothorax in chest X-ray."),
        },
        {
            "file_name": "b_X-ray_chest.png",
            "mask_file": "b_X-ray_chest_m.png",
            "sentences": sentences("No findings in chest X-ray"),
        },
    ]
    put_json(root / "Disease/Lung/train.json", {"annotations": rows})


def region(root: Path) -> None:
    """Two large parts and a small one; only small parts; nothing at all."""
    masks = {name: np.zeros((60, 80), np.uint8) for name in ("large", "small", "empty")}
    masks["large"][5:30, 5:25] = masks["large"][5:30, 50:75] = masks["large"][50:52, 3:5] = 255
    masks["small"][10:20, 30:40] = 255
    rows = []
    for name, mask in masks.items():
        put_image(root / f"train/{name}.png", (80, 60))
        (root / "train_mask").mkdir(exist_ok=True)
        Image.fromarray(mask).save(root / f"train_mask/{name}_m.png")
        phrase = sentences("cyst in kidney ultrasound")
        rows.append({"file_name": f"{name}.png", "mask_file": f"{name}_m.png", "sentences": phrase})
    put_json(root / "train.json", {"annotations": rows})


def medtrinity(root: Path) -> None:
    put_image(root / "chest/a.jpg", SIZE)
    put_image(root / "train/b.jpg", SIZE)
    rows = [
        {"file_name": "chest/a.jpg", "caption": " A chest X-ray. "},
        {"file_name": "b.jpg", "caption": "A slice."},
        {"file_name": "c.jpg", "caption": "x"},
        {"file_name": "b.jpg", "caption": " "},
        {"file_name": "b.jpg", "caption": "See <region>."},
        {"file_name": "b.jpg"},
    ]
    put_json(root / "train.json", {"annotations": rows})


def radgenome(root: Path) -> None:
    for name in ("a", "b", "stray"):
        put_image(root / f"train/{name}.png", SIZE)
    put_mask(root / "train_mask/a_m.png", 3)
    put_mask(root / "train_mask/b_m.png", 4)

    def row(name: str, abnormality: str, **fields: str) -> dict[str, str]:
        report = "A Nodule of 4 mm."
        start = {"image_file": f"{name}.png", "mask_file": f"{name}_m.png", "report": report}
        return {**start, "abnormality": abnormality, "anatomy": "Left Lung", **fields}

    rows = {
        "0": row("a", "Lung Nodule."),
        "1": row("b", "No findings", report="Clear lungs"),
        "2": row("c", "x"),
        "3": row("a", "x", mask_file="away.png"),
        "4": row("a", " "),
        "5": {"image_file": "a.png"},
    }
    put_json(root / "train_parse.json", rows)


RADGENOME_LEFT_OUT = {
    "a file is missing": 2,
    "rows that cannot be used": 2,
    "image files that no row names": 1,
}


def slices(root: Path) -> None:
    """Two volumes; slice 1 is the beginning of the name of slice 10."""
    names = [f"v1_{number}.png" for number in (1, 2, 10)]
    for name in (*names, "v2_1.png", "stray.png"):
        put_image(root / f"3D/Lung/train/{name}", SIZE)
    for pixels, name in enumerate(("v1_1", "v1_2", "v1_10", "v2_1", "stray"), 3):
        put_mask(root / f"3D/Lung/train_mask/{name}_tumor.png", pixels)
    first = {
        "exp": "tumor in lung CT",
        "img_file": [*names, "v1_away.png"],
        "mask_file": [f"{Path(name).stem}_tumor.png" for name in names] + ["other_tumor.png"],
    }
    second = {"exp": "tumor in lung CT", "img_file": ["v2_1.png"], "mask_file": ["v2_1_tumor.png"]}
    empty = {"exp": "lobe in lung CT", "img_file": ["v2_1.png"], "mask_file": []}
    volumes = {
        "v1": {"slices": names, "expressions": {"0": first}},
        "v2": {"slices": ["v2_1.png"], "expressions": {"0": second, "1": empty}},
    }
    put_json(root / "3D/Lung/meta_train.json", {"volumes": volumes})


def m3d_seg(root: Path) -> None:
    put_json(root / "0003/0003.json", {
        "labels": {"0": "background", "1": "liver", "2": "[SEG]", "3": "spleen"},
        "train": [
            {"image": "0003/1/image.npy", "label": f"0003/1/masks/mask_{number}.npy"}
            for number in (0, 2, 1)
        ] + [{"image": "0003/1/image.npy", "label": "0003/2/masks/mask_0.npy"}],
    })  # fmt: skip
    put_array(root / "0003/1/image.npy", np.zeros((1, 4, 8, 8), np.float32))
    for number, voxels in ((0, 5), (1, 3), (2, 0)):
        mask = np.zeros((1, 4, 8, 8), np.int8)
        mask[0, 1, 2, :voxels] = 1
        put_array(root / f"0003/1/masks/mask_{number}.npy", mask)


def m3d_refseg_train(root: Path) -> None:
    m3d_refseg(root)
    file = root / "M3D_RefSeg.csv"
    case = "M3D_RefSeg_npy/s1"
    file.write_text(
        file.read_text()
        + f"{case}/image.npy,{case}/mask.npy,1,0,Where is it?,It is there.\n"
        + f"{case}/image.npy,{case}/mask.npy,one,0,Where is it?,[SEG].\n"
        + f"{case}/image.npy,M3D_RefSeg_npy/s2/mask.npy,1,0,Where is it?,[SEG].\n"
    )


def put_nifti(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, voxels, Geometry(np.array([3.0, 1.0, 1.0]), np.eye(3), np.zeros(3)))


def decathlon(root: Path) -> None:
    task = root / "Task03_Liver"
    labels = {1: (2, 5), 2: (3, 2)}
    for case, present in ((1, (1, 2)), (2, (1,)), (4, (1, 9))):
        voxels = np.zeros((4, 6, 7), np.int16)
        for value in present:
            row, count = labels.get(value, (0, 1))
            voxels[1, row, :count] = value
        put_nifti(
            task / f"imagesTr/liver_{case}.nii.gz", np.arange(168, dtype=np.int16).reshape(4, 6, 7)
        )
        put_nifti(task / f"labelsTr/liver_{case}.nii.gz", voxels)
    put_nifti(task / "labelsTr/liver_9.nii.gz", np.zeros((4, 6, 7), np.int16))
    rows = [
        {"image": f"./imagesTr/liver_{n}.nii.gz", "label": f"./labelsTr/liver_{n}.nii.gz"}
        for n in (1, 2, 3, 4)
    ]
    put_json(task / "dataset.json", {
        "name": "Liver", "modality": {"0": "CT"}, "numTraining": 4, "training": rows,
        "labels": {"0": "background", "1": "liver", "2": "liver_tumor"},
        "test": ["./imagesTs/liver_0.nii.gz"],
    })  # fmt: skip


def sa2va(root: Path) -> None:
    for name in ("a.png", "b.png", "stray.png"):
        put_image(root / f"images/{name}", SIZE)
    square = [2, 2, 5, 2, 5, 5, 2, 5]  # 4 x 4 pixel centers
    line = [10, 3, 14, 3, 14, 3]
    runs = {"size": [30, 40], "counts": [31, 2, 30 * 40 - 33]}
    rows = [
        {"image": "a.png", "mask": [[square, line], square], "text": ["the cell.", "a nucleus"]},
        {"image": "b.png", "mask": [runs], "text": ["gland"]},
        {"image": "b.png", "mask": [runs], "text": ["gland", "x"]},
        {"image": "b.png", "mask": [3], "text": ["gland"]},
        {"image": "c.png", "mask": [[square]], "text": ["x"]},
    ]
    put_json(root / "annotations.json", rows)


def segmented(files: list[str], pixels: int, phrase: str) -> Expected:
    """A record of the 2-D sets."""
    return Expected(files, "The mask is [SEG].", [[pixels]], [phrase])


def coco_records(top: str) -> list[Expected]:
    """What `coco` gives."""
    a, b = [f"{top}train/a_CT_liver.png"], [f"{top}train/b_CT_liver.png"]
    return [
        segmented(b, 5, "tumor in liver CT"),
        segmented(b, 5, "mass in liver CT"),
        segmented(a, 3, "tumor in liver CT"),
        segmented(a, 4, "hepatic vessel in liver CT"),
        segmented(b, 7, "left lobe in liver CT"),
    ]


LIVER = "Task03_Liver/imagesTr/liver_{}.nii.gz"

LAYOUTS: dict[str, Layout] = {
    "biomedparse": Layout(
        biomedparse,
        [
            *coco_records("MSD-Liver/"),
            segmented(["Second/train/c_MR_brain.png"], 9, "glioma in brain MR"),
        ],
        COCO_LEFT_OUT,
        "Second/train.json",
    ),
    "unibiomed/segmentation-2d": Layout(coco, coco_records(""), COCO_LEFT_OUT, "train.json"),
    "unibiomed/segmentation-3d": Layout(
        slices,
        [
            Expected(
                [f"3D/Lung/train/v1_{number}.png" for number in (1, 2, 10)],
                "The mask is [SEG].",
                [[3, 4, 5]],
                ["tumor in lung CT"],
            ),
            Expected(["3D/Lung/train/v2_1.png"], "The mask is [SEG].", [[6]], ["tumor in lung CT"]),
        ],
        {
            "a file is missing": 2,
            "rows that cannot be used": 2,
            "image files that no row names": 1,
            "mask files that no row names": 1,
        },
        "3D/Lung/meta_train.json",
    ),
    "unibiomed/disease": Layout(
        disease,
        [
            Expected(
                ["Disease/Lung/train/a_X-ray_chest.png"],
                "The finding is marked in [SEG]. pneumothorax in chest x-ray.",
                [[3]],
                ["pneumothorax in chest x-ray"],
            ),
            Expected(
                ["Disease/Lung/train/b_X-ray_chest.png"],
                "The finding is marked in [SEG]. no findings in chest x-ray.",
                [[None]],
                ["no findings in chest x-ray"],
            ),
        ],
        {},
        "Disease/Lung/train.json",
    ),
    "unibiomed/region": Layout(
        region,
        [
            Expected(["train/large.png"], "cyst in kidney ultrasound"),
            Expected(["train/small.png"], "cyst in kidney ultrasound"),
        ],
        {"rows that cannot be used": 1},
        "train.json",
    ),
    "unibiomed/medtrinity": Layout(
        medtrinity,
        [Expected(["chest/a.jpg"], "A chest X-ray."), Expected(["train/b.jpg"], "A slice.")],
        {"a file is missing": 1, "rows that cannot be used": 3},
        "train.json",
    ),
    "unibiomed/radgenome-report": Layout(
        radgenome,
        [
            Expected(
                ["train/a.png"],
                "<p> lung nodule. a nodule of 4 mm </p> [SEG]",
                [[3]],
                ["lung nodule. a nodule of 4 mm"],
            ),
            Expected(
                ["train/b.png"],
                "<p> no findings. clear lungs </p> [SEG]",
                [[None]],
                ["no findings. clear lungs"],
            ),
        ],
        RADGENOME_LEFT_OUT,
        "train_parse.json",
    ),
    "unibiomed/radgenome-vqa": Layout(
        radgenome,
        [
            Expected(["train/a.png"], "<p> lung nodule. </p> [SEG]", [[3]], ["lung nodule."]),
            Expected(["train/b.png"], "<p> no findings. </p> [SEG]", [[None]], ["no findings."]),
        ],
        RADGENOME_LEFT_OUT,
        "train_parse.json",
    ),
    "m3d-seg": Layout(
        m3d_seg,
        [
            Expected(["0003/1/image.npy"], "The mask of the liver is [SEG].", [[5]], ["liver"]),
            Expected(["0003/1/image.npy"], "There is no spleen in this scan."),
        ],
        {"a file is missing": 1, "rows that cannot be used": 1},
        "0003/0003.json",
    ),
    "m3d-refseg": Layout(
        m3d_refseg_train,
        [
            Expected(["M3D_RefSeg_npy/s1/image.npy"], "It is [SEG].", [[4]], [None]),
            Expected(["M3D_RefSeg_npy/s1/image.npy"], "The nodule, [SEG].", [[1]], [None]),
        ],
        {"a file is missing": 1, "rows that cannot be used": 2},
        "M3D_RefSeg.csv",
    ),
    "decathlon": Layout(
        decathlon,
        [
            Expected(
                [LIVER.format(1)],
                "<p> liver </p> [SEG], <p> liver tumor </p> [SEG].",
                [[5], [2]],
                ["liver", "liver tumor"],
            ),
            Expected(
                [LIVER.format(2)],
                "<p> liver </p> [SEG], <p> liver tumor </p> [SEG].",
                [[5], [None]],
                ["liver", "liver tumor"],
            ),
        ],
        {
            "a file is missing": 1,
            "rows that cannot be used": 1,
            "mask files that no row names": 1,
        },
        "Task03_Liver/dataset.json",
    ),
    "sa2va": Layout(
        sa2va,
        [
            Expected(
                ["images/a.png"], "The mask is [SEG].", [[21], [16]], ["the cell", "a nucleus"]
            ),
            Expected(["images/b.png"], "The mask is [SEG].", [[2]], ["gland"]),
        ],
        {
            "a file is missing": 1,
            "rows that cannot be used": 2,
            "image files that no row names": 1,
        },
        "annotations.json",
    ),
}
