"""Tiny made-up copies of the sources of pairs, each in its published layout.

Each has usable rows, and one row of each kind that is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.tasks.layouts import put_array, put_csv, put_image, put_json


@dataclass(frozen=True)
class Layout:
    """How to write one, and the records that it gives."""

    build: Callable[[Path], None]
    expected: list[tuple[str, list[str], str | None]]
    """Path, captions and label of each record."""
    left_out: dict[str, int]
    """Reason to number of rows."""
    annotations: str
    """A file or folder without which the source cannot be read."""


def images(root: Path, *paths: str) -> None:
    for path in paths:
        put_image(root / path, (8, 8))


def literal(*values: str) -> str:
    """A list as pandas writes it into a CSV field."""
    return repr(list(values))


def list_rows(paths: list[str], *, report: list[str] | None = None) -> list[dict[str, Any]]:
    """Rows of UniMed's caption CSV: two that can be used, no file, no caption, no list."""
    twelve = [f"caption {number}" for number in range(12)]
    rows = [
        {"filename": literal(paths[0]), "label": literal("b", "a"), "captions": literal(*twelve)},
        {"filename": literal(paths[1]), "label": literal("c"), "captions": literal("it's one", "")},
        {"filename": literal("away.png"), "label": literal("c"), "captions": literal("x")},
        {"filename": literal(paths[0]), "label": literal("c"), "captions": literal("nan", " ")},
        {"filename": "__import__('os')", "label": literal("c"), "captions": literal("x")},
        {"filename": literal("../../etc/passwd"), "label": literal(), "captions": literal("x")},
    ]
    if report is not None:
        rows = [row | {"report": text} for row, text in zip(rows, report, strict=True)]
    return rows


TEN = [f"caption {number}" for number in range(10)]
LIST_LEFT_OUT = {
    "no image file": 1,
    "no caption": 1,
    "rows that cannot be read": 1,
    "unusable path": 1,
}


def chexpert(root: Path) -> None:
    paths = ["CheXpert-v1.0-small/train/p1/s1/view1_frontal.jpg", "train/p2/s1/view1_frontal.jpg"]
    images(root, "train/p1/s1/view1_frontal.jpg", paths[1])
    put_csv(root / "chexpert_with_captions_only_frontal_view.csv", list_rows(paths))
    (root / "etc").mkdir()


def mimic_cxr(root: Path) -> None:
    paths = ["2.0.0/files/p10/p1/s1/a.jpg", "p10/p1/s2/b.jpg"]
    images(root, paths[0], f"2.0.0/files/{paths[1]}")
    put_csv(
        root / "2.0.0/files/mimic_cxr_with_captions_and_reports_only_frontal_view.csv",
        list_rows(paths, report=["", " The heart is large. ", "", "nan", "", "x"]),
    )


def openi(root: Path) -> None:
    images(root, "image/CXR1_1.png", "image/CXR2_1.png")
    names = ["CXR1_1", "CXR2_1", "CXR3_1", "CXR2_1", None]
    captions = ["clear lungs", "a nodule", "x", "", "x"]
    rows = [{"image_id": n, "caption": c} for n, c in zip(names, captions, strict=True)]
    put_json(root / "filter_cap.json", {"annotations": rows})
    variants = [["no opacity", "lungs are clear"], [], ["y"], [], ["y"]]
    put_json(root / "openai_refined_concepts.json", {"refined_captions": variants})


def chest_xray8(root: Path) -> None:
    images(root, "images/00000001_000.png", "images/00000002_000.png")
    put_csv(
        root / "Chest-Xray8_with_captions.csv",
        list_rows(["00000001_000.png", "00000002_000.png"]),
    )


def radimagenet(root: Path) -> None:
    paths = ["radiology_ai/CT/lung/nodule/a.png", "US/gb/b.png"]
    images(root, paths[0], f"radiology_ai/{paths[1]}")
    put_csv(root / "radiology_ai/radimagenet_with_captions_training_set.csv", list_rows(paths))


def retina_part1(root: Path) -> None:
    images(root, "03_IDRiD/a.jpg", "11_STARE/b.jpg", "06_DEN/c.jpg")
    rows = [
        {
            "filename": "03_IDRiD/a.jpg",
            "captions": literal(*(f"caption {number}" for number in range(12))),
            "sentence_level_captions": "long",
        },
        {
            "filename": "03_IDRiD/away.jpg",
            "captions": literal("x"),
            "sentence_level_captions": "long",
        },
    ]
    put_csv(root / "Retina-Annotations/03_IDRID.csv", rows)
    row = {"filename": "11_STARE/b.jpg", "captions": literal("two"), "sentence_level_captions": ""}
    damaged = row | {"captions": "['open"}
    put_csv(root / "Retina-Annotations/11_STARE.csv", [row, damaged])
    retina_part2(root)
    retina_part3(root)


