"""Cut the committed volumes into pictures with true answers, and write them as MedM-VL / LLaVA
JSON.

    python examples/quickstart/prepare.py [folder, by default work_dirs/quickstart/data]

What is asked is known from the volume a picture was cut from: its modality and region, the plane of
the cut, the third of the lungs or the brain it went through, and whether it met a lesion that the
source marked. Nothing is labelled by eye or by a model. Training pictures are turned, moved,
resized and brightened a little, never mirrored: in a mirrored chest the heart is on the wrong side.
Test pictures come from other volumes (`data/volumes.yaml`) and are only placed.

Written: images/*.png, pretrain.json (captions), finetune.json (questions), test.json (questions,
`answer` beside them), about.json (for report.py), pictures.json (what is known of each picture),
tasks_train.json and tasks_test.json (caption, vqa, cls, rec, reg). The same seed gives the same
files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from fetch import ASSETS, REPOSITORY
from PIL import Image
from volumes import AXIS, DATA, Plane, Volume, read_table, read_voxels

from medm.metrics.boxes import BinnedBoxes

SEED = 0
SIDE = 224
"""Pixels; the size at which EfficientNet-Lite0 was trained."""
TRAIN_PER_PLANE = 24
TEST_AXIAL_WITH_LEVEL, TEST_AXIAL, TEST_OTHER = 15, 8, 6
"""Test pictures of a volume: axial ones where thirds are asked for, axial ones elsewhere, and of
each other plane."""
MARGIN = 0.04
"""Slices this close to the border of two thirds (as a share of the organ) are left out: a
toss-up."""
LESION_MM2 = 20.0
"""A lesion that takes up less of a slice is neither asked for nor denied."""

LEVELS = ("lower", "middle", "upper")
QUESTIONS = {
    "modality": ("Is this image CT or MR?", ("CT", "MR")),
    "region": (
        "Which region is shown: head, chest, abdomen or spine?",
        ("head", "chest", "abdomen", "spine"),
    ),
    "plane": ("Which plane is this: axial, coronal or sagittal?", ("axial", "coronal", "sagittal")),
    "level": ("Which third of the organ is this: lower, middle or upper?", LEVELS),
    "lesion": ("Is a lesion visible: yes or no?", ("yes", "no")),
}
"""Every type of question: its wording, which names the answers, and the answers."""
CAPTION = "Describe the image."

NOTES = (
    "Not for clinical use. This shows that the machinery learns, and nothing about medicine: a "
    "handful of volumes.",
    "Slices of one volume resemble each other, so volumes are what counts: the interval draws "
    "whole volumes with replacement. With so few of them it is itself rough, and no second seed "
    "was run.",
    "Spine CT and abdominal MR are never trained on. Where the modality is wrong there and right "
    "elsewhere, the model learned which region usually comes in which modality, not what CT and "
    "MR look like.",
    "Level is asked of lungs and brains alone. Lesions: training holds a nodule on three slices "
    "and one small brain lesion, too little to learn from; the row is there so that nobody has "
    "to wonder.",
)
"""What the table does not show; printed under it."""

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels of the picture."""


@dataclass(frozen=True)
class View:
    """How a slice is placed in a picture, and how its values are shown."""

    window: tuple[float, float]
    scale: float = 1.0
    """1 fits the longer side exactly."""
    angle: float = 0.0
    """Degrees."""
    shift: tuple[float, float] = (0.0, 0.0)
    """Right and down, as shares of the picture."""
    gamma: float = 1.0


@dataclass(frozen=True)
class Picture:
    """One picture and what is known of it."""

    file: str
    volume: str
    split: str
    plane: Plane
    index: int
    view: View
    answers: dict[str, str]
    """Question type -> answer; a type that cannot be answered for sure is missing."""
    boxes: dict[str, Box] = field(default_factory=dict)
    """`left lung`, `right lung`, `lesion`, where the masks say so."""


