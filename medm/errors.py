"""Errors that medm raises deliberately.

Every message says what was expected, what was found, where, and what to do. Any other exception is
a defect of medm and keeps its traceback; the command line prints a `MedmError` without one.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path


class MedmError(Exception):
    """Base of every error that a user can cause and fix."""


class RecipeError(MedmError, ValueError):
    """A recipe, an override or an option does not fit the schema."""


class UnknownNameError(RecipeError):
    """A name that no registry knows.

    Args:
        kind: kind of part, in the singular ("connector").
        name: the unknown name.
        known: all known names.
        hint: text after the list.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], *, hint: str = "") -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        super().__init__(f"unknown {kind} {name!r}{suggest(name, self.known)}{hint}")


class DataError(MedmError, ValueError):
    """One record of an annotation file cannot be used.

    Args:
        reason: expectation, finding and advice.
        file: the annotation file.
        index: position of the record in it, from 0.
        field: the field at fault, as a dotted path ("conversations.1.from").
    """

    def __init__(
        self,
        reason: str,
        *,
        file: str | Path | None = None,
        index: int | None = None,
        field: str | None = None,
    ) -> None:
        self.reason, self.file, self.index, self.field = reason, file, index, field
        super().__init__(reason)

    def at(
        self, *, file: str | Path | None = None, index: int | None = None, field: str | None = None
    ) -> DataError:
        """Fill in the unknown parts of the place, and return this error."""
        self.file = self.file if self.file is not None else file
        self.index = self.index if self.index is not None else index
        self.field = self.field if self.field is not None else field
        return self

    def __str__(self) -> str:
        place = [str(self.file)] if self.file is not None else []
        if self.index is not None:
            place.append(f"record {self.index}")
        if self.field is not None:
            place.append(f"field '{self.field}'")
        return f"{', '.join(place)}: {self.reason}" if place else self.reason


class MediaError(DataError):
    """An image or a volume is missing, damaged, unsafe or not what the recipe declares."""


class MediaSizeError(MediaError):
    """An image or a volume has more pixels or voxels than are allowed."""


class GeometryError(MediaError):
    """The header of a volume, or the slices of a series, describe no grid that can be used."""


class InputLostError(MedmError):
    """Input became unreadable, or changed, after the work began.

    The cause is a network drive, a disk, a limit of the machine or another program, not a record.
    The work stops under every policy for bad records.
    """


class CheckpointError(MedmError):
    """Weights do not fit, are damaged, or would need unsafe loading."""


class NonFiniteError(MedmError):
    """A loss, gradient or weight is not finite."""


class ExportError(MedmError):
    """A model cannot be written in the asked format without changing what it computes."""


class DeviceError(MedmError):
    """A required device, precision or optional library is missing."""


_MACHINE_FAULTS = frozenset(
    getattr(errno, name)
    for name in (
        "EIO",
        "ESTALE",
        "EMFILE",
        "ENFILE",
        "ENOMEM",
        "ETIMEDOUT",
        "ENOTCONN",
        "ECONNRESET",
        "ECONNABORTED",
        "ECONNREFUSED",
        "EHOSTDOWN",
        "EHOSTUNREACH",
        "ENETDOWN",
        "ENETUNREACH",
        "EREMOTEIO",
        "ENODEV",
        "ENXIO",
        "EAGAIN",
        "EINTR",
        "EBUSY",
        "ENOLCK",
        "ENOLINK",
        "ECOMM",
    )
    if hasattr(errno, name)
)
"""Error codes of the operating system for faults of disks, network drives, memory or
descriptors."""


def machine_fault(error: BaseException) -> OSError | None:
    """Return the operating system's error behind an error that is the machine's fault.

    Examples are a full table of descriptors, a network drive that does not answer, a disk that
    cannot be read. The record is not bad, and a retry may succeed. Errors raised `from None` keep
    their context, which is searched too.
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, OSError) and cause.errno in _MACHINE_FAULTS:
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def unavailable(source: str, error: Exception, *, key: str) -> str:
    """Return a message with the reason why a published file cannot be read, and advice.

    Args:
        source: a folder, or an id of the Hugging Face hub.
        error: error of transformers or of the hub's client.
        key: recipe key or command-line option of the source.
    """
    if source.startswith(("/", ".", "~")) or source.count("/") > 1 or "\\" in source:
        return f"{source}: no such folder"
    if Path(source).is_dir():
        return f"{source}: no usable config ({error})"
    reason = str(error).strip().partition("\n")[0]
    return (
        f"{source}: no such folder here, and it could not be read from the Hugging Face hub "
        f"({reason}). Without a network: download it on a machine with a network "
        f"(hf download {source} --local-dir DIR) and set {key}=DIR"
    )


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `": did you mean 'mlp'? (known: linear, mlp)"`; the list alone if no name is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    listing = f"known: {', '.join(known)}" if known else "none are registered"
    return f": did you mean {near[0]!r}? ({listing})" if near else f" ({listing})"