def retina_part2(root: Path) -> None:
    images(root, "06_DEN/c.jpg", "06_DEN/d.jpg")
    rows = [
        {
            "image": "06_DEN/c.jpg",
            "atributes": "[]",
            "categories": literal("drusen", "65-year-old man", "10/02//15", "Yellow spots."),
        },
        {"image": "06_DEN/d.jpg", "atributes": "[]", "categories": literal("65-year-old man")},
        {"image": "06_DEN/d.jpg", "atributes": "[]", "categories": "[]"},
        {"image": "06_DEN/away.jpg", "atributes": "[]", "categories": literal("drusen")},
    ]
    put_csv(root / "Retina-Annotations/06_DEN.csv", rows)


def retina_part3(root: Path) -> None:
    images(root, "39_MM_Retinal_dataset/CFP/a.png")
    rows = [
        {"image": "39_MM_Retinal_dataset/CFP/a.png", "caption": "Drusen at the macula."},
        {"image": "39_MM_Retinal_dataset/CFP/b.png", "caption": "x"},
        {"image": "39_MM_Retinal_dataset/CFP/a.png", "caption": ""},
    ]
    put_csv(root / "Retina-Annotations/39_MM_Retinal_dataset.csv", rows)


def quilt_1m(root: Path) -> None:
    images(root, "quilt_1m/a.jpg")
    rows = [
        {"": 0, "caption": "A gland, in blue.", "image_path": "a.jpg", "subset": "quilt"},
        {"": 1, "caption": "Another text on it.", "image_path": "a.jpg", "subset": "quilt"},
        {"": 2, "caption": "x", "image_path": "b.jpg", "subset": "laion"},
    ]
    put_csv(root / "quilt_1M_lookup.csv", rows)


def pmc_oa(root: Path) -> None:
    place = "caption_T060_filtered_top4_sep_v0_subfigures"
    images(root, f"{place}/PMC1_F1_A.jpg")
    lines = [
        json.dumps({"image": "PMC1_F1_A.jpg", "caption": "A mass.", "alignment_type": "x"}),
        json.dumps({"image": "PMC1_F1_B.jpg", "caption": "x"}),
        json.dumps({"image": "PMC1_F1_A.jpg", "caption": None}),
        '{"image": oops}',
    ]
    (root / "pmc_oa.jsonl").write_text("\n".join(lines) + "\n")


def rocov2(root: Path) -> None:
    images(root, "train/ROCOv2_2023_train_000001.jpg")
    rows = [
        {"ID": "ROCOv2_2023_train_000001", "Caption": " CT of the head.\n"},
        {"ID": "ROCOv2_2023_train_000002", "Caption": "x"},
        {"ID": "ROCOv2_2023_train_000001", "Caption": ""},
    ]
    put_csv(root / "train_captions.csv", rows)


def llava_med_alignment(root: Path) -> None:
    images(root, "images/1.jpg")

    def record(image: Any, reply: Any) -> dict[str, Any]:
        turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": reply}]
        return {"id": "1", "image": image, "domain": {}, "conversations": turns}

    rows = [record("1.jpg", "An axial slice."), record("2.jpg", "x"), record("1.jpg", " \n")]
    rows.append({"id": "2", "image": "1.jpg", "conversations": []})
    put_json(root / "llava_med_alignment_500k_filtered.json", rows)


def llava_med_instruct(root: Path) -> None:
    images(root, "images/10_F1.jpg")
    mention = [{"tokens": "Fig 1 shows a cyst."}, {"tokens": "unused"}]
    figure = {"pair_id": "10_F1", "fig_caption": "A cyst.", "in_text_mention": mention}
    rows = {
        "chest_xray": [figure],
        "mri": [
            figure | {"in_text_mention": None},
            figure | {"pair_id": "10_F2", "in_text_mention": None},
            figure | {"fig_caption": None},
            {"fig_caption": "x"},
        ],
    }
    put_json(root / "llava_med_instruct_fig_captions.json", rows)


def chexpert_labels(root: Path) -> None:
    names = [f"train/p{number}/s1/view1_frontal.jpg" for number in range(4)]
    images(root, names[0], names[1], names[3])
    columns = ["No Finding", "Cardiomegaly", "Edema", "Support Devices"]

    def row(path: str, values: list[str], view: str = "Frontal") -> dict[str, Any]:
        start = {"Path": f"CheXpert-v1.0-small/{path}", "Sex": "Male", "Frontal/Lateral": view}
        return start | dict(zip(columns, values, strict=True))

    rows = [
        row(names[0], ["", "1.0", "1.0", ""]),
        row(names[1], ["1.0", "", "-1.0", ""]),
        row(names[1], ["1.0", "", "", ""], "Lateral"),
        row(names[2], ["1.0", "", "", ""]),
        row(names[3], ["", "0.0", "-1.0", ""]),
    ]
    put_csv(root / "train.csv", rows)