@dataclass(frozen=True)
class Scan:
    """A volume in memory. Arrays are (superior, posterior, left)."""

    name: str
    about: Volume
    voxels: np.ndarray
    spacing: np.ndarray
    lesion: np.ndarray | None
    lungs: np.ndarray | None

    @classmethod
    def load(cls, name: str, about: Volume) -> Scan | None:
        """A committed volume, or a fetched one; None where that was not fetched."""
        file = (
            ASSETS / "head-ct" / "head_ct.nii.gz"
            if about.split == "extra"
            else DATA / f"{name}.nii.gz"
        )
        if about.split == "extra" and not file.is_file():
            return None
        voxels, spacing = read_voxels(file)
        lesion = read_voxels(DATA / f"{name}.lesion.nii.gz")[0] > 0 if about.lesion else None
        lungs = read_voxels(DATA / f"{name}.lungs.nii.gz")[0] if about.lungs else None
        return cls(name, about, voxels, spacing, lesion, lungs)

    def slice(self, array: np.ndarray, plane: Plane, index: int) -> np.ndarray:
        """As radiologists look at it: from the feet or from the front, the patient's right on the
        left.
        """
        cut = np.take(array, index, axis=AXIS[plane])
        return cut if plane == "axial" else cut[::-1]  # the head is up

    def pixel_size(self, plane: Plane) -> tuple[float, float]:
        """Height and width of a pixel of a slice, in mm."""
        rows, columns = (
            spacing for axis, spacing in enumerate(self.spacing) if axis != AXIS[plane]
        )
        return float(rows), float(columns)

    def candidates(self, plane: Plane) -> list[int]:
        """Slices that show something and have a sure answer."""
        count = self.voxels.shape[AXIS[plane]]
        if plane != "axial":
            return list(range(round(0.3 * count), round(0.7 * count)))
        if self.about.level is None:
            return list(range(round(0.05 * count), round(0.95 * count)))
        return [index for index in range(*self.about.level) if self.level(index) is not None]

    def level(self, index: int) -> str | None:
        """The third of the organ that an axial slice goes through; None at the borders and where
        none is asked for.
        """
        if self.about.level is None:
            return None
        low, high = self.about.level
        place = (index + 0.5 - low) / (high + 1 - low)
        sure = min(abs(place - 1 / 3), abs(place - 2 / 3)) >= MARGIN
        return LEVELS[int(place * 3)] if 0 <= place < 1 and sure else None

    def lesion_answer(self, plane: Plane, index: int) -> str | None:
        """Yes or no where the lesions are marked and an axial slice clearly meets one, or stays
        clear of them.
        """
        if self.lesion is None or plane != "axial":
            return None
        area = self.lesion[index].sum() * self.spacing[1] * self.spacing[2]
        if area >= LESION_MM2:
            return "yes"
        return None if self.lesion[max(0, index - 1) : index + 2].any() else "no"


def main(arguments: list[str]) -> int:
    """Write everything. Returns the exit status."""
    folder = Path(arguments[0]) if arguments else REPOSITORY / "work_dirs" / "quickstart" / "data"
    stamp = folder / "made_from.txt"
    made_from = _fingerprint()
    if stamp.is_file() and stamp.read_text() == made_from:
        print(f"  pictures                 here already ({folder})")
        return 0
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    pictures: list[Picture] = []
    for name, about in read_table().items():
        scan = Scan.load(name, about)
        if scan is None:
            print(f"  {name} was not fetched and is left out")
            continue
        for picture in choose(scan, np.random.default_rng([SEED, *name.encode()])):
            pictures.append(draw(scan, picture, folder / "images"))
    write(folder, pictures)
    stamp.write_text(made_from)
    splits = [
        sum(picture.split == split for picture in pictures) for split in ("train", "test", "extra")
    ]
    print(
        f"  pictures                 {splits[0]} to train on, {splits[1]} held out, "
        f"{splits[2]} held out and counted apart"
    )
    return 0


