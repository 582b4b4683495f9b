"""Model folders that say where they come from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import medm
from medm.errors import CheckpointError, MedmError
from medm.models.manifest import write_manifest
from medm.os_errors import require_writable

CARD, ORIGIN, CONCEPTS = "README.md", "origin", "concepts.json"
_RECORDS = ("recipe.yaml", "run.json", "import.json", CONCEPTS, CARD)
"""What a model folder says about its making."""
NOT_CLINICAL = (
    "**Not for clinical use.** This model is for research; it must not be used to diagnose, "
    "treat or triage anyone."
)


def require_free(out: Path, *, error: type[MedmError]) -> None:
    """Prove that a folder can be written, before there is anything to write.

    Raises:
        MedmError: of the given class, where `out` exists and is not an empty folder.
        OSError: nothing can be written there.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise error(f"{out}: exists already; choose another folder, or remove it")
    require_writable(out, folder=True)


def read_concepts(folder: Path) -> dict[str, Any] | None:
    """Return what the model of a folder was trained to name; None where nothing says so.

    It is the file `concepts.json` of a training with masks, also of the model that an export was
    made from.

    Raises:
        CheckpointError: the file is damaged.
    """
    for file in (folder / CONCEPTS, folder / ORIGIN / CONCEPTS):
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be read as JSON ({error})") from None
        concepts = found.get("concepts") if isinstance(found, dict) else None
        if not isinstance(concepts, dict) or not all(
            isinstance(entry, dict) and isinstance(entry.get("records"), int)
            for entry in concepts.values()
        ):
            raise CheckpointError(
                f"{file}: expected 'concepts' with the number of records of each phrase"
            )
        return dict(found)
    return None


def describe(
    folder: Path,
    *,
    title: str,
    text: str,
    metadata: Mapping[str, object],
    source: Path | None = None,
) -> None:
    """Write the README of a finished folder, and a manifest that states how it was made.

    Args:
        folder: holds everything else already.
        title: heading of the README.
        text: what the folder is.
        metadata: kept in the manifest, beside medm's version and the size and sha256 of each file.
        source: model folder whose recipe, run record and card are copied to `origin/`.
    """
    copied = [] if source is None else _copy_records(source, folder / ORIGIN)
    listed = ", ".join(f"`{name}`" for name in copied)
    origin = (
        f"\n\nThe records of the model that it was made from are in `{ORIGIN}/`: {listed}."
        if copied
        else ""
    )
    (folder / CARD).write_text(f"# {title}\n\n{NOT_CLINICAL}\n\n{text}{origin}\n", encoding="utf-8")
    write_manifest(folder, {"medm": medm.__version__, **metadata})


def _copy_records(source: Path, target: Path) -> list[str]:
    names = [name for name in _RECORDS if (source / name).is_file()]
    if names or (source / ORIGIN).is_dir():
        target.mkdir()
    for name in names:
        shutil.copyfile(source / name, target / name)
    if (source / ORIGIN).is_dir():  # an export of an export
        shutil.copytree(source / ORIGIN, target / ORIGIN)
        names.append(f"{ORIGIN}/")
    return names
