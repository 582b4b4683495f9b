"""Folders of UniBiomed (arXiv 2504.21336): sets with COCO-like annotations beside images and masks.

A set holds `<split>/`, `<split>_mask/` and `<split>.json`; images and annotations are joined by
`file_name`. Sets lie beside each other, or one is the folder itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from medm.errors import DataError
from medm.imaging import resolve_inside
from medm.imaging.images import read_image
from medm.tasks.benchmark_files import field_of, read_json_map, require
from medm.types import Config

LAYOUT = (
    "<set>/<split>.json (images, annotations: [{file_name, mask_file, sentences: [{sent}]}]) with "
    "<set>/<split>/ and <set>/<split>_mask/; or one such set"
)


@dataclass(frozen=True, slots=True)
class Annotation:
    """One target of one image."""

    id: str
    dataset: str
    """Name of the set."""
    image: str
    mask: str
    """Paths relative to the data folder."""
    phrase: str
    """Words of the target: "<target> in <site> <modality>"."""
    position: int
    """Number of the annotation in its file, from 0."""


def sets_of(
    folder: Path, file: str, layout: str, only: Sequence[str] = (), skip: Sequence[str] = ()
) -> dict[str, tuple[Path, str]]:
    """Return annotation file and path prefix of each set, by name.

    Args:
        folder: of one set, or of several; sets may lie one folder deeper (`3D/`, `Disease/`).
        file: name of the annotation file of the split.
        layout: for the message.
        only: names of sets that are read. Default: all.
        skip: folders that hold sets of other tasks.

    Raises:
        DataError: there is none, or one of `only` is not there.
    """
    if (folder / file).is_file():
        found = {folder.name: (folder / file, "")}
    else:
        places = _below(folder, file, skip)
        found = {}
        for place in places:
            name = place.parent.name
            if name in found:
                raise DataError(
                    f"two sets named {name!r}, also {found[name][0]}; give the folder of one",
                    file=place,
                )
            found[name] = (place, f"{place.parent.relative_to(folder).as_posix()}/")
    if not found:
        require(folder, file, layout=layout)
    masks = f"{Path(file).stem.removeprefix('meta_')}_mask"
    for place in _below(folder, masks, skip):
        name = place.parent.name
        # A folder of the other kind of set (images, volumes) has the other kind of file.
        if name not in found and not any(
            place.parent.glob(f"*{masks.removesuffix('_mask')}*.json")
        ):
            require(place.parent, file, layout=layout)
    missing = [name for name in only if name not in found]
    if missing:
        raise DataError(
            f"{', '.join(missing)} is missing in {folder}; expected {layout}; found "
            f"{', '.join(found)}",
            file=folder / missing[0],
        )
    return {name: found[name] for name in (only or found)}


def _below(folder: Path, name: str, skip: Sequence[str]) -> list[Path]:
    """Return the files or folders of a name one or two levels below a folder, in order."""
    found = sorted([*folder.glob(f"*/{name}"), *folder.glob(f"*/*/{name}")])
    return [path for path in found if path.relative_to(folder).parts[0] not in skip]


def annotation_rows(file: Path) -> list[Config]:
    """Return the `annotations` of a file, each with the fields of its image as defaults."""
    content = read_json_map(file)
    rows = field_of(content, "annotations", list, file=file, index=0)
    if not all(isinstance(row, dict) for row in rows):
        raise DataError("expected a list of objects", file=file, field="annotations")
    images = content.get("images")
    names = {
        image["id"]: image.get("file_name")
        for image in (images if isinstance(images, list) else [])
        if isinstance(image, dict) and "id" in image
    }
    return [
        row if row.get("file_name") else {**row, "file_name": names.get(row.get("image_id"))}
        for row in rows
    ]


def read_annotations(
    folder: Path, split: str, *, only: Sequence[str] = (), skip: Sequence[str] = ()
) -> Iterator[Annotation]:
    """Return the annotations of a split, set by set in the order of the files.

    Args:
        folder: data folder.
        split: "train" or "test".
        only: names of sets.
        skip: folders that hold sets of other tasks.

    Raises:
        DataError: a file or field is missing.
    """
    for name, (file, prefix) in sets_of(folder, f"{split}.json", LAYOUT, only, skip).items():
        for index, row in enumerate(annotation_rows(file)):
            image = field_of(row, "file_name", str, file=file, index=index)
            mask = field_of(row, "mask_file", str, file=file, index=index)
            yield Annotation(
                id=f"{name}:{split}:{index}",
                dataset=name,
                image=inner_path(folder, prefix, split, image),
                mask=inner_path(folder, prefix, f"{split}_mask", mask),
                phrase=_phrase(row, file, index),
                position=index,
            )


def _phrase(row: Config, file: Path, index: int) -> str:
    """Return the first sentence, which is the one that is asked for in evaluation."""
    sentences = field_of(row, "sentences", list, file=file, index=index)
    first = sentences[0] if sentences else None
    phrase = first.get("sent", first.get("raw")) if isinstance(first, dict) else None
    if not isinstance(phrase, str) or not phrase.strip():
        raise DataError(
            "expected [{'sent': ...}] with the words of the target",
            file=file,
            index=index,
            field="sentences",
        )
    return " ".join(phrase.split())


def inner_path(folder: Path, prefix: str, part: str, name: str) -> str:
    """Return the path of a file in its part of a set, relative to the data folder.

    Names are relative to the part; some sets write the part as well.

    Raises:
        DataError: there is no such file.
    """
    inner = f"{prefix}{part}/{name}" if part else f"{prefix}{name}"
    for path in (inner, f"{prefix}{name}"):
        if (folder / path).is_file():
            return path
    raise DataError(
        f"{inner!r} is missing in {folder}; the annotations name it", file=folder / inner
    )


def slice_of(mask: str, slices: Sequence[str]) -> int | None:
    """Return the position of the slice that a mask is named after; None if there is none.

    The name of a mask is that of its slice, alone or followed by '_' or '-' and more. Where several
    names fit, the longest is meant.
    """
    own = PurePosixPath(mask).stem
    stems = [PurePosixPath(name).stem for name in slices]
    fitting = [
        place
        for place, stem in enumerate(stems)
        if own == stem or own.startswith((f"{stem}_", f"{stem}-"))
    ]
    return max(fitting, key=lambda place: len(stems[place]), default=None)


def read_plane(folder: Path, path: str) -> np.ndarray:
    """Return a mask (H, W) as bool: where the first channel is not 0, as published.

    Raises:
        MediaError: the file is missing or damaged.
    """
    pixels = read_image(resolve_inside(folder, path)).pixels
    return (pixels[..., 0] if pixels.ndim == 3 else pixels) > 0
