"""Atomic checkpoint folders: staged, verified, renamed, pruned.

Knows files, not models. A folder `checkpoint-N` has a `manifest.json` with the size and sha256 of
each of its files. The manifest is written last, and the folder gets its name only after everything
reached the disk. A kill at any moment leaves earlier checkpoints intact.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from medm.errors import CheckpointError, MedmError, RecipeError
from medm.files import LockedError, lock_file, remove, remove_directory, replace_directory
from medm.models.manifest import MANIFEST, read_manifest, verify, write_manifest
from medm.types import JsonObject

logger = logging.getLogger(__name__)

_FOLDER = re.compile(r"^checkpoint-(\d+)$")
_STAGING = ".tmp-"
FINISHED = ".finished-model"
"""Folder of a complete trained model whose files are being moved into the output folder."""
_MODEL = ("config.json", "*.safetensors")
"""Files that show that a model is at the top of an output folder."""
_SLACK = 1.2
"""Required free space, as a multiple of the last checkpoint's size."""


def folders(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders, newest step first, damaged ones included."""
    found = [
        (int(match[1]), path)
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if path.is_dir() and (match := _FOLDER.match(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def staging(output_dir: Path, step: int) -> Path:
    """Create the empty folder in which the checkpoint of a step is assembled."""
    folder = output_dir / f"{_STAGING}checkpoint-{step}"
    remove(folder)
    folder.mkdir(parents=True)
    return folder


def clear_staging(output_dir: Path) -> None:
    """Remove what a killed run left half written. A complete model (`FINISHED`) stays."""
    for path in output_dir.glob(f"{_STAGING}*"):
        logger.warning("removing %s, which an interrupted run left half written", path)
        remove(path)


def check_unused(output_dir: Path) -> None:
    """Raise `RecipeError` for a folder with another run's checkpoints or model.

    A new run would replace them.
    """
    if (output_dir / FINISHED).is_dir():
        raise RecipeError(
            f"{output_dir}: holds a trained model that could not be put in place ({FINISHED}); "
            "finish that with --resume, or choose another output_dir"
        )
    if present := folders(output_dir):
        raise RecipeError(
            f"{output_dir}: holds {present[0].name} of an earlier run; continue that run with "
            "--resume, or choose another output_dir"
        )
    if model := sorted(path.name for pattern in _MODEL for path in output_dir.glob(pattern)):
        raise RecipeError(
            f"{output_dir}: holds a finished model ({', '.join(model[:3])}) and no checkpoint; "
            "choose another output_dir, or train from the beginning and replace that model with "
            "--resume"
        )


def check_space(output_dir: Path, *, estimate: int) -> None:
    """Raise `CheckpointError` when the next checkpoint would not fit on the disk.

    Args:
        output_dir: folder of the checkpoints.
        estimate: expected bytes of the first one; later ones are estimated by the last.
    """
    last = folders(output_dir)
    needed = int(_SLACK * (folder_size(last[0]) if last else estimate))
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise CheckpointError(
            f"{output_dir}: the next checkpoint needs about {needed / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB are free. Earlier checkpoints are untouched: make room or lower "
            "train.save_total_limit, then continue with --resume"
        )


def commit(folder: Path, *, final: Path, metadata: Mapping[str, object]) -> None:
    """Turn a finished staging folder into a checkpoint.

    Args:
        folder: the staging folder, on the same file system as `final`.
        final: its final name; a folder of that name is replaced.
        metadata: further keys of the manifest (step, world size, recipe).
    """
    write_manifest(folder, metadata)
    replace_directory(folder, final)


def newest_good(output_dir: Path, *, metadata: Mapping[str, type] | None = None) -> Path | None:
    """Return the newest checkpoint that verifies, or None when there are no checkpoints.

    A damaged one is skipped, with an error in the log.

    Args:
        output_dir: folder of the checkpoints.
        metadata: keys that a manifest must hold besides its files, and their types.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    damaged: list[str] = []
    for folder in folders(output_dir):
        try:
            record = verify(folder)
            if lacking := [
                name
                for name, kind in (metadata or {}).items()
                if not isinstance(record.get(name), kind)
            ]:
                raise CheckpointError(f"{folder / MANIFEST}: lacks {', '.join(lacking)}")
        except CheckpointError as error:
            damaged.append(str(error))
            logger.error("DAMAGED CHECKPOINT, going back to an older one: %s", error)
            continue
        if damaged:
            logger.error("resuming from %s, the newest complete checkpoint", folder)
        return folder
    if damaged:
        raise CheckpointError(
            f"{output_dir}: none of its {len(damaged)} checkpoints is complete; start a new run in "
            "another folder\n  " + "\n  ".join(damaged)
        )
    return None


def finished_manifest(folder: Path) -> JsonObject:
    """Return the manifest of a model in `FINISHED`.

    It is the last but one of the files to be moved out of the folder.
    """
    place = folder if (folder / MANIFEST).exists() else folder.parent
    record = read_manifest(place)
    if not isinstance(record.get("step"), int) or not isinstance(record.get("recipe"), dict):
        raise CheckpointError(f"{place / MANIFEST}: lacks step or recipe")
    return record


def prune(output_dir: Path, *, keep: int, best: Path | None, newest: Path) -> None:
    """Remove all but the newest `keep` checkpoints and the best.

    `newest` is verified first.
    """
    doomed = [folder for folder in folders(output_dir)[keep:] if folder not in (best, newest)]
    if not doomed:
        return
    verify(newest)
    for folder in doomed:
        remove_directory(folder)


def folder_size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Hold the lock of an output folder. The lock of a killed run is released by the system.

    Raises:
        MedmError: another run holds it.
        CheckpointError: the folder cannot be created or written.
    """
    with ExitStack() as stack:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_file(output_dir / ".lock", target=output_dir))
        except LockedError as error:
            raise MedmError(
                f"{output_dir}: another run is writing here ({error}); wait for it or give this "
                "run an output_dir of its own"
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"output_dir: {output_dir} cannot be written ({error.strerror or error}); choose "
                "another folder"
            ) from None
        yield
