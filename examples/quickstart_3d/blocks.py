"""Cut blocks out of CT volumes, with true answers, and write them as MedM-VL / LLaVA JSON.

    python examples/quickstart_3d/blocks.py [folder, by default work_dirs/quickstart_3d/data]

The volumes, and which of them are held out, are those of the 2-D quickstart
(`../quickstart/data/volumes.yaml`), CT alone. A block is a slab (a third of the lungs or of the
brain, in full width) or a half of the body. What is asked is known from where it was cut: the
region, the third, and the side, which is the patient's and never mirrored.

Written: volumes/*.nii.gz in HU, images/*.png for people to look at, finetune.json, test.json and
about.json.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1] / "quickstart"))

from fetch import REPOSITORY
from prepare import LEVELS, SEED, Scan, View, as_question, dump, place, record
from volumes import PLANES, read_table

QUESTIONS = {
    "region": ("Which region is shown: head, chest or abdomen?", ("head", "chest", "abdomen")),
    "level": ("Which third of the organ is this: lower, middle or upper?", LEVELS),
    "side": ("Which half of the body is this: left or right?", ("left", "right")),
}
NOTES = (
    "Not for clinical use. This shows that the machinery learns, and nothing about medicine: two "
    "held-out volumes, and a third one where it could be fetched.",
    "Blocks of one volume overlap each other, so volumes are what counts, and with so few the "
    "interval is rough.",
    "The only head that is trained on is an average brain without its skull.",
)
SLABS, HALVES = 15, 14
"""Blocks of each kind that are cut from a volume to train on; to test, two thirds of it."""
BODY_HU = -300
AIR = -1024
PADDED = {"head-ct-atlas": 0}
"""Value that stands for "nothing here" in a volume where it is not air; it becomes air."""


@dataclass(frozen=True)
class Block:
    """A box of voxels, first and behind the last index along (superior, posterior, left)."""

    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    answers: dict[str, str]


def main(arguments: list[str]) -> int:
    """Write everything. Returns the exit status."""
    folder = (
        Path(arguments[0]) if arguments else REPOSITORY / "work_dirs" / "quickstart_3d" / "data"
    )
    if (folder / "test.json").is_file():
        print(f"  blocks                   here already ({folder})")
        return 0
    shutil.rmtree(folder, ignore_errors=True)
    for kind in ("volumes", "images"):
        (folder / kind).mkdir(parents=True)
    train: list[dict[str, object]] = []
    test: list[dict[str, object]] = []
    for name, about in read_table().items():
        scan = (
            Scan.load(name, about) if about.modality == "CT" and about.region != "spine" else None
        )
        if scan is None:
            continue
        random = np.random.default_rng([SEED, *name.encode()])
        for number, block in enumerate(cut(scan, random)):
            file = f"{name}_{number:02d}"
            voxels = save(scan, block, folder / "volumes" / f"{file}.nii.gz")
            media = {"volume": [f"{file}.nii.gz"]}
            source = {"source_volume": name, "split": about.split}
            if about.split == "train":
                kinds = [str(kind) for kind in random.permutation(list(block.answers))]
                turns = [(QUESTIONS[kind][0], block.answers[kind]) for kind in kinds]
                train.append(record(file, "vqa", turns, media=media, **source))
                continue
            picture = f"{file}.png"
            look(scan, voxels).save(folder / "images" / picture)
            for kind, answer in block.answers.items():
                turn = (QUESTIONS[kind][0], answer)
                asked = record(
                    file, "vqa", [turn], media=media, **source, picture=picture, question_type=kind
                )
                test.append(as_question(asked))
    dump(folder / "about.json", {"questions": QUESTIONS, "notes": NOTES})
    dump(folder / "finetune.json", train)
    dump(folder / "test.json", test)  # last: its presence means that all is there
    print(
        f"  blocks                   {len(train)} to train on, "
        f"{len(list((folder / 'images').iterdir()))} held out"
    )
    return 0


def cut(scan: Scan, random: np.random.Generator) -> Iterator[Block]:
    """Slabs, and halves where left and right differ."""
    share = 1.0 if scan.about.split == "train" else 2 / 3
    for number in range(round(SLABS * share)):
        yield slab(scan, number, random)
    for number in range(round(HALVES * share) if scan.about.region != "head" else 0):
        yield half(scan, ("left", "right")[number % 2], random)


def slab(scan: Scan, number: int, random: np.random.Generator) -> Block:
    """Whole slices: the wanted third where thirds are asked for, moved by a little; anywhere else
    any third.
    """
    depth = scan.voxels.shape[0]
    low, high = scan.about.level or (0, depth - 1)
    thickness = max(4, round((high + 1 - low) / 3))
    start = (
        low + thickness * (number % 3)
        if scan.about.level
        else random.integers(0, depth - thickness + 1)
    )
    start = int(
        np.clip(start + round(thickness * random.uniform(-0.15, 0.15)), 0, depth - thickness)
    )
    answers = {"region": scan.about.region}
    if scan.about.level:
        answers["level"] = LEVELS[number % 3]
    return Block(((start, start + thickness), *_inside(scan, random)), answers)


def half(scan: Scan, side: str, random: np.random.Generator) -> Block:
    """The patient's left or right half, over most of the height."""
    depth, _, columns = scan.voxels.shape
    height = max(4, round(depth * random.uniform(0.5, 0.8)))
    start = int(random.integers(0, depth - height + 1))
    rows, (first, last) = _inside(scan, random)
    # The last axis points to the patient's left.
    middle = midline(scan.voxels) + round(columns * random.uniform(-0.02, 0.02))
    across = (middle, last) if side == "left" else (first, middle)
    return Block(
        ((start, start + height), rows, across), {"region": scan.about.region, "side": side}
    )


def midline(voxels: np.ndarray) -> int:
    """The column that halves the body, by volume."""
    weight = np.cumsum((voxels > BODY_HU).sum(axis=(0, 1)))
    return int(np.searchsorted(weight, weight[-1] / 2))


def _inside(scan: Scan, random: np.random.Generator) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns without a random part of the margin."""
    ranges = []
    for size in scan.voxels.shape[1:]:
        near, far = (round(size * random.uniform(0, 0.06)) for _ in range(2))
        ranges.append((near, size - far))
    return ranges[0], ranges[1]


def save(scan: Scan, block: Block, file: Path) -> np.ndarray:
    """Write the block in HU with its geometry; returns its voxels."""
    voxels = scan.voxels[tuple(slice(*bounds) for bounds in block.box)]
    if scan.name in PADDED:
        voxels = np.where(voxels == PADDED[scan.name], AIR, voxels)
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.astype(np.int16)))
    image.SetSpacing(
        [float(length) for length in scan.spacing[::-1]]
    )  # axes left, posterior, superior: DICOM's own
    sitk.WriteImage(image, file, True, 1)
    return voxels


def look(scan: Scan, voxels: np.ndarray) -> Image.Image:
    """The three middle planes side by side, as radiologists look at them."""
    planes = []
    for plane in PLANES:
        middle = voxels.shape[("axial", "coronal", "sagittal").index(plane)] // 2
        pixels = scan.slice(voxels, plane, middle).astype(np.float64)
        low, high = (-1000, 400) if scan.about.region == "chest" else (-160, 240)
        shown = np.round(np.clip((pixels - low) / (high - low), 0, 1) * 255).astype(np.uint8)
        planes.append(np.asarray(place(shown, scan.pixel_size(plane), View((0, 255)))))
    return Image.fromarray(np.concatenate(planes, axis=1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
