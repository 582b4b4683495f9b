"""Tiny copies of the benchmarks, written in their published layouts. One builder a task, a few
records each."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Builder = Callable[[Path], None]


@dataclass(frozen=True)
class Layout:
    """How to write one, and what the tests have to know of it."""

    build: Builder
    count: int
    """Samples of the split that is scored."""
    missing: str
    """A file without which the split cannot be read."""
    options: dict[str, Any] = field(default_factory=dict)
    train: str = "train"
    scored: int | None = None
    """Items that scores are of, where some are for training."""


def put_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def put_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def put_image(path: Path, size: tuple[int, int] = (200, 100)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, 128).save(path)


def put_array(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def slake_tree(root: Path) -> None:
    for split, image in (("train", "xmlab0"), ("test", "xmlab1")):
        root.mkdir(exist_ok=True)
        (root / f"{split}.txt").write_text(f"{image}\n")
        put_image(root / f"imgs/{image}/source.jpg")
        question = {
            "img_name": f"{image}/source.jpg",
            "q_lang": "en",
            "content_type": "Organ",
            "modality": "CT",
        }
        put_json(root / f"imgs/{image}/question.json", [
            {**question, "qid": 1, "question": "Is there a liver?", "answer": "Yes", "answer_type": "CLOSED"},
            {**question, "qid": 2, "question": "Which organ?", "answer": "Left Lung", "answer_type": "OPEN"},
            {**question, "qid": 3, "question": "\u5668\u5b98", "answer": "\u809d", "q_lang": "zh"},
            {**question, "qid": 4, "question": "Empty?", "answer": "", "answer_type": "OPEN"},
        ])  # fmt: skip
        put_json(
            root / f"imgs/{image}/detection.json",
            [
                {"Liver": [20, 10, 100, 50]},
                {"Lung": [0, 0, 30, 30]},
                {"Lung": [60, 60, 30, 30]},
            ],
        )


def slake(root: Path) -> None:
    slake_tree(root)
    for split in ("train", "validate", "test"):
        rows = json.loads((root / "imgs/xmlab1/question.json").read_text())
        put_json(root / f"{split}.json", rows)


def sa_med2d(root: Path) -> None:
    for split in ("train", "test"):
        for modality, name in (("ct", "a1"), ("mr", "b2")):
            put_image(root / f"images_small_{split}/{modality}/{name}.png")
            put_json(
                root / f"regions_small_{split}/{modality}/{name}.json",
                [{f"{modality} organ": [10, 20, 80, 40]}],
            )


def path_vqa_rows(split: str) -> list[dict[str, Any]]:
    return [
        {
            "img_id": f"{split}_0",
            "sent": "is it red?",
            "question_id": 7,
            "answer_type": "yes/no",
            "label": {"no": 1},
        },
        {
            "img_id": f"{split}_0",
            "sent": "what is it?",
            "question_id": 8,
            "answer_type": "other",
            "label": {"liver": 1},
        },
    ]


def path_vqa(root: Path) -> None:
    import pickle

    for split in ("train", "val", "test"):
        put_image(root / f"images/{split}/{split}_0.jpg")
        (root / "qas").mkdir(exist_ok=True)
        (root / f"qas/{split}_vqa.pkl").write_bytes(pickle.dumps(path_vqa_rows(split)))


def vqa_rad(root: Path) -> None:
    put_image(root / "VQA_RAD Image Folder/s1.jpg")
    row = {"image_name": "s1.jpg", "question_type": "PRES", "image_organ": "CHEST"}
    put_json(
        root / "VQA_RAD Dataset Public.json",
        [
            {
                **row,
                "qid": 1,
                "question": "Is it big?",
                "answer": "No",
                "answer_type": "CLOSED",
                "phrase_type": "test_para",
            },
            {
                **row,
                "qid": 2,
                "question": "How many?",
                "answer": 2,
                "answer_type": "OPEN ",
                "phrase_type": "test_freeform",
            },
            {
                **row,
                "qid": 3,
                "question": "Where?",
                "answer": "lung",
                "answer_type": "OPEN",
                "phrase_type": "freeform",
            },
        ],
    )


def medpix(root: Path) -> None:
    for split in ("train", "test"):
        put_image(root / "images/m1.png")
        put_csv(root / f"MPx_Single_{split}.csv", [
            {"name": "/images/m1.png", "type": "caption", "context": "Axial CT with a  large mass\nin the liver."},
            {"name": "/images/m1.png", "type": "modality", "context": "CT"},
            {"name": "/images/m1.png", "type": "caption", "context": ""},
            {"name": "/images/m1.png", "type": "caption", "context": "Sagittal MR of the knee, torn meniscus."},
        ])  # fmt: skip


REPORTS = [
    "The heart is enlarged. Small left pleural effusion.",
    "No acute disease. The lungs are clear.",
]


def annotated(root: Path, images: str) -> None:
    rows = [
        {
            "id": f"s{n}",
            "report": REPORTS[n],
            "image_path": [f"s{n}/0.png", f"s{n}/1.png"],
            "split": "any",
        }
        for n in range(2)
    ]
    for row in rows:
        for path in row["image_path"]:
            put_image(root / images / path)
    put_json(root / "annotation.json", dict.fromkeys(("train", "val", "test"), rows))


def medmnist(root: Path, name: str, colour: bool) -> None:
    root.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        shape = (3, 28, 28, 3) if colour else (3, 28, 28)
        arrays[f"{split}_images"] = random.integers(0, 255, shape, dtype=np.uint8)
        arrays[f"{split}_labels"] = np.array([[0], [4], [1]], dtype=np.uint8)
    np.savez_compressed(root / f"{name}_224.npz", **arrays)


def m3d_cap(root: Path) -> None:
    rows = []
    for n in range(2):
        image = f"ct_case/00000{n}/Axial_C__portal_venous_phase.npy"
        put_array(root / image, np.zeros((1, 2, 4, 4), dtype=np.float32))
        (root / f"ct_case/00000{n}/text.txt").write_text(REPORTS[n] + "\n")
        rows.append({"image": f"M3D_Cap/{image}", "text": f"M3D_Cap/ct_case/00000{n}/text.txt"})
    put_json(
        root / "M3D_Cap.json", {"train": rows, "validation": rows, "test": rows, "test100": rows}
    )


def m3d_vqa(root: Path) -> None:
    put_array(root / "ct_case/000000/Axial.npy", np.zeros((1, 2, 4, 4), dtype=np.float32))
    row = {"Image Path": "M3D_Cap/ct_case/000000/Axial.npy", "Text": "t"}
    choices = {
        f"Choice {c}": t
        for c, t in zip("ABCD", ("Axial", "Sagittal", "Coronal", "Oblique"), strict=True)
    }
    rows = [
        {
            **row,
            "Question Type": 1,
            "Question": "Which plane?",
            **choices,
            "Answer": "Sagittal",
            "Answer Choice": "B",
        },
        {
            **row,
            "Question Type": 1,
            "Question": "Plane?",
            **choices,
            "Answer": "Axial",
            "Answer Choice": "A",
        },
        {
            **row,
            "Question Type": 5,
            "Question": "Where, left, is it?",
            **choices,
            "Answer": "Oblique",
            "Answer Choice": "D",
        },
    ]
    for split in ("train", "test", "test5k"):
        put_csv(root / f"M3D_VQA_{split}.csv", rows)


def m3d_seg(root: Path) -> None:
    for number, names in (("0000", ["liver"]), ("0003", ["liver", "kidney"])):
        put_array(root / f"{number}/1/image.npy", np.zeros((1, 8, 16, 16), dtype=np.float32))
        rows = []
        for index, _ in enumerate(names):
            mask = np.zeros((1, 8, 16, 16), dtype=bool)
            mask[0, 2 : 4 + index, 4:9, 3] = True
            put_array(root / f"{number}/1/masks/mask_{index}.npy", mask)
            rows.append(
                {"image": f"{number}/1/image.npy", "label": f"{number}/1/masks/mask_{index}.npy"}
            )
        put_array(
            root / f"{number}/1/masks/mask_{len(names)}.npy", np.zeros((1, 1, 1, 1), dtype=bool)
        )
        rows.append(
            {"image": f"{number}/1/image.npy", "label": f"{number}/1/masks/mask_{len(names)}.npy"}
        )
        labels = {"0": "background", **{str(i + 1): n for i, n in enumerate([*names, "spleen"])}}
        put_json(root / f"{number}/{number}.json", {"labels": labels, "train": rows, "test": rows})


def m3d_refseg(root: Path) -> None:
    mask = np.zeros((1, 4, 8, 8), dtype=np.int32)
    mask[0, 1, 2:4, 2:4], mask[0, 2, 5, 5] = 1, 2
    put_array(root / "M3D_RefSeg_npy/s1/image.npy", np.zeros((1, 4, 8, 8), dtype=np.float32))
    put_array(root / "M3D_RefSeg_npy/s1/mask.npy", mask)
    row = {"Image": "M3D_RefSeg_npy/s1/image.npy", "Mask": "M3D_RefSeg_npy/s1/mask.npy"}
    rows = [
        {
            **row,
            "Mask_ID": 1,
            "Question_Type": 0,
            "Question": "Segment the cyst.",
            "Answer": "It is [SEG].",
        },
        {
            **row,
            "Mask_ID": 2,
            "Question_Type": 1,
            "Question": "What may grow?",
            "Answer": "The nodule, [SEG].",
        },
    ]
    put_csv(root / "M3D_RefSeg.csv", rows)
    put_csv(root / "M3D_RefSeg_test.csv", rows)


def ct_rate(root: Path) -> None:
    volume = root / "dataset/valid_fixed/valid_1/valid_1_a/valid_1_a_1.nii.gz"
    volume.parent.mkdir(parents=True, exist_ok=True)
    volume.write_bytes(b"a volume is not opened by a task")
    turns = [
        ("<image>\nWhat do the lungs show?<long_answer>", REPORTS[0]),
        ("Is there an effusion?<short_answer>", "Yes, on the left."),
        (
            "What is enlarged? (a) the heart (b) the liver (c) nothing<multiple_choice>",
            "(a) the heart",
        ),
        ("Which side? (a) left, (b) right<multiple_choice>", "(b) right"),
        ("Is the heart big?<short_answer>", "No."),
        ("Write the report.<report_generation>", "Long."),
        ("And the bones?<long_answer>", REPORTS[1]),
    ]
    spoken = [
        {"from": who, "value": text}
        for pair in turns
        for who, text in zip(("human", "gpt"), pair, strict=True)
    ]
    report = {
        "VolumeName": "valid_1_a_1.nii.gz",
        "ClinicalInformation_EN": "",
        "Technique_EN": "CT",
    }
    for split, long in (("train", "train"), ("valid", "validation")):
        put_json(
            root / f"dataset/vqa/{split}_vqa.json",
            [{"id": "valid_1_a_1", "image": "valid_1_a_1.nii.gz", "conversations": spoken}],
        )
        put_csv(
            root / f"dataset/radiology_text_reports/{long}_reports.csv",
            [
                {**report, "Findings_EN": REPORTS[0], "Impressions_EN": "Effusion."},
            ],
        )


def medqa(root: Path) -> None:
    options = {"A": "Aspirin", "B": "Heparin", "C": "Rest"}
    rows = [
        {
            "question": "A man has pain. Which drug?",
            "answer": "Heparin",
            "options": options,
            "answer_idx": "B",
        },
        {"question": "A woman is tired. What helps?", "answer": "Rest", "options": options},
    ]
    for split in ("train", "dev", "test"):
        path = root / f"questions/US/{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")


def pubmedqa(root: Path) -> None:
    rows = {
        str(n): {
            "QUESTION": f"Does it help {n}?",
            "CONTEXTS": ["We tried.", "It may."],
            "final_decision": decision,
        }
        for n, decision in enumerate(("yes", "no", "maybe"))
    }
    for split in ("train", "test"):
        put_json(root / f"{split}_set.json", rows)


def custom(root: Path) -> None:
    put_image(root / "a.png")
    records = [
        {
            "id": str(n),
            "image": "a.png",
            "organ": organ,
            "conversations": [
                {"from": "human", "value": f"<image>\nQuestion {n}?"},
                {"from": "gpt", "value": answer},
            ],
        }
        for n, (organ, answer) in enumerate([("lung", "yes"), ("liver", "no")])
    ]
    put_json(root / "mine.json", records)


def breast_us(root: Path) -> None:
    for split in ("train", "test"):
        rows = [
            {"image": f"images/{split}{n}.png", "label": label}
            for n, label in enumerate(("benign", "malignant", "1"))
        ]
        for row in rows:
            put_image(root / row["image"], (20, 10))
        put_csv(root / f"{split}.csv", rows)


def pairs(root: Path) -> None:
    rows = [{"id": f"p{n}", "image": f"{n}.png", "captions": [f"finding {n}"]} for n in range(3)]
    for row in rows:
        put_image(root / str(row["image"]), (8, 8))
    put_json(root / "pairs.json", rows)


def own_studies(root: Path) -> None:
    """Three studies of three patients, the first with two images."""
    effusion, mass = (1, 0, 1), (0, 1, None)
    rows = [
        {
            "id": f"s{n}",
            "patient": f"p{n}",
            "images": [f"{n}.png", f"{n}b.png"][: 2 - (n > 0)],
            "report": f"finding {n}",
            "labels": {"effusion": effusion[n], "mass": mass[n]},
        }
        for n in range(3)
    ]
    for row in rows:
        for path in row["images"]:
            put_image(root / path, (8, 8))
    put_json(root / "studies.json", rows)


def nih(root: Path) -> None:
    """ChestX-ray14: twenty images of ten patients to learn from, four of two patients to test."""
    found = ["Hernia", "No Finding", "Mass|Effusion", "No Finding"]
    rows = [
        {
            "Image Index": f"{n:08d}_000.png",
            "Finding Labels": found[n % 4],
            "Follow-up #": 0,
            "Patient ID": n // 2,
            "View Position": "PA",
        }
        for n in range(24)
    ]
    put_csv(root / "Data_Entry_2017.csv", rows)
    names = [str(row["Image Index"]) for row in rows]
    for place, name in enumerate(names):
        put_image(root / f"images_{1 + place // 12:03d}/images" / name, (8, 8))
    (root / "train_val_list.txt").write_text("\n".join(names[:20]) + "\n")
    (root / "test_list.txt").write_text("\n".join(names[20:]) + "\n")


def mimic_labels(root: Path) -> None:
    """MIMIC-CXR-JPG: a study of each split, three to test; the first of these has two images."""
    from medm.tasks.study_sources.base import CHEXPERT_LABELS

    rows, labels = [], []
    for n, split in enumerate(("test", "test", "test", "validate", "train")):
        for view in range(1 + (n == 0)):
            rows.append(
                {
                    "dicom_id": f"d{n}{view}",
                    "study_id": f"5{n}",
                    "subject_id": f"1{n}",
                    "split": split,
                }
            )
            put_image(root / f"files/p1{n}/p1{n}/s5{n}/d{n}{view}.jpg", (8, 8))
        states = dict.fromkeys(CHEXPERT_LABELS, "")
        states |= {"Edema": ("1.0", "0.0", "-1.0")[n % 3], "Fracture": ("", "1.0", "0.0")[n % 3]}
        labels.append({"subject_id": f"1{n}", "study_id": f"5{n}", **states})
    put_csv(root / "mimic-cxr-2.0.0-split.csv", rows)
    put_csv(root / "mimic-cxr-2.0.0-chexpert.csv", labels)


def put_mask(
    path: Path, *boxes: tuple[int, int, int, int], size: tuple[int, int] = (40, 30)
) -> None:
    """A mask of boxes x1, y1, x2, y2 in an image of `size`."""
    mask = np.zeros(size[::-1], dtype=np.uint8)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


BOX = (4, 5, 14, 11)


def biomed_set(
    root: Path, targets: list[tuple[str, str, tuple[int, int, int, int] | None]]
) -> None:
    """A set in BiomedParse's layout: images, phrases, and boxes of their masks."""
    for split in ("train", "test"):
        rows = []
        for number, (image, phrase, box) in enumerate(targets):
            put_image(root / split / f"{image}.png", (40, 30))
            mask = f"{image}_{number}.png"
            put_mask(root / f"{split}_mask" / mask, *([] if box is None else [box]))
            rows.append({
                "id": number + 100, "image_id": 7, "file_name": f"{image}.png", "mask_file": mask,
                "split": split, "sentences": [{"raw": phrase, "sent": phrase}, {"sent": "other"}],
            })  # fmt: skip
        put_json(root / f"{split}.json", {"images": [], "annotations": rows})


