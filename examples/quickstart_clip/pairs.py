"""Write the quickstart's images as pairs of image and caption, and as tables of classes.

    python examples/quickstart_clip/pairs.py [folder, by default work_dirs/quickstart/data]

Reads pictures.json of examples/quickstart/prepare.py. A caption says the modality, the region, the
plane, the third of the organ and the side, each where it is known for sure, in one of three
wordings. Writes, next to the images:

- pairs_train.jsonl and pairs_test.jsonl, for the pipeline `pairs`; `label` is equal where two
  captions say the same;
- classes_<attribute>.csv for the zero-shot cards of this folder, the held-out images where the
  attribute is known;
- captions_test.json, the held-out questions for a vision-language model.

Volumes that are fetched and are not part of the repository are left out, so that the results do not
depend on them.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "work_dirs" / "quickstart" / "data"
SIDE_OF_PICTURE = 224
"""Pixels (examples/quickstart/prepare.py)."""
MIDLINE = 0.1
"""A lesion whose center is this close to the middle of the picture, as a share of its side, has no
sure side."""

ATTRIBUTES = ("modality", "region", "plane", "level", "side")
ORGAN = {"chest": "lungs", "head": "brain"}
"""The organ whose thirds are meant, by region."""


def main(arguments: list[str]) -> int:
    """Write the files. Returns the exit status."""
    folder = Path(arguments[0]) if arguments else DATA
    pictures = json.loads((folder / "pictures.json").read_text(encoding="utf-8"))
    by_split = {
        split: [picture for picture in pictures if picture["split"] == split]
        for split in ("train", "test")
    }
    for split, chosen in by_split.items():
        lines = [json.dumps(pair(picture), ensure_ascii=False) for picture in chosen]
        write(folder / f"pairs_{split}.jsonl", "".join(f"{line}\n" for line in lines))
    for name in ATTRIBUTES:
        write(folder / f"classes_{name}.csv", table(by_split["test"], name))
    asked = json.loads((folder / "tasks_test.json").read_text(encoding="utf-8"))
    kept = [record for record in asked if (record["task"], record["split"]) == ("caption", "test")]
    write(folder / "captions_test.json", json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    volumes = {split: len({p["volume"] for p in chosen}) for split, chosen in by_split.items()}
    print(
        f"  pairs                    {len(by_split['train'])} of {volumes['train']} volumes to "
        f"train on, {len(by_split['test'])} of {volumes['test']} held out"
    )
    return 0


def pair(picture: Mapping[str, Any]) -> dict[str, object]:
    """Return a record of the pipeline `pairs`."""
    known = attributes(picture)
    return {
        "id": picture["file"].removesuffix(".png"),
        "image": f"images/{picture['file']}",
        "captions": captions(known),
        "label": " ".join(f"{name}={value}" for name, value in known.items()),
        "source_volume": picture["volume"],
    }


def attributes(picture: Mapping[str, Any]) -> dict[str, str]:
    """Return what is known for sure, by attribute."""
    known = {name: picture["answers"][name] for name in ATTRIBUTES if name in picture["answers"]}
    if (found := side(picture)) is not None:
        known["side"] = found
    return known


def side(picture: Mapping[str, Any]) -> str | None:
    """Return the side of the lung that a sagittal slice goes through, or of a lesion elsewhere.

    The patient's right is on the left of the picture.
    """
    boxes = picture["boxes"]
    if picture["plane"] == "sagittal":
        lungs = [name for name in ("right lung", "left lung") if name in boxes]
        return lungs[0].split()[0] if len(lungs) == 1 else None
    if "lesion" not in boxes:
        return None
    left, _, right, _ = boxes["lesion"]
    offset = (left + right) / 2 / SIDE_OF_PICTURE - 0.5
    if abs(offset) < MIDLINE:
        return None
    return "right" if offset < 0 else "left"


def captions(known: Mapping[str, str]) -> list[str]:
    """Return the same facts in three wordings."""
    plane, modality, region = known["plane"], known["modality"], known["region"]
    where = []
    if "level" in known:
        where.append(f"{known['level']} third of the {ORGAN[region]}")
    if "side" in known:
        what = "lung" if plane == "sagittal" else "lesion"
        where.append(f"{known['side']} {what}")
    tail = ", ".join(where)
    return [
        f"{plane} {modality} of the {region}{', ' + tail if tail else ''}",
        f"{region}, {modality}, {plane} plane{': ' + tail if tail else ''}",
        f"a slice of the {region} in the {plane} plane, from {modality}"
        f"{', through the ' + tail if tail else ''}",
    ]


def table(pictures: Sequence[Mapping[str, Any]], attribute: str) -> str:
    """Return a CSV with a row per image whose attribute is known."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["image", "label", "source_volume"])
    for picture in pictures:
        known = attributes(picture)
        if attribute in known:
            rows.writerow([f"images/{picture['file']}", known[attribute], picture["volume"]])
    return text.getvalue()


def write(file: Path, text: str) -> None:
    """Write a file unless it holds the same text already: a training may be reading it."""
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
