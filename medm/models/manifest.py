"""Manifest of a folder: the files that belong to it, with size and sha256.

Knows files, not models.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

from medm.errors import CheckpointError
from medm.files import sync
from medm.models import verified

MANIFEST = "manifest.json"
_CHECKSUM = "sha256"
"""Key of the manifest's own checksum. Manifests of earlier versions of medm have none."""
_READ = (".json", ".jinja", ".model", ".txt")
"""Suffixes of small files that opening a model reads."""
_RECORDS = ("run.json", "trainer_state.json")
"""Files of that kind that no opening reads."""
_BLOCK = 1 << 22


class FileEntry(TypedDict):
    """One file of a manifest."""

    size: int
    sha256: str


def write_manifest(folder: Path, metadata: Mapping[str, object]) -> None:
    """Bring every file to the disk and note its size and sha256; the manifest itself comes last.

    Args:
        folder: holds everything else already.
        metadata: further fields of the manifest.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_sync_and_hash, files))
    record = {
        **metadata,
        "files": {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
            for path, digest in zip(files, digests, strict=True)
        },
    }
    record = json.loads(json.dumps(record))
    record[_CHECKSUM] = _own_checksum(record)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(record, indent=1), encoding="utf-8")
    for path in [manifest, *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        sync(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder.

    Raises `CheckpointError` when it is missing, unreadable or no manifest.
    """
    try:
        record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no {MANIFEST}; the checkpoint was not finished, or medm did not write it"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: cannot be read ({error})") from None
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise CheckpointError(
            f"{folder / MANIFEST}: expected files with size and sha256, found something else"
        )
    if _CHECKSUM in record and record.pop(_CHECKSUM) != _own_checksum(record):
        raise CheckpointError(
            f"{folder / MANIFEST}: the content changed since it was written (its own sha256 "
            "differs)"
        )
    return record


def verify(folder: Path) -> dict[str, Any]:
    """Compare every file with the manifest; returns the manifest.

    Raises:
        CheckpointError: a file is missing, shorter, longer or changed, or was added.
    """
    record = read_manifest(folder)
    listed: dict[str, FileEntry] = record["files"]
    present = {
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.is_file() and p.name != MANIFEST
    }
    if missing := sorted(set(listed) - present):
        raise CheckpointError(
            f"{folder}: {len(missing)} files are missing: {', '.join(missing[:3])}"
        )
    if added := sorted(present - set(listed)):
        raise CheckpointError(
            f"{folder}: {len(added)} files that the manifest does not know: {', '.join(added[:3])}"
        )
    _compare(folder, listed)
    return record


def verify_weights(folder: Path) -> None:
    """Compare the weights alone with the manifest, if there is one.

    The other files are for people to edit.

    Names and sizes are compared each time; contents once, and again when `medm.models.verified`
    sees another file.

    Raises:
        CheckpointError: a weight file is missing, shorter, longer or changed, or was added.
    """
    if not (folder / MANIFEST).is_file():
        return
    listed: dict[str, FileEntry] = {
        name: entry
        for name, entry in read_manifest(folder)["files"].items()
        if name.endswith(".safetensors") and "/" not in name
    }
    present = {path.name for path in folder.glob("*.safetensors")}
    if listed.keys() != present:
        raise CheckpointError(
            f"{folder}: expected the weights {sorted(listed)} of its {MANIFEST}, found "
            f"{sorted(present)}; copy the folder again, or remove {MANIFEST} if you changed the "
            "weights yourself"
        )
    _compare_sizes(folder, listed)
    before = verified.state([folder / MANIFEST, *(folder / name for name in sorted(listed))])
    if before is not None and verified.is_known(folder, before):
        return
    _compare(folder, listed)
    if before is not None:
        verified.note(folder, before)


def changed_small_files(folder: Path) -> list[str]:
    """Return the files beside the weights that are missing or not as they were written.

    Configs, tokenizers and templates are for people to edit, so a change is no error. Without a
    manifest nothing is known, and the result is empty.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    if not (folder / MANIFEST).is_file():
        return []
    listed: dict[str, FileEntry] = read_manifest(folder)["files"]
    return [
        name
        for name, entry in sorted(listed.items())
        if name.endswith(_READ)
        and "/" not in name
        and name not in _RECORDS
        and not ((folder / name).is_file() and _hash(folder / name) == entry["sha256"])
    ]


def _own_checksum(record: Mapping[str, object]) -> str:
    """Return the sha256 of a manifest's content, whatever its layout."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("size"), int)
        and isinstance(entry.get("sha256"), str)
    )


def _compare_sizes(folder: Path, listed: Mapping[str, FileEntry]) -> None:
    for name, entry in listed.items():
        size = (folder / name).stat().st_size
        if size != entry["size"]:
            raise CheckpointError(f"{folder / name}: expected {entry['size']} bytes, found {size}")


def _compare(folder: Path, listed: Mapping[str, FileEntry]) -> None:
    _compare_sizes(folder, listed)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda name: _hash(folder / name), listed)
        for name, digest in zip(listed, digests, strict=True):
            if digest != listed[name]["sha256"]:
                raise CheckpointError(
                    f"{folder / name}: the content changed since it was written (sha256 differs)"
                )


def _sync_and_hash(path: Path) -> str:
    sync(path)
    return _hash(path)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