def unibiomed_seg2d(root: Path) -> None:
    biomed_set(
        root / "GlaS",
        [("a_PATH", "gland in colon pathology", BOX), ("b_PATH", "gland in colon pathology", BOX)],
    )
    biomed_set(
        root / "ACDC",
        [("c_MRI", "left ventricle in heart MRI", BOX), ("c_MRI", "scar in heart MRI", None)],
    )


def unibiomed_disease(root: Path) -> None:
    biomed_set(
        root / "Polyp",
        [("a", "polyp in colon endoscopy", BOX), ("b", "polyp in colon endoscopy", BOX)],
    )
    biomed_set(root / "NoFindings", [("c", "no findings in chest X-Ray", None)])


def unibiomed_region(root: Path) -> None:
    biomed_set(
        root / "Kidney",
        [
            ("a", "left kidney in abdomen CT", BOX),
            ("a", "right kidney in abdomen CT", (20, 5, 30, 15)),
        ],
    )
    biomed_set(
        root / "Liver", [("b", "liver in abdomen CT", BOX), ("b", "tumor in liver CT", None)]
    )


def unibiomed_seg3d(root: Path) -> None:
    for split in ("train", "test"):
        for name in ("v1", "v2"):
            slices = [f"{name}/{name}-{number}.png" for number in range(4)]
            for path in slices:
                put_image(root / "Spleen" / split / path, (40, 30))
            masks = [f"{name}-{number}_CT_abdomen_spleen.png" for number in (1, 2)]
            for path in masks:
                put_mask(root / "Spleen" / f"{split}_mask" / path, BOX)
            volume = {
                "slices": slices,
                "expressions": {
                    "0": {
                        "exp": "spleen in abdomen CT",
                        "mask_file": masks,
                        "img_file": slices[1:3],
                    },
                    "1": {"exp": "tumor in abdomen CT", "mask_file": [], "img_file": []},
                },
            }
            if name == "v1":
                volume["spacing"] = [5.0, 0.5, 0.5]
            file = root / "Spleen" / f"meta_{split}.json"
            known = json.loads(file.read_text())["volumes"] if file.is_file() else {}
            put_json(file, {"volumes": {**known, name: volume}})


