"""Cut the committed volumes into pictures with masks, and write them as records.

    python examples/quickstart_seg/masks.py [folder, by default work_dirs/quickstart_seg/data]

What is asked for is marked in the source: lesions by the people who made it, lungs by a threshold
(examples/quickstart/build_data.py), other structures by TotalSegmentator, whose output they are.
A target that is asked for and is not in the slice is an empty mask; it is only asked for where its
absence is sure. Training pictures are turned, moved and resized a little, never mirrored.

Written: images/*.png, masks/*.png (0 and 255), train.json (several questions about a picture),
test.json (one question each), and a file for each held-out volume that is segmented whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[2]
sys.path.append(str(REPOSITORY / "examples" / "quickstart"))

from prepare import Scan, View, place, test_view, train_view  # noqa: E402
from volumes import DATA, STRUCTURES, read_table, read_voxels  # noqa: E402

OUT = REPOSITORY / "work_dirs" / "quickstart_seg" / "data"
SEED = 0
TARGETS = (*STRUCTURES, "lesion")
TRAIN_PICTURES = {
    "chest-ct-1": 72,
    "chest-ct-3": 96,
    "abdomen-ct-1": 144,
    "head-mr-2": 48,
    "head-ct-atlas": 24,
    "head-mr-mni152": 24,
}
"""Pictures of each volume that is trained on; slices come more than once, shown differently."""
TEST_SLICES = {"chest-ct-2": 20, "abdomen-ct-2": 20, "head-mr-1": 16, "head-mr-colin27": 8}
"""Evenly spaced axial slices of each held-out volume."""
ABSENT_IN_HEADS = ("lungs", "liver", "spleen", "aorta")
MIN_MM2 = 20.0
"""A target that takes up less of a slice is neither asked for nor called absent."""
WHOLE = {"chest-ct-2": ("lungs", "lesion"), "abdomen-ct-2": ("liver", "spleen", "aorta")}
"""Held-out volumes that are segmented whole, and their targets; a file of records each."""


@dataclass(frozen=True)
class Marked:
    """A volume with what is marked in it."""

    scan: Scan
    masks: dict[str, np.ndarray]
    """By target (slices, rows, columns) bool."""
    labelled: tuple[int, int]
    """First and last slice where `masks` of structures hold."""
    absent: tuple[str, ...] = ()
    """Targets that are in no slice."""

    def shown(self) -> list[int]:
        """Return the slices that show something."""
        voxels = self.scan.voxels
        return [i for i in range(len(voxels)) if np.ptp(voxels[i]) > 0.1 * np.ptp(voxels)]

    def known(self, index: int) -> dict[str, bool]:
        """Return whether each target is in a slice, where that is sure."""
        found = dict.fromkeys(self.absent, False)
        area = float(self.scan.spacing[1] * self.scan.spacing[2])
        for target, mask in self.masks.items():
            if target in STRUCTURES and not self.labelled[0] <= index <= self.labelled[1]:
                continue
            if mask[index].sum() * area >= MIN_MM2:
                found[target] = True
            elif not mask[max(0, index - 1) : index + 2].any():
                found[target] = False
        return found


@dataclass
class Records:
    """Records of both splits."""

    train: list[dict[str, object]] = field(default_factory=list)
    test: list[dict[str, object]] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    """Write everything. Returns the exit status."""
    folder = Path(arguments[0]) if arguments else OUT
    stamp = folder / "made_from.txt"
    made_from = fingerprint()
    if stamp.is_file() and stamp.read_text() == made_from:
        print(f"  masks                    here already ({folder})")
        return 0
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    records = Records()
    for name in (*TRAIN_PICTURES, *TEST_SLICES):
        marked = load(name)
        random = np.random.default_rng([SEED, *name.encode()])
        if name in TRAIN_PICTURES:
            records.train += training(marked, TRAIN_PICTURES[name], folder, random)
        else:
            records.test += held_out(marked, TEST_SLICES[name], folder, random)
    dump(folder / "train.json", records.train)
    dump(folder / "test.json", records.test)
    for name in WHOLE:
        dump(folder / f"{name}.json", list(whole(name)))
    stamp.write_text(made_from)
    print(
        f"  masks                    {len(records.train)} pictures to train on, "
        f"{len(records.test)} held-out questions"
    )
    return 0


def fingerprint() -> str:
    """Return a text that changes with the scripts and the volumes."""
    quickstart = REPOSITORY / "examples" / "quickstart"
    files = [Path(__file__), quickstart / "prepare.py", quickstart / "volumes.py"]
    digest = hashlib.sha256()
    for file in [*files, *sorted(DATA.glob("*.*"))]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def load(name: str) -> Marked:
    """Return a volume with its masks."""
    about = read_table()[name]
    scan = Scan.load(name, about)
    if scan is None:
        raise SystemExit(f"{name}: no such file in {DATA}")
    masks: dict[str, np.ndarray] = {}
    labelled = (0, len(scan.voxels) - 1)
    if about.labels is not None:
        labels = read_voxels(DATA / f"{name}.labels.nii.gz")[0]
        labelled = (about.labels[0], about.labels[1])
        for target in about.structures:
            masks[target] = labels == 1 + STRUCTURES.index(target)
    if scan.lungs is not None:
        masks["lungs"] = scan.lungs > 0
    if scan.lesion is not None:
        masks["lesion"] = scan.lesion
    return Marked(scan, masks, labelled, ABSENT_IN_HEADS if about.region == "head" else ())


def training(
    marked: Marked, count: int, folder: Path, random: np.random.Generator
) -> Iterator[dict[str, object]]:
    """Yield records of slices that are drawn at random, those with a lesion more often."""
    known = {index: marked.known(index) for index in marked.shown()}
    candidates = [index for index, targets in known.items() if targets]
    weights = np.array([5.0 if known[index].get("lesion") else 1.0 for index in candidates])
    for number in range(count):
        index = int(random.choice(candidates, p=weights / weights.sum()))
        view = train_view(
            marked.scan.about.windows[number % len(marked.scan.about.windows)], random
        )
        targets = known[index]
        asked = [str(target) for target in random.permutation(sorted(targets))]
        # Absent ones are many; two of them are asked for, so that most masks show something.
        absent = [target for target in asked if not targets[target]][:2]
        asked = [target for target in asked if targets[target] or target in absent]
        yield record(marked, f"{marked.scan.name}_{number:03d}", index, view, asked, folder)


def held_out(
    marked: Marked, count: int, folder: Path, random: np.random.Generator
) -> Iterator[dict[str, object]]:
    """Yield a record for each target of evenly spaced slices."""
    scan = marked.scan
    indexes = [index for index in marked.shown() if marked.known(index)]
    for place_of in np.linspace(0, len(indexes) - 1, min(count, len(indexes))):
        index = indexes[round(place_of)]
        view = test_view(scan.about.windows[0], random)
        for target in marked.known(index):
            name = f"{scan.name}_{index:03d}"
            yield record(marked, name, index, view, [target], folder, suffix=f"_{target}")


def record(
    marked: Marked,
    name: str,
    index: int,
    view: View,
    targets: list[str],
    folder: Path,
    *,
    suffix: str = "",
) -> dict[str, object]:
    """Write a picture and its masks, and return their record."""
    scan = marked.scan
    size = scan.pixel_size("axial")
    low, high = view.window
    values = scan.slice(scan.voxels, "axial", index).astype(np.float64)
    shown = np.clip((values - low) / (high - low), 0, 1) ** view.gamma * 255
    place(np.round(shown).astype(np.uint8), size, view).save(folder / "images" / f"{name}.png")
    masks: list[dict[str, object] | None] = []
    turns: list[dict[str, str]] = []
    for number, target in enumerate(targets):
        flat = np.zeros_like(values, dtype=np.uint8)
        if target in marked.masks:
            flat = scan.slice(marked.masks[target], "axial", index).astype(np.uint8) * 255
        drawn = place(flat, size, view, smooth=False)
        file = f"masks/{name}_{target}.png"
        if np.asarray(drawn).any():
            drawn.save(folder / file)
            masks.append({"file": file, "phrase": target})
        else:
            masks.append(None)
        question = f"Segment the {target}."
        turns.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        # The name follows the token: its state, which prompts the head, then tells names apart.
        turns.append({"from": "gpt", "value": f"[SEG] {target}"})
    return {
        "id": f"{name}{suffix}",
        "image": f"images/{name}.png",
        "masks": masks,
        "conversations": turns,
        "source_volume": scan.name,
        "targets": targets,
    }


def whole(name: str) -> Iterator[dict[str, object]]:
    """Yield a record for each target of a held-out volume that is segmented whole."""
    for target in WHOLE[name]:
        yield {
            "id": f"{name}_{target}",
            "volume": f"{name}.nii.gz",
            "conversations": [{"from": "human", "value": f"<volume>\nSegment the {target}."}],
            "source_volume": name,
            "targets": [target],
        }


def dump(file: Path, content: object) -> None:
    """Write readable JSON."""
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