def _fingerprint() -> str:
    """Changes with this script, the volumes and what was fetched, so that a second run knows that
    nothing did.
    """
    extra = ASSETS / "head-ct" / "head_ct.nii.gz"
    files = [Path(__file__), Path(__file__).with_name("volumes.py"), *sorted(DATA.glob("*.*"))]
    digest = hashlib.sha256(str(extra.is_file()).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def choose(scan: Scan, random: np.random.Generator) -> Iterator[Picture]:
    """Which slices are cut, and how each is shown. Boxes are not known yet."""
    train = scan.about.split == "train"
    for plane in scan.about.planes:
        for number, index in enumerate(
            (_train_slices if train else _test_slices)(scan, plane, random)
        ):
            window = scan.about.windows[number % len(scan.about.windows)]
            answers = {
                "modality": scan.about.modality,
                "region": scan.about.region,
                "plane": plane,
                "level": scan.level(index) if plane == "axial" else None,
                "lesion": scan.lesion_answer(plane, index),
            }
            yield Picture(
                file=f"{scan.name}_{plane}_{number:02d}.png",
                volume=scan.name,
                split=scan.about.split,
                plane=plane,
                index=index,
                view=train_view(window, random) if train else test_view(window, random),
                answers={kind: answer for kind, answer in answers.items() if answer is not None},
            )


def _train_slices(scan: Scan, plane: Plane, random: np.random.Generator) -> list[int]:
    """As many of each third; a slice may come twice, shown differently. Slices with a lesion are
    taken more often.
    """
    candidates = np.array(scan.candidates(plane))
    if plane != "axial" or scan.about.level is None:
        return [int(index) for index in random.choice(candidates, TRAIN_PER_PLANE)]
    with_lesion = np.array([scan.lesion_answer(plane, int(index)) == "yes" for index in candidates])
    chosen: list[int] = []
    for number in range(TRAIN_PER_PLANE):
        wanted = np.array([scan.level(int(index)) == LEVELS[number % 3] for index in candidates])
        weights = wanted * np.where(with_lesion, 5.0, 1.0)
        chosen.append(int(random.choice(candidates, p=weights / weights.sum())))
    return chosen


def _test_slices(scan: Scan, plane: Plane, random: np.random.Generator) -> list[int]:
    """Evenly spaced, none twice."""
    candidates = scan.candidates(plane)
    wanted = (
        TEST_OTHER
        if plane != "axial"
        else TEST_AXIAL
        if scan.about.level is None
        else TEST_AXIAL_WITH_LEVEL
    )
    places = np.linspace(0, len(candidates) - 1, min(wanted, len(candidates)))
    return [candidates[round(place)] for place in places]


def train_view(window: list[float], random: np.random.Generator) -> View:
    """Turned, moved, resized and brightened a little; never mirrored."""
    low, high = window
    width = high - low
    return View(  # black stays black: a lower window would show where the turned slice ends
        window=(low + width * random.uniform(0, 0.1), high + width * random.uniform(-0.15, 0.15)),
        scale=random.uniform(0.8, 1.15),
        angle=random.uniform(-10, 10),
        shift=(random.uniform(-0.06, 0.06), random.uniform(-0.06, 0.06)),
        gamma=float(np.exp(random.uniform(-0.25, 0.25))),
    )


def test_view(window: list[float], random: np.random.Generator) -> View:
    """Moved and made smaller a little."""
    shift = (random.uniform(-0.03, 0.03), random.uniform(-0.03, 0.03))
    return View(window=(window[0], window[1]), scale=random.uniform(0.85, 1.0), shift=shift)


def draw(scan: Scan, picture: Picture, folder: Path) -> Picture:
    """Write the PNG; returns the picture with its boxes."""
    pixel_size = scan.pixel_size(picture.plane)
    low, high = picture.view.window
    values = scan.slice(scan.voxels, picture.plane, picture.index).astype(np.float64)
    shown = np.clip((values - low) / (high - low), 0, 1) ** picture.view.gamma * 255
    place(np.round(shown).astype(np.uint8), pixel_size, picture.view).save(folder / picture.file)
    masks = {}
    if scan.lungs is not None:
        masks = {"right lung": scan.lungs == 1, "left lung": scan.lungs == 2}
    if scan.lesion is not None:
        masks["lesion"] = scan.lesion
    boxes = {}
    for name, mask in masks.items():
        flat = scan.slice(mask, picture.plane, picture.index).astype(np.uint8) * 255
        box = bounding_box(np.asarray(place(flat, pixel_size, picture.view, smooth=False)) > 0)
        if box is not None:
            boxes[name] = box
    return Picture(**{**vars(picture), "boxes": boxes})


def place(
    pixels: np.ndarray, pixel_size: tuple[float, float], view: View, *, smooth: bool = True
) -> Image.Image:
    """A slice in a square picture: true proportions, black around it."""
    height, width = pixels.shape
    rows, columns = pixel_size
    zoom = SIDE * view.scale / max(height * rows, width * columns)  # picture pixels a mm
    angle = np.deg2rad(view.angle)
    cos, sin = np.cos(angle), np.sin(angle)
    centre_x, centre_y = SIDE * (0.5 + view.shift[0]), SIDE * (0.5 + view.shift[1])
    # Pillow wants, for each pixel of the picture, where it comes from in the slice.
    a, b = cos / (zoom * columns), sin / (zoom * columns)
    d, e = -sin / (zoom * rows), cos / (zoom * rows)
    matrix = (
        a,
        b,
        width / 2 - a * centre_x - b * centre_y,
        d,
        e,
        height / 2 - d * centre_x - e * centre_y,
    )
    resample = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return Image.fromarray(pixels).transform(
        (SIDE, SIDE), Image.Transform.AFFINE, matrix, resample=resample
    )


def bounding_box(mask: np.ndarray) -> Box | None:
    """The pixels of a mask from edge to edge; None for an empty one."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def write(folder: Path, pictures: list[Picture]) -> None:
    """The JSON files."""
    random = np.random.default_rng(SEED)
    train = [picture for picture in pictures if picture.split == "train"]
    held_out = [picture for picture in pictures if picture.split != "train"]
    dump(folder / "about.json", {"questions": QUESTIONS, "notes": NOTES})
    dump(folder / "pictures.json", [asdict(picture) for picture in pictures])
    dump(
        folder / "pretrain.json",
        [_record(picture, "caption", [(CAPTION, caption(picture))]) for picture in train],
    )
    dump(folder / "finetune.json", [conversation(picture, random) for picture in train])
    dump(folder / "test.json", [record for picture in held_out for record in questions(picture)])
    dump(
        folder / "tasks_train.json",
        [record for picture in train for record in tasks(picture, random)],
    )
    dump(
        folder / "tasks_test.json",
        [as_question(record) for picture in held_out for record in tasks(picture, random)],
    )


def dump(file: Path, content: object) -> None:
    """Readable JSON."""
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def caption(picture: Picture) -> str:
    """One sentence with everything that is sure."""
    answers = picture.answers
    level = f", {answers['level']} third" if "level" in answers else ""
    return (
        f"{answers['plane'].capitalize()} {answers['modality']} of the {answers['region']}{level}."
    )


def _record(
    picture: Picture, task: str, turns: list[tuple[str, str]], **extra: object
) -> dict[str, object]:
    media, source = (
        {"image": [picture.file]},
        {"source_volume": picture.volume, "split": picture.split},
    )
    return record(picture.file.removesuffix(".png"), task, turns, media=media, **source, **extra)


def record(
    name: str,
    task: str,
    turns: list[tuple[str, str]],
    *,
    media: dict[str, list[str]],
    **extra: object,
) -> dict[str, object]:
    """One record in LLaVA's form, its one file before the first question."""
    (field,) = media
    conversations = []
    for number, (question, answer) in enumerate(turns):
        conversations.append(
            {"from": "human", "value": question if number else f"<{field}>\n{question}"}
        )
        conversations.append({"from": "gpt", "value": answer})
    kind = str(extra.get("question_type", task)).replace(" ", "-")
    return {"id": f"{name}_{kind}", "task": task, **media, "conversations": conversations, **extra}


def conversation(picture: Picture, random: np.random.Generator) -> dict[str, object]:
    """All questions about a picture in one conversation, so that its tokens are computed once.

    In random order: each type has to be answered without the others before it often enough.
    """
    kinds = [str(kind) for kind in random.permutation(list(picture.answers))]
    return _record(picture, "vqa", [(QUESTIONS[kind][0], picture.answers[kind]) for kind in kinds])


def questions(picture: Picture) -> Iterator[dict[str, object]]:
    """Each question alone, as inference takes it."""
    for kind, answer in picture.answers.items():
        yield as_question(
            _record(picture, "vqa", [(QUESTIONS[kind][0], answer)], question_type=kind)
        )


def as_question(record: dict[str, object]) -> dict[str, object]:
    """The last reply taken out of a record and kept as `answer`."""
    turns = list(record["conversations"])  # type: ignore[call-overload]
    return {**record, "conversations": turns[:-1], "answer": turns[-1]["value"]}


def tasks(picture: Picture, random: np.random.Generator) -> Iterator[dict[str, object]]:
    """One record a task: caption, question, classification, and the boxes in both directions."""
    yield _record(picture, "caption", [(CAPTION, caption(picture))], question_type="caption")
    kind = str(random.choice([kind for kind in picture.answers if kind != "region"]))
    yield _record(picture, "vqa", [(QUESTIONS[kind][0], picture.answers[kind])], question_type=kind)
    yield _record(
        picture,
        "cls",
        [("Classify the region.", picture.answers["region"])],
        question_type="region",
    )
    codec = BinnedBoxes()
    for name, box in picture.boxes.items():
        text = codec.encode(box, (SIDE, SIDE))
        yield _record(picture, "rec", [(f"Where is the {name}?", text)], question_type=name)
        yield _record(picture, "reg", [(f"What is in {text}?", name)], question_type=name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
