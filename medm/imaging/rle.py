"""Run-length codes of masks, as COCO writes them: https://cocodataset.org/#format-data.

A code is `{"size": [rows, columns], "counts": ...}`. The runs go down the columns, the first column
first, and begin with the background: `[2, 3, 1]` is two voxels outside, three inside, one outside.
`counts` is a list of them, or a text that holds the same numbers in less space. Volumes have the
same code with three sides, [slices, rows, columns]; the first axis is the fastest here, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medm.errors import MediaError
from medm.limits import MAX_PIXELS, MAX_VOXELS

_FIRST = 48
"""Code of the character that stands for 0 ("0")."""
_BITS, _MORE, _SIGN = 5, 32, 16
"""Bits of a number in one character; the bit that says another follows; the sign in the last."""
_MAX_CHARACTERS = 7
"""Most characters of one number: 35 bits are more than any mask has voxels."""


def encode(mask: np.ndarray, *, compressed: bool = True) -> dict[str, Any]:
    """Return the run-length code of a mask.

    Args:
        mask: (rows, columns) or (slices, rows, columns); what is not 0 is inside.
        compressed: `counts` is text; otherwise a list of whole numbers.

    Raises:
        ValueError: a mask of other axes, or without voxels.
    """
    if mask.ndim not in (2, 3) or not mask.size:
        raise ValueError(f"expected a mask of 2 or 3 axes with voxels, found shape {mask.shape}")
    inside = np.asarray(mask, dtype=bool).ravel(order="F")
    changes = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    counts = np.diff(changes, prepend=0, append=inside.size)
    if inside[0]:
        counts = np.concatenate([[0], counts])
    size = [int(side) for side in mask.shape]
    return {"size": size, "counts": _to_text(counts) if compressed else counts.tolist()}


def decode(rle: Mapping[str, Any]) -> np.ndarray:
    """Return the mask of a run-length code, bool of shape `size`.

    Args:
        rle: `size`, two or three sides, and `counts`, a list or text. Other fields are not read.

    Raises:
        MediaError: with `size` or `counts` as field: missing, of another type, too large, damaged,
            or runs that do not fill the mask.
    """
    size = decoded_size(rle)
    counts = rle.get("counts")
    if isinstance(counts, str):
        runs = _from_text(counts)
    elif isinstance(counts, list):
        runs = _from_list(counts)
    else:
        raise MediaError(
            f"expected a list of run lengths or text, found {type(counts).__name__}", field="counts"
        )
    voxels = math.prod(size)
    if runs.size and runs.min() < 0:
        raise MediaError(f"a run of {runs.min()} voxels; expected 0 or more", field="counts")
    if runs.sum() != voxels:
        raise MediaError(
            f"the runs have {runs.sum()} voxels in all, and a mask of "
            f"{' x '.join(map(str, size))} has {voxels}",
            field="counts",
        )
    inside = np.arange(runs.size) % 2 == 1
    return np.repeat(inside, runs).reshape(size, order="F")


def decoded_size(rle: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of the mask of a run-length code.

    Raises:
        MediaError: with `size` as field: missing, of another type or too large.
    """
    size = rle.get("size")
    if (
        not isinstance(size, list)
        or len(size) not in (2, 3)
        or not all(isinstance(side, int) and not isinstance(side, bool) for side in size)
        or min(size) < 1
    ):
        raise MediaError(
            "expected [rows, columns], or [slices, rows, columns] of a volume, as whole numbers "
            "from 1 on",
            field="size",
        )
    limit = MAX_PIXELS if len(size) == 2 else MAX_VOXELS
    if math.prod(size) > limit:
        raise MediaError(
            f"{' x '.join(map(str, size))} are more than the {limit} voxels that are allowed",
            field="size",
        )
    return tuple(size)


def _from_list(counts: Sequence[object]) -> np.ndarray:
    for position, count in enumerate(counts):
        if not isinstance(count, int) or isinstance(count, bool) or abs(count) > MAX_VOXELS:
            raise MediaError(
                f"expected whole numbers of voxels, at most {MAX_VOXELS}; number {position} is "
                "none",
                field="counts",
            )
    return np.array(counts, dtype=np.int64)


def _from_text(text: str) -> np.ndarray:
    """Return the run lengths of a compressed code.

    A number is written in groups of 5 bits, the lowest first; from the fourth on it is the
    difference from the number two before it: runs of one object resemble each other.
    """
    try:
        codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - _FIRST
    except UnicodeEncodeError:
        codes = np.array([-1])
    if codes.size and (codes.min() < 0 or codes.max() >= 2 * _MORE):
        raise MediaError(
            "a character that compressed run lengths never hold; expected '0' to 'o' alone",
            field="counts",
        )
    last = np.flatnonzero(codes & _MORE == 0)
    if codes.size and (not last.size or last[-1] != codes.size - 1):
        raise MediaError(
            "the compressed run lengths end in the middle of a number; is the text cut off?",
            field="counts",
        )
    first = np.concatenate([[0], last[:-1] + 1]) if last.size else last
    lengths = last - first + 1
    if last.size and lengths.max() > _MAX_CHARACTERS:
        raise MediaError(
            f"a number of {lengths.max()} characters; run lengths have at most {_MAX_CHARACTERS}",
            field="counts",
        )
    if not last.size:
        return np.empty(0, dtype=np.int64)
    places = np.arange(codes.size) - np.repeat(first, lengths)
    numbers = np.add.reduceat((codes & (_MORE - 1)) << (_BITS * places), first)
    negative = codes[last] & _SIGN != 0
    numbers[negative] -= np.int64(1) << (_BITS * lengths[negative])
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers


def _to_text(counts: np.ndarray) -> str:
    """Return the compressed form of run lengths; see `_from_text`."""
    numbers = counts.copy()
    numbers[3:] -= counts[1:-2]
    text = bytearray()
    for number in numbers.tolist():
        while True:
            bits = number & (_MORE - 1)
            number >>= _BITS
            # The sign is the highest bit of the last group.
            if number == (-1 if bits & _SIGN else 0):
                text.append(bits + _FIRST)
                break
            text.append(bits + _MORE + _FIRST)
    return text.decode("ascii")