def medtrinity(root: Path) -> None:
    for split in ("train", "test"):
        rows = [{"file_name": f"{split}/sub/{n}.png", "caption": REPORTS[n]} for n in range(2)]
        for row in rows:
            put_image(root / row["file_name"])
        put_json(root / f"{split}.json", {"images": [], "annotations": rows})


def radgenome(root: Path) -> None:
    for split in ("train", "test"):
        rows = {}
        for n, (abnormality, report) in enumerate(
            [("pleural effusion", REPORTS[0]), ("No findings", REPORTS[1])]
        ):
            put_image(root / split / f"{n}.png", (40, 30))
            put_mask(root / f"{split}_mask" / f"{n}.png", BOX)
            rows[str(n)] = {
                "abnormality": abnormality, "image_file": f"{n}.png", "mask_file": f"{n}.png",
                "report": report, "anatomy": "lung",
            }  # fmt: skip
        put_json(root / f"{split}_parse.json", rows)


def rexgroundingct(root: Path) -> None:
    import SimpleITK as sitk

    splits = {}
    for split, name in (("train", "train_1_a_1.nii.gz"), ("val", "train_2_a_1.nii.gz")):
        volume = np.zeros((5, 12, 10), dtype=np.int16)  # [z, y, x]
        place = root / f"dataset/train_fixed/{name[:7]}/{name[:9]}/{name}"
        place.parent.mkdir(parents=True, exist_ok=True)
        scan = sitk.GetImageFromArray(volume)
        scan.SetSpacing((0.7, 0.7, 3.0))
        sitk.WriteImage(scan, str(place))
        masks = np.zeros((2, 5, 12, 10), dtype=np.uint8)  # [finding, z, y, x]
        masks[0, 1:3, 2:5, 2:5], masks[0, 1:3, 8:10, 2:5] = 1, 2
        masks[1, 3, 2:8, 6:9] = 1
        put_stack(root / "segmentations" / name, masks)
        splits[split] = [
            {"name": name, "findings": {"0": "nodules in the right lung", "1": "a left effusion"},
             "categories": {"0": "2d", "1": "2e"}, "shape": [10, 12, 5]}
        ]  # fmt: skip
    put_json(root / "dataset.json", {**splits, "test": []})


