"""Model folders that say where they come from."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import medm
from medm.errors import MedmError
from medm.models.manifest import write_manifest
from medm.os_errors import require_writable

CARD, ORIGIN = "README.md", "origin"
_RECORDS = ("recipe.yaml", "run.json", "import.json", CARD)
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