def chest_xray8_labels(root: Path) -> None:
    images(root, "images/1.png", "images_002/images/2.png", "images/9.png")
    findings = {"1": "Mass|Effusion", "2": "No Finding", "3": "Mass", "4": "Ghost", "9": "Mass"}
    rows = [{"Image Index": f"{k}.png", "Finding Labels": v} for k, v in findings.items()]
    put_csv(root / "Data_Entry_2017.csv", rows)
    (root / "train_val_list.txt").write_text("1.png\n2.png\n3.png\n4.png\n")


def radimagenet_labels(root: Path) -> None:
    place = "radiology_ai"
    images(root, *(f"{place}/{name}" for name in ("MR/knee/acl_tear/a.png", "US/gb/b.png")))
    images(root, f"{place}/CT/abd/normal/c.png", f"{place}/MR/astray.png")


def retina_labels(root: Path) -> None:
    images(root, "15_APTOS/a.png", "34_Cataract/b.png")
    categories = literal("no diabetic retinopathy")
    row = {"image": "15_APTOS/a.png", "atributes": "[]", "categories": categories}
    put_csv(root / "dataframes/15_APTOS.csv", [row, row | {"image": "15_APTOS/z.png"}])
    row = {"image": "34_Cataract/b.png", "atributes": "[]", "categories": literal("cataract")}
    put_csv(root / "dataframes/34_Cataract.csv", [row, row | {"categories": "[]"}])


def m3d_cap(root: Path) -> None:
    for name in ("000001/Axial", "000002/Axial"):
        put_array(root / f"ct_case/{name}.npy", np.zeros((1, 2, 4, 4), np.float32))
    (root / "ct_case/000001/text.txt").write_text("The liver is large.\n")
    case = "M3D_Cap/ct_case/000001"
    rows = [
        {"image": f"{case}/Axial.npy", "text": f"{case}/text.txt"},
        {"image": f"{case}/Coronal.npy", "text": f"{case}/text.txt"},
        {"image": "M3D_Cap/ct_case/000002/Axial.npy", "text": "M3D_Cap/ct_case/000002/text.txt"},
    ]
    put_json(root / "M3D_Cap.json", {"train": rows, "test": []})


def two(first: str, second: str) -> list[tuple[str, list[str], str | None]]:
    """What `list_rows` gives."""
    return [(first, TEN, "a, b"), (second, ["it's one"], "c")]


NORMAL = "A frontal chest radiograph without any abnormality."

