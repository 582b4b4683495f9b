"""Checkpoint folders that are whole or not there: written aside, verified, renamed, pruned.

Knows files, not models. A folder `checkpoint-N` has a `manifest.json` with the size and sha256 of each of its
files; it is written last, and the folder gets its name only after everything reached the disk. A kill at any
moment leaves earlier checkpoints as they were.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from medm.errors import CheckpointError, MedmError, RecipeError
from medm.files import LockedError, lock_file, sync
from medm.models.manifest import MANIFEST, read_manifest, verify, write_manifest

logger = logging.getLogger(__name__)

_FOLDER = re.compile(r"^checkpoint-(\d+)$")
_STAGING = ".tmp-"
FINISHED = ".finished-model"
"""Folder of a whole trained model whose files are being moved into the output folder."""
_MODEL = ("config.json", "*.safetensors")
"""Files by which a model at the top of an output folder is known."""
_SLACK = 1.2
"""Free space that has to be there, as a multiple of the last checkpoint's size."""


def folders(output_dir: Path) -> list[Path]:
    """Checkpoint folders, newest step first, damaged or not."""
    found = [
        (int(match[1]), path)
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if path.is_dir() and (match := _FOLDER.match(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def staging(output_dir: Path, step: int) -> Path:
    """A new, empty folder in which the checkpoint of a step is put together."""
    folder = output_dir / f"{_STAGING}checkpoint-{step}"
    remove(folder)
    folder.mkdir(parents=True)
    return folder


def clear_staging(output_dir: Path) -> None:
    """Remove what a killed run left half written. A whole model (`FINISHED`) is not among it."""
    for path in output_dir.glob(f"{_STAGING}*"):
        logger.warning("removing %s, which an interrupted run left half written", path)
        remove(path)


def check_unused(output_dir: Path) -> None:
    """Raise `RecipeError` when a folder holds another run's checkpoints or model, which a new run would replace."""
    if (output_dir / FINISHED).is_dir():
        raise RecipeError(
            f"{output_dir}: holds a trained model that could not be put in place ({FINISHED}); finish that with "
            "--resume, or choose another output_dir"
        )
    if present := folders(output_dir):
        raise RecipeError(
            f"{output_dir}: holds {present[0].name} of an earlier run; continue that run with --resume, or choose "
            "another output_dir"
        )
    if model := sorted(path.name for pattern in _MODEL for path in output_dir.glob(pattern)):
        raise RecipeError(
            f"{output_dir}: holds a finished model ({', '.join(model[:3])}) and no checkpoint; choose another "
            "output_dir, or train from the beginning and replace that model with --resume"
        )


def check_space(output_dir: Path, *, estimate: int) -> None:
    """Raise `CheckpointError` when the next checkpoint would not fit on the disk.

    Args:
        output_dir: where checkpoints go.
        estimate: bytes that the first one is expected to take; later ones are judged by the last.
    """
    last = folders(output_dir)
    needed = int(_SLACK * (folder_size(last[0]) if last else estimate))
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise CheckpointError(
            f"{output_dir}: the next checkpoint needs about {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free. "
            "Earlier checkpoints are untouched: make room or lower train.save_total_limit, then continue with --resume"
        )


def commit(folder: Path, *, final: Path, facts: Mapping[str, Any]) -> None:
    """Turn a finished staging folder into a checkpoint.

    Args:
        folder: the staging folder, on the same file system as `final`.
        final: the name it gets; a folder of that name is replaced.
        facts: what else the manifest says (step, world size, recipe).
    """
    write_manifest(folder, facts)
    old = final.with_name(f"{_STAGING}old-{final.name}")
    remove(old)
    if final.exists():
        final.rename(old)
    folder.rename(final)
    sync(final.parent)
    remove(old)


def newest_good(output_dir: Path, *, facts: Mapping[str, type] | None = None) -> Path | None:
    """The newest checkpoint that verifies; None where there is none at all.

    A damaged one is passed over with a line that nobody can miss.

    Args:
        output_dir: where the checkpoints are.
        facts: what a manifest must say besides its files, and of which type.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    damaged: list[str] = []
    for folder in folders(output_dir):
        try:
            record = verify(folder)
            if lacking := [name for name, kind in (facts or {}).items() if not isinstance(record.get(name), kind)]:
                raise CheckpointError(f"{folder / MANIFEST}: does not say {', '.join(lacking)}")
        except CheckpointError as error:
            damaged.append(str(error))
            logger.error("DAMAGED CHECKPOINT, going back to an older one: %s", error)
            continue
        if damaged:
            logger.error("resuming from %s, the newest checkpoint that is whole", folder)
        return folder
    if damaged:
        raise CheckpointError(
            f"{output_dir}: none of its {len(damaged)} checkpoints is whole; start a new run in another folder\n  "
            + "\n  ".join(damaged)
        )
    return None


def finished_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a model in `FINISHED`, which is the last but one of the files to be moved out of it."""
    place = folder if (folder / MANIFEST).exists() else folder.parent
    record = read_manifest(place)
    if not isinstance(record.get("step"), int) or not isinstance(record.get("recipe"), dict):
        raise CheckpointError(f"{place / MANIFEST}: does not say step and recipe")
    return record


def prune(output_dir: Path, *, keep: int, spare: Path | None, newest: Path) -> None:
    """Remove all but the newest `keep` checkpoints and `spare` (the best), once `newest` has been read back."""
    doomed = [folder for folder in folders(output_dir)[keep:] if folder not in (spare, newest)]
    if not doomed:
        return
    verify(newest)
    for folder in doomed:
        # Renamed first: a kill during the removal must not leave half a checkpoint under its name.
        going = folder.with_name(f"{_STAGING}old-{folder.name}")
        remove(going)
        folder.rename(going)
        remove(going)


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def remove(path: Path) -> None:
    """Remove a folder or a file if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Background:
    """One action at a time, in a thread beside the training. What goes wrong in it is raised by the next `wait`."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether the last action is still running."""
        return self._running is not None and not self._running.done()

    def start(self, action: Callable[[], None]) -> None:
        """Begin, once the action before is done."""
        self.wait()
        self._running = self._pool.submit(action)

    def wait(self) -> None:
        """Until nothing is running any more."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Hold an output folder for this run alone; a killed run lets go by itself.

    Raises:
        MedmError: another run holds it.
        CheckpointError: the folder cannot be made or written.
    """
    with ExitStack() as stack:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_file(output_dir / ".lock", target=output_dir))
        except LockedError as error:
            raise MedmError(
                f"{output_dir}: another run is writing here ({error}); wait for it or give this run an output_dir of "
                "its own"
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"output_dir: {output_dir} cannot be written ({error.strerror or error}); choose another folder"
            ) from None
        yield
