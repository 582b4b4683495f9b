"""Write the quickstart's images as studies: what is known of each as a report, labels and triplets.

    python examples/motor_demo/studies.py [folder, by default work_dirs/quickstart/data]

Reads pictures.json of examples/quickstart/prepare.py and the masks of its volumes. Writes
studies_train.jsonl and studies_test.jsonl, for the pipeline `studies`, next to the images. A label
is an organ: present or absent where a mask or the region says so for sure, and unknown elsewhere.
`patient` is the volume that a slice was cut from, by which intervals are drawn.

Nothing is labeled by eye or by a model of this run; the structures of abdominal CT are
TotalSegmentator's. Volumes that are fetched, and not part of the repository, are left out.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).parents[2]
sys.path.append(str(REPOSITORY / "examples" / "quickstart"))

from prepare import Scan  # noqa: E402
from volumes import DATA as VOLUMES  # noqa: E402
from volumes import STRUCTURES, Plane, read_table, read_voxels  # noqa: E402

DATA = REPOSITORY / "work_dirs" / "quickstart" / "data"
ORGANS = ("aorta", "brain", "liver", "lungs", "spleen", "vertebrae")
"""Labels, in the order of the recipes."""
MIN_MM2 = 20.0
"""An organ that takes up less of a slice is neither present nor absent."""
THIRD_OF = {"chest": "lungs", "head": "brain"}
"""The organ whose thirds are meant, by region."""


def main(arguments: list[str]) -> int:
    """Write the files. Returns the exit status."""
    folder = Path(arguments[0]) if arguments else DATA
    pictures = json.loads((folder / "pictures.json").read_text(encoding="utf-8"))
    masks: dict[str, Masks] = {}
    for split in ("train", "test"):
        chosen = [picture for picture in pictures if picture["split"] == split]
        records = []
        for picture in chosen:
            name = picture["volume"]
            if name not in masks:
                masks[name] = Masks(name)
            records.append(study(picture, masks[name].organs(picture)))
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        write(folder / f"studies_{split}.jsonl", "".join(f"{line}\n" for line in lines))
        print(f"  studies                  {summary(split, records)}")
    return 0


class Masks:
    """The organs that are marked in a volume.

    Args:
        name: of the volume.
    """

    def __init__(self, name: str) -> None:
        about = read_table()[name]
        scan = Scan.load(name, about)
        if scan is None:
            raise SystemExit(f"{name}: no such volume in {VOLUMES}")
        self.scan = scan
        self.marked: dict[str, np.ndarray] = {}
        self.range: dict[str, tuple[int, int]] = {}
        """First and last axial slice in which an organ is marked wherever it is."""
        if about.labels is not None:
            labels = read_voxels(VOLUMES / f"{name}.labels.nii.gz")[0]
            for organ in about.structures:
                self.marked[organ] = labels == 1 + STRUCTURES.index(organ)
                self.range[organ] = (about.labels[0], about.labels[1])
        if scan.lungs is not None:
            self.marked["lungs"] = scan.lungs > 0
            self.range["lungs"] = (0, len(scan.voxels) - 1)

    def organs(self, picture: Mapping[str, Any]) -> dict[str, int | None]:
        """Return 1, 0 or None (unknown) for each organ."""
        answers, plane, index = picture["answers"], picture["plane"], picture["index"]
        known: dict[str, int | None] = dict.fromkeys(ORGANS)
        region = answers["region"]
        known["brain"] = int(region == "head")
        if region == "head":
            known |= dict.fromkeys(("aorta", "liver", "lungs", "spleen"), 0)
            if answers.get("level") in ("middle", "upper"):  # above the neck
                known["vertebrae"] = 0
        elif region == "spine" or plane == "axial":  # each axial slice of the trunk crosses them
            known["vertebrae"] = 1
        for organ in self.marked:
            state = self.state(organ, plane, index)
            known[organ] = known[organ] if state is None else state
        return known

    def state(self, organ: str, plane: Plane, index: int) -> int | None:
        """Return whether the mask of an organ shows it in a slice; None where that is not sure."""
        area = float(np.prod(self.scan.pixel_size(plane)))
        mask, (low, high) = self.marked[organ], self.range[organ]
        if float(self.scan.slice(mask, plane, index).sum()) * area >= MIN_MM2:
            return 1
        whole = (low, high) == (0, len(mask) - 1)
        if plane != "axial":
            return 0 if whole and not self.scan.slice(mask, plane, index).any() else None
        inside = low <= index <= high
        return 0 if inside and not mask[max(0, index - 1) : index + 2].any() else None


def study(picture: Mapping[str, Any], organs: Mapping[str, int | None]) -> dict[str, Any]:
    """Return a record of the pipeline `studies`."""
    return {
        "id": picture["file"].removesuffix(".png"),
        "images": [f"images/{picture['file']}"],
        "report": report(picture["answers"], organs),
        "labels": dict(organs),
        "triplets": triplets(picture["answers"], organs),
        "patient": picture["volume"],
    }


def report(answers: Mapping[str, str], organs: Mapping[str, int | None]) -> str:
    """Return what is known of a slice as sentences; equal for slices of which the same is known."""
    region = answers["region"]
    place = f", {answers['level']} third of the {THIRD_OF[region]}" if "level" in answers else ""
    sentences = [f"{answers['plane'].capitalize()} {answers['modality']} of the {region}{place}."]
    seen = [organ for organ, state in organs.items() if state == 1]
    sentences += [f"Visible: {', '.join(seen)}."] if seen else []
    if "lesion" in answers:
        sentences.append("A lesion." if answers["lesion"] == "yes" else "No lesion.")
    return " ".join(sentences)


def triplets(answers: Mapping[str, str], organs: Mapping[str, int | None]) -> list[list[str]]:
    """Return the statements of a report: subject, relation, object."""
    region = answers["region"]
    found = [[region, "imaged by", answers["modality"]]]
    found += [[organ, "seen in", region] for organ, state in organs.items() if state == 1]
    if "level" in answers:
        found.append([THIRD_OF[region], "cut at", f"{answers['level']} third"])
    return found


def summary(split: str, records: Sequence[Mapping[str, Any]]) -> str:
    """Return numbers of studies, volumes, reports and present organs."""
    volumes = {record["patient"] for record in records}
    reports = {record["report"] for record in records}
    states = Counter(
        (organ, state) for record in records for organ, state in record["labels"].items()
    )
    counts = ", ".join(f"{organ} {states[organ, 1]}/{states[organ, 0]}" for organ in ORGANS)
    return (
        f"{split}: {len(records)} of {len(volumes)} volumes, {len(reports)} different reports; "
        f"present/absent {counts}"
    )


def write(file: Path, text: str) -> None:
    """Write a file unless it holds the same text already: a training may be reading it."""
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
