"""Limits of untrusted input: what one file may ask for, each settable through the environment.

A limit applies to every command and every process of a run, since children inherit the environment.
Declared sizes are compared with them before anything is allocated (docs/faults.md lists the costs
of the worst files).
"""

from __future__ import annotations

import os

from medm.errors import MedmError, RecipeError


def _setting(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isascii() or not text.isdecimal() or len(text) > 18 or int(text) < 1:
        raise RecipeError(
            f"{name} (environment): expected a whole number above 0, found {text[:40]!r}"
        )
    return int(text)


MAX_PIXELS = _setting("MEDM_MAX_PIXELS", 64 * 2**20)
"""Largest image that is decoded, in pixels.

Pillow alone would allow 179 million (a 17 kB PNG can declare 144 million).
"""
MAX_SIDE = _setting("MEDM_MAX_SIDE", 2**18)
"""Most pixels along one side of an image. Resizing takes 32 bytes and more for each."""
MAX_IMAGE_BYTES = _setting("MEDM_MAX_IMAGE_BYTES", 2**28)
"""Most bytes of an image's samples as the file declares them: 44 million pixels of 16-bit RGB."""
MAX_SCANS = _setting("MEDM_MAX_SCANS", 100)
"""Most scans of a progressive JPEG. Encoders write about ten; each costs 0.07 s at 64 Mpixel."""

MAX_VOXELS = _setting("MEDM_MAX_VOXELS", 2**29)
"""Largest volume that is read: 512 x 512 x 2048."""
MAX_BYTES = _setting("MEDM_MAX_VOLUME_BYTES", 2**31)
"""Most bytes of voxels, as stored."""
MAX_MEMORY = _setting("MEDM_MAX_MEMORY", 2**31)
"""Most bytes of memory that reading and preparing a small file may take."""
_MEMORY_PER_BYTE = 64
"""Bytes of memory that a larger file may take for each of its bytes on the disk.

A CT compresses to a fifth, and takes ten bytes for each stored pair; a file of zeros compresses a
thousand times.
"""

MAX_RECORD_BYTES = _setting("MEDM_MAX_RECORD_BYTES", 16 * 2**20)
"""Maximum bytes of a record; a longer one is bad. Conversations are kilobytes, and one endless line
must not fill the memory."""
MAX_RECIPE_BYTES = _setting("MEDM_MAX_RECIPE_BYTES", 2**20)
"""Maximum bytes of a recipe."""
MAX_RECIPE_VALUES = _setting("MEDM_MAX_RECIPE_VALUES", 100_000)
"""Most values of a recipe or an override, each counted as often as an alias repeats it."""
MAX_RECIPE_DEPTH = 100
"""Deepest nesting of a recipe or an override."""

MAX_TEMPLATE_SECONDS = _setting("MEDM_MAX_TEMPLATE_SECONDS", 10)
"""Longest time of one conversation in a chat template, which is a program from somewhere else."""
MAX_TEMPLATE_MEMORY = _setting("MEDM_MAX_TEMPLATE_MEMORY", 2**30)
"""Most bytes by which memory may grow while a chat template is rendered."""


def check_memory(
    needed: int, *, held: int, name: str, error: type[MedmError], what: str = "reading it"
) -> None:
    """Refuse a small file that would take much memory.

    Args:
        needed: bytes of memory.
        held: bytes of the file on the disk.
        name: the file, for messages.
        error: kind of the error.
        what: the work that takes them, for messages.

    Raises:
        error: `needed` is more than `MAX_MEMORY` and than 64 bytes for each byte of the file.
    """
    allowed = max(MAX_MEMORY, _MEMORY_PER_BYTE * held)
    if needed > allowed:
        raise error(
            f"{name}: {held} bytes on the disk, but {what} would take {needed / 2**30:.1f} GiB of "
            f"memory by its header, more than the {allowed / 2**30:.1f} GiB that are allowed; is "
            "the file damaged? If it is meant so, set MEDM_MAX_MEMORY (bytes)"
        )