LAYOUTS: dict[str, Layout] = {
    "unimed/chexpert": Layout(
        chexpert,
        two("train/p1/s1/view1_frontal.jpg", "train/p2/s1/view1_frontal.jpg"),
        LIST_LEFT_OUT,
        "chexpert_with_captions_only_frontal_view.csv",
    ),
    "unimed/mimic-cxr": Layout(
        mimic_cxr,
        [
            ("2.0.0/files/p10/p1/s1/a.jpg", TEN, "a, b"),
            ("2.0.0/files/p10/p1/s2/b.jpg", ["The heart is large."], None),
        ],
        LIST_LEFT_OUT,
        "2.0.0/files/mimic_cxr_with_captions_and_reports_only_frontal_view.csv",
    ),
    "unimed/openi": Layout(
        openi,
        [
            ("image/CXR1_1.png", ["clear lungs", "no opacity", "lungs are clear"], None),
            ("image/CXR2_1.png", ["a nodule"], None),
        ],
        {"no image file": 1, "no caption": 1, "rows that cannot be read": 1},
        "openai_refined_concepts.json",
    ),
    "unimed/chest-xray8": Layout(
        chest_xray8,
        two("images/00000001_000.png", "images/00000002_000.png"),
        LIST_LEFT_OUT,
        "Chest-Xray8_with_captions.csv",
    ),
    "unimed/radimagenet": Layout(
        radimagenet,
        two("radiology_ai/CT/lung/nodule/a.png", "radiology_ai/US/gb/b.png"),
        LIST_LEFT_OUT,
        "radiology_ai/radimagenet_with_captions_training_set.csv",
    ),
    "unimed/retina-part1": Layout(
        retina_part1,
        [("03_IDRiD/a.jpg", TEN, None), ("11_STARE/b.jpg", ["two"], None)],
        {"no image file": 1, "rows that cannot be read": 1},
        "Retina-Annotations",
    ),
    "unimed/retina-part2": Layout(
        retina_part2,
        [
            (
                "06_DEN/c.jpg",
                [
                    "Retinal fundus photograph; findings: drusen.",
                    "Retinal fundus photograph; findings: Yellow spots.",
                ],
                None,
            ),
            ("06_DEN/d.jpg", ["Retinal fundus photograph; findings: 65-year-old man."], None),
        ],
        {"no image file": 1, "no caption": 1},
        "Retina-Annotations/06_DEN.csv",
    ),
    "unimed/retina-part3": Layout(
        retina_part3,
        [("39_MM_Retinal_dataset/CFP/a.png", ["Drusen at the macula."], None)],
        {"no image file": 1, "no caption": 1},
        "Retina-Annotations/39_MM_Retinal_dataset.csv",
    ),
    "unimed/quilt-1m": Layout(
        quilt_1m,
        [
            ("quilt_1m/a.jpg", ["A gland, in blue."], None),
            ("quilt_1m/a.jpg", ["Another text on it."], None),
        ],
        {"no image file": 1},
        "quilt_1M_lookup.csv",
    ),
    "unimed/pmc-oa": Layout(
        pmc_oa,
        [("caption_T060_filtered_top4_sep_v0_subfigures/PMC1_F1_A.jpg", ["A mass."], None)],
        {"no image file": 1, "rows that cannot be read": 2},
        "pmc_oa.jsonl",
    ),
    "unimed/rocov2": Layout(
        rocov2,
        [("train/ROCOv2_2023_train_000001.jpg", ["CT of the head."], None)],
        {"no image file": 1, "no caption": 1},
        "train_captions.csv",
    ),
    "unimed/llava-med-alignment": Layout(
        llava_med_alignment,
        [("images/1.jpg", ["An axial slice."], None)],
        {"no image file": 1, "no caption": 1, "rows that cannot be read": 1},
        "llava_med_alignment_500k_filtered.json",
    ),
    "unimed/llava-med-instruct": Layout(
        llava_med_instruct,
        [
            ("images/10_F1.jpg", ["A cyst."], None),
            ("images/10_F1.jpg", ["Fig 1 shows a cyst."], None),
            ("images/10_F1.jpg", ["A cyst."], None),
            ("images/10_F1.jpg", ["Fig 1 shows a cyst."], None),
        ],
        {"no image file": 1, "no caption": 1, "rows that cannot be read": 1},
        "llava_med_instruct_fig_captions.json",
    ),
    "unimed/chexpert-labels": Layout(
        chexpert_labels,
        [
            (
                "train/p0/s1/view1_frontal.jpg",
                ["The heart is enlarged. The pattern is that of pulmonary edema."],
                "Cardiomegaly, Edema",
            ),
            ("train/p1/s1/view1_frontal.jpg", [NORMAL], "No Finding"),
        ],
        {"no image file": 1, "rows that cannot be read": 1},
        "train.csv",
    ),
    "unimed/chest-xray8-labels": Layout(
        chest_xray8_labels,
        [
            (
                "images/1.png",
                ["There is fluid in the pleural space. There is a mass in the lung."],
                "Effusion, Mass",
            ),
            ("images_002/images/2.png", [NORMAL], "No Finding"),
        ],
        {"no image file": 1, "rows that cannot be read": 1},
        "train_val_list.txt",
    ),
    "unimed/radimagenet-labels": Layout(
        radimagenet_labels,
        [
            (
                "radiology_ai/CT/abd/normal/c.png",
                ["CT image of a normal abdomen."],
                "CT/abd/normal",
            ),
            (
                "radiology_ai/MR/knee/acl_tear/a.png",
                ["MRI image of the knee with a tear of the anterior cruciate ligament."],
                "MR/knee/acl_tear",
            ),
            ("radiology_ai/US/gb/b.png", ["ultrasound image of the gallbladder."], "US/gb"),
        ],
        {"rows that cannot be read": 1},
        "radiology_ai",
    ),
    "unimed/retina-labels": Layout(
        retina_labels,
        [
            (
                "15_APTOS/a.png",
                ["Fundus photograph without signs of diabetic retinopathy."],
                "no diabetic retinopathy",
            ),
            ("34_Cataract/b.png", ["Fundus photograph with cataract."], "cataract"),
        ],
        {"no image file": 1, "no caption": 1},
        "dataframes",
    ),
    "m3d/cap": Layout(
        m3d_cap,
        [("ct_case/000001/Axial.npy", ["The liver is large."], None)],
        {"no image file": 1, "rows that cannot be read": 1},
        "M3D_Cap.json",
    ),
}