def put_stack(path: Path, stack: np.ndarray) -> None:
    """A NIfTI-1 file with the axes (volume, x, y, z) from an array (volume, z, y, x) of bytes."""
    import gzip
    import struct

    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 4, *(len(stack), *stack.shape[:0:-1]), 1, 1, 1)
    struct.pack_into("<2h", header, 70, 2, 8)
    struct.pack_into("<8f", header, 76, *[1.0] * 8)
    struct.pack_into("<f", header, 108, 352.0)
    header[344:348] = b"n+1\0"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(bytes(header) + np.moveaxis(stack, 0, -1).tobytes()))


LAYOUTS: dict[str, Layout] = {
    "slake-vqa": Layout(slake_tree, 2, "imgs/xmlab1/question.json"),
    "slake-rec": Layout(slake_tree, 3, "imgs/xmlab1/detection.json"),
    "slake-reg": Layout(slake_tree, 3, "test.txt"),
    "slake": Layout(slake, 2, "test.json"),
    "path-vqa": Layout(path_vqa, 2, "qas/test_vqa.pkl"),
    "vqa-rad": Layout(vqa_rad, 2, "VQA_RAD Dataset Public.json"),
    "sa-med2d-rec": Layout(sa_med2d, 2, "regions_small_test"),
    "sa-med2d-reg": Layout(sa_med2d, 2, "images_small_test"),
    "medpix": Layout(medpix, 2, "MPx_Single_test.csv"),
    "mimic-caption": Layout(lambda root: annotated(root, "files"), 2, "files"),
    "mimic-cxr": Layout(lambda root: annotated(root, "images"), 2, "annotation.json"),
    "iu-xray": Layout(lambda root: annotated(root, "images"), 2, "images"),
    "medmnist-derma": Layout(lambda root: medmnist(root, "dermamnist", True), 3, "dermamnist_224.npz"),
    "medmnist-organs": Layout(lambda root: medmnist(root, "organsmnist", False), 3, "organsmnist_224.npz"),
    "m3d-cap": Layout(m3d_cap, 2, "M3D_Cap.json"),
    "m3d-vqa-open": Layout(m3d_vqa, 3, "M3D_VQA_test.csv"),
    "m3d-vqa-closed": Layout(m3d_vqa, 3, "M3D_VQA_test.csv"),
    "m3d-rec": Layout(m3d_seg, 3, "0003/1/masks/mask_1.npy"),
    "m3d-reg": Layout(m3d_seg, 3, "0000/1/masks/mask_0.npy"),
    "m3d-seg": Layout(m3d_seg, 3, "0003/1/masks/mask_0.npy"),
    "m3d-refseg": Layout(m3d_refseg, 2, "M3D_RefSeg_test.csv"),
    "unibiomed-seg2d": Layout(unibiomed_seg2d, 4, "GlaS/test_mask", scored=3),
    "unibiomed-seg3d": Layout(unibiomed_seg3d, 4, "Spleen/test/v1/v1-2.png", scored=2),
    "unibiomed-disease": Layout(unibiomed_disease, 3, "Polyp/test.json"),
    "unibiomed-region": Layout(unibiomed_region, 3, "Kidney/test_mask/a_0.png"),
    "medtrinity-report": Layout(medtrinity, 2, "test.json"),
    "radgenome-report": Layout(radgenome, 2, "test_parse.json"),
    "radgenome-vqa": Layout(radgenome, 2, "test_parse.json"),
    "rexgroundingct": Layout(rexgroundingct, 2, "segmentations/train_2_a_1.nii.gz"),
    "ct-rate-report": Layout(ct_rate, 1, "dataset/radiology_text_reports/validation_reports.csv"),
    "ct-rate-choice": Layout(ct_rate, 2, "dataset/vqa/valid_vqa.json"),
    "ct-rate-short": Layout(ct_rate, 2, "dataset/valid_fixed/valid_1/valid_1_a/valid_1_a_1.nii.gz"),
    "ct-rate-long": Layout(ct_rate, 2, "dataset/vqa/valid_vqa.json"),
    "medqa": Layout(medqa, 2, "questions/US/test.jsonl"),
    "pubmedqa": Layout(pubmedqa, 3, "test_set.json"),
    "zero-shot": Layout(breast_us, 3, "test.csv", {"card": "breast-us"}),
    "probe": Layout(breast_us, 6, "train.csv", {"card": "breast-us"}, scored=3),
    "retrieval": Layout(pairs, 3, "pairs.json", {"path": "pairs.json"}),
    "study-retrieval": Layout(own_studies, 3, "studies.json", {"path": "studies.json", "rerank": 2}),
    "study-labels": Layout(own_studies, 3, "studies.json", {"path": "studies.json"}),
    "nih-chest-xray14": Layout(nih, 4, "test_list.txt"),
    "mimic-cxr-labels": Layout(mimic_labels, 3, "mimic-cxr-2.0.0-chexpert.csv"),
    "custom": Layout(
        custom, 2, "mine.json",
        {"path": "mine.json", "metrics": [{"name": "closed-accuracy"}, {"name": "rouge", "stem": True}],
         "group_by": ["organ"]},
    ),
}  # fmt: skip
