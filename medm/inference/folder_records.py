"""Records of files without an annotation file: one question about each file of a folder, or about
files together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from medm.data.record_files import RecordFile
from medm.errors import DataError, RecipeError
from medm.files import atomic_create_text, atomic_write_text
from medm.imaging.paths import media_below, split_series
from medm.types import JsonObject, Kind

Existing: TypeAlias = Literal["extend", "replace", "keep"]
"""What becomes of records that were written before."""


def write_folder_records(
    file: Path,
    folder: Path,
    prompt: str,
    kinds: Collection[str],
    *,
    existing: Existing = "extend",
    left_out: Collection[Path] = (),
) -> None:
    """Write a record for each file of a folder, with its path in the folder as `id`.

    Records that the file holds already stay where they are, and new files come after them, so that
    results by position are kept.

    Args:
        file: JSONL to write.
        folder: whose files are asked about.
        prompt: the question.
        kinds: what the model reads; a .npy file is an image for models that read images.
        existing: `extend` adds new files to the records of the file, `replace` starts over, `keep`
            leaves a file that exists as it is, so that processes on several machines have one list.
        left_out: folders within the folder that are not asked about: those of masks and reports.

    Raises:
        RecipeError: the file holds records with another prompt.
        DataError: the folder is missing, or holds nothing that the model reads.
        OSError: the file cannot be written.
    """
    if folder.is_file():
        raise DataError("a file; expected the folder that holds it", file=folder)
    if not folder.is_dir():
        raise DataError("no such folder; expected one with images or volumes", file=folder)
    known = list(_records(file)) if file.exists() and existing != "replace" else []
    if known and known[0] != _record(known[0]["id"], _kind(known[0]), prompt):
        raise RecipeError(
            f"{file}: holds questions of another run, with another prompt; choose another "
            "--output, repeat the run as it was, or --overwrite"
        )
    if known and existing == "keep":
        return
    listed = {record["id"] for record in known}
    base, written = folder.resolve(), [path.resolve() for path in left_out]
    written = [path for path in written if path != base and path.is_relative_to(base)]
    found = {
        path: kind
        for path, kind in media_below(base, kinds)
        if not any((base / path).is_relative_to(one) for one in written)
    }
    new = [_record(path, kind, prompt) for path, kind in found.items() if path not in listed]
    if not known and not new:
        raise DataError(
            "no image or volume in it; expected PNG, JPEG, TIFF, BMP, DICOM, NIfTI, NRRD, "
            "MetaImage or .npy files",
            file=folder,
        )
    if new:
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(record, ensure_ascii=False) for record in [*known, *new])
        write = atomic_create_text if existing == "keep" else atomic_write_text
        write(file, "\n".join(lines) + "\n")


def file_record(files: Sequence[tuple[Kind, str]], prompt: str, *, study: bool) -> tuple[str, Path]:
    """Return a line of JSONL with a question about files together, and the root of its paths.

    Args:
        files: images and volumes with their kinds.
        prompt: the question; a study without one has its report written.
        study: for a model of studies.

    Raises:
        DataError: a file is missing.
        RecipeError: a volume for a model of studies.
    """
    paths = [Path(path).expanduser().resolve() for _, path in files]
    for (kind, given), path in zip(files, paths, strict=True):
        if not split_series(path)[0].exists():
            expected = "an image" if kind == "image" else "a volume"
            raise DataError(f"no such file; expected {expected}", file=given)
        if study and kind == "volume":
            raise RecipeError(f"{given}: a model of studies reads images")
    root = Path(os.path.commonpath([path.parent for path in paths]))
    names = [path.relative_to(root).as_posix() for path in paths]
    record: JsonObject
    if study:
        record = {"id": names[0], "images": names} | ({"question": prompt} if prompt else {})
    else:
        parts = [{"type": kind, "path": name} for (kind, _), name in zip(files, names, strict=True)]
        text = {"type": "text", "text": f"\n{prompt}"}
        record = {"id": names[0], "messages": [{"role": "user", "content": [*parts, text]}]}
    return json.dumps(record, ensure_ascii=False) + "\n", root


def _records(file: Path) -> Iterator[JsonObject]:
    for index, record in enumerate(RecordFile(file)):
        if not isinstance(record, dict) or not isinstance(record.get("id"), str):
            raise DataError(
                "expected a record with an id, as medm writes it; delete the file, or choose "
                "another output",
                file=file,
                index=index,
            )
        yield record


def _kind(record: JsonObject) -> Kind:
    return "volume" if record["messages"][0]["content"][0]["type"] == "volume" else "image"


def _record(path: str, kind: Kind, prompt: str) -> JsonObject:
    # Parts, so that a prompt with the letters of a placeholder stays text.
    content = [{"type": kind, "path": path}, {"type": "text", "text": f"\n{prompt}"}]
    return {"id": path, "messages": [{"role": "user", "content": content}]}
