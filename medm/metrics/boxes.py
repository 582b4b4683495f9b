"""Boxes written in text: codecs, parsing that never fails, and IoU in two and three dimensions.

A box is its lower corner, then its upper corner: (x1, y1, x2, y2) in an image, (d1, h1, w1, d2, h2,
w2) in a volume. Texts hold fractions of the extent (width and height; depth, height and width);
`scale` turns them into pixels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, TypeVar

from medm.metrics.base import DEFAULT, MetricResult, Resampling, check_lengths, mean_result

Box: TypeAlias = tuple[float, ...]
_Corner = TypeVar("_Corner", int, str)


@dataclass(frozen=True, slots=True)
class ParsedBoxes:
    """Boxes that a text names.

    A text without readable and without malformed boxes names no box.
    """

    boxes: tuple[Box, ...] = ()
    """Fractions of the extent, corners in order, inside 0..1."""
    malformed: int = 0
    """Beginnings of a box that could not be read."""
    repaired: int = 0
    """Boxes among `boxes` whose corners were swapped or which reached outside."""

    @property
    def first(self) -> Box | None:
        """First box that could be read."""
        return self.boxes[0] if self.boxes else None


class BoxCodec(Protocol):
    """One way of writing boxes."""

    @property
    def axes(self) -> int:
        """2 for images, 3 for volumes."""
        ...

    def encode(self, box: Box, extent: Sequence[float]) -> str:
        """Return the text of a box in pixels; coordinates outside of the extent are clipped."""
        ...

    def parse(self, text: str) -> ParsedBoxes:
        """Every box of a text, as fractions. Never raises."""
        ...


@dataclass(frozen=True, slots=True)
class BinnedBoxes:
    """`{<x1><y1><x2><y2>}`: whole numbers on a grid (MiniGPT-v2, Uni-Med, MedM-VL).

    A coordinate comes back within extent / bins (floor) or half of that (round).
    """

    bins: int = 100
    """Number of steps; 0 is the near edge and `bins` the far one."""
    rounding: Literal["floor", "round"] = "floor"
    """Uni-Med floors, which pulls every box towards the origin by half a step on average."""
    order: Literal["xy", "yx"] = "xy"
    """Coordinate of a corner that is written first."""
    axes: int = 2

    _CANDIDATE = re.compile(r"\{\s*<[^{}]{0,200}\}?")
    _WHOLE = re.compile(r"\{" + r"\s*<\s*([-+]?\d{1,9})\s*>" * 4 + r"\s*\}")

    def encode(self, box: Box, extent: Sequence[float]) -> str:
        _check_box(box, extent, self.axes)
        steps = [fraction * self.bins for fraction in _fractions(box, extent)]
        whole = [
            min(self.bins, max(0, math.floor(s) if self.rounding == "floor" else round(s)))
            for s in steps
        ]
        return "{" + "".join(f"<{number}>" for number in self._ordered(whole)) + "}"

    def parse(self, text: str) -> ParsedBoxes:
        boxes, malformed, repaired = [], 0, 0
        for candidate in self._CANDIDATE.findall(text):
            found = self._WHOLE.fullmatch(candidate.strip())
            if not found:
                malformed += 1
                continue
            box, changed = _in_order([int(n) / self.bins for n in self._ordered(found.groups())])
            boxes.append(box)
            repaired += changed
        return ParsedBoxes(tuple(boxes), malformed, repaired)

    def _ordered(self, four: Sequence[_Corner]) -> list[_Corner]:
        first, second, third, fourth = four
        return (
            [first, second, third, fourth] if self.order == "xy" else [second, first, fourth, third]
        )


@dataclass(frozen=True, slots=True)
class FractionBoxes:
    """`<bx_start>[d1, h1, w1, d2, h2, w2]<bx_end>` in fractions of depth, height, width (M3D).

    The markers are optional.

    A coordinate comes back within extent * 0.5 * 10 ** -decimals.
    """

    decimals: int = 3
    marked: bool = True
    """Write the markers; both forms are always read."""
    axes: int = 3

    _CANDIDATE = re.compile(r"<bx_start>\s*(\[[^\[\]]{0,200}\]?)?|(\[[^\[\]]{0,200}\])")
    _NUMBER = re.compile(r"[-+]?(?:\d{1,9}(?:\.\d{0,20})?|\.\d{1,20})")

    def encode(self, box: Box, extent: Sequence[float]) -> str:
        _check_box(box, extent, self.axes)
        fractions = [
            round(min(1.0, max(0.0, fraction)), self.decimals)
            for fraction in _fractions(box, extent)
        ]
        text = "[" + ", ".join(map(str, fractions)) + "]"
        return f"<bx_start>{text}<bx_end>" if self.marked else text

    def parse(self, text: str) -> ParsedBoxes:
        boxes, malformed, repaired = [], 0, 0
        for candidate in self._CANDIDATE.finditer(text):
            marked, plain = candidate.groups()
            body = marked or plain or ""
            parts = [part.strip() for part in body.strip("[]").split(",")]
            readable = (
                body.endswith("]")
                and len(parts) == 2 * self.axes
                and all(map(self._NUMBER.fullmatch, parts))
            )
            if readable:
                box, changed = _in_order([float(part) for part in parts])
                boxes.append(box)
                repaired += changed
            elif (
                candidate.group().startswith("<bx_start>") or len(parts) > 3
            ):  # "[1, 2]" is not an attempt at a box
                malformed += 1
        return ParsedBoxes(tuple(boxes), malformed, repaired)


CODECS: dict[str, BoxCodec] = {
    "uni-med": BinnedBoxes(),
    "thousand": BinnedBoxes(bins=1000, rounding="round"),
    "m3d": FractionBoxes(),
}
"""By the names that recipes use: Uni-Med's grid of 100, one of 1000 (boxes lose ten times less),
M3D's fractions."""


def scale(box: Box, extent: Sequence[float]) -> Box:
    """Fractions to pixels; `extent` as for `encode`."""
    return tuple(fraction * size for fraction, size in zip(box, [*extent, *extent], strict=True))


def iou(first: Box, second: Box, *, inclusive: float = 0.0) -> float:
    """Intersection over union of two boxes of any number of axes.

    Boxes without extent overlap fully when they are the same and not at all otherwise.

    `inclusive` is added to every side length: 1 where corners name pixels that belong to the box
    (Uni-Med's scoring).
    """
    sides = [min(a, b) - max(c, d) + inclusive for a, b, c, d in _sides(first, second)]
    shared = math.prod(max(0.0, side) for side in sides)
    union = _volume(first, inclusive) + _volume(second, inclusive) - shared
    return shared / union if union > 0 else float(first == second)


def enclosing_iou(first: Box, second: Box) -> float:
    """Intersection over the volume of the smallest box around both (M3D-Bench's "IoU").

    It is never above the true IoU.
    """
    shared = math.prod(max(0.0, min(a, b) - max(c, d)) for a, b, c, d in _sides(first, second))
    around = math.prod(max(a, b) - min(c, d) for a, b, c, d in _sides(first, second))
    return shared / (around + 1e-6)


def box_iou(
    predictions: Sequence[Box | str | None],
    references: Sequence[Box | str],
    *,
    codec: str = "uni-med",
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Mean IoU (true union), and the fraction of predictions without a readable box.

    Predictions are boxes in the unit of the references, None where no box could be read, or texts
    to be parsed.
    """
    scores, missing = _scores(predictions, references, CODECS[codec], iou)
    signature = f"union:true|axes:any|unreadable:0|codec:{codec}"
    return [
        mean_result("box-iou", scores, signature, resampling),
        mean_result("box-unreadable", missing, signature, resampling),
    ]


def box_accuracy(
    predictions: Sequence[Box | str | None],
    references: Sequence[Box | str],
    *,
    codec: str = "uni-med",
    threshold: float = 0.5,
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Fraction of boxes whose IoU is at least the threshold."""
    scores, _ = _scores(predictions, references, CODECS[codec], iou)
    hits = [float(score >= threshold) for score in scores]
    signature = f"union:true|iou>={threshold:g}|unreadable:0|codec:{codec}"
    return [mean_result(f"box-accuracy@{threshold:g}", hits, signature, resampling)]


def _scores(
    predictions: Sequence[Box | str | None],
    references: Sequence[Box | str],
    codec: BoxCodec,
    score: Callable[[Box, Box], float],
) -> tuple[list[float], list[float]]:
    """IoU of each pair (0 where there is no box), and whether there was none."""
    check_lengths(predictions, references)
    scores, missing = [], []
    for index, (guess, truth) in enumerate(zip(predictions, references, strict=True)):
        guessed = codec.parse(guess).first if isinstance(guess, str) else guess
        true = codec.parse(truth).first if isinstance(truth, str) else truth
        if true is None:
            raise ValueError(f"item {index}: no box can be read from the reference {truth!r}")
        missing.append(float(guessed is None))
        scores.append(0.0 if guessed is None else score(tuple(guessed), tuple(true)))
    return scores, missing


def _sides(first: Box, second: Box) -> list[tuple[float, float, float, float]]:
    """Per axis: both upper, then both lower coordinates."""
    if len(first) != len(second) or len(first) % 2:
        raise ValueError(
            f"boxes need the same number of axes, found {len(first)} and {len(second)} coordinates"
        )
    axes = len(first) // 2
    return [(first[axes + k], second[axes + k], first[k], second[k]) for k in range(axes)]


def _volume(box: Box, inclusive: float) -> float:
    axes = len(box) // 2
    return math.prod(max(0.0, box[axes + k] - box[k] + inclusive) for k in range(axes))


def _check_box(box: Box, extent: Sequence[float], axes: int) -> None:
    if len(box) != 2 * axes or len(extent) != axes:
        raise ValueError(
            f"expected a box of {2 * axes} coordinates and an extent of {axes}, found {len(box)} "
            f"and {len(extent)}"
        )
    if min(extent) <= 0 or not all(map(math.isfinite, box)):
        raise ValueError(f"cannot write the box {box} in an extent of {tuple(extent)}")


def _fractions(box: Box, extent: Sequence[float]) -> list[float]:
    return [coordinate / size for coordinate, size in zip(box, [*extent, *extent], strict=True)]


def _in_order(numbers: Sequence[float]) -> tuple[Box, bool]:
    """Corners in order and inside 0..1, and whether that took a repair."""
    axes = len(numbers) // 2
    inside = [min(1.0, max(0.0, number)) for number in numbers]
    lower = [min(inside[k], inside[axes + k]) for k in range(axes)]
    upper = [max(inside[k], inside[axes + k]) for k in range(axes)]
    box = (*lower, *upper)
    return box, box != tuple(numbers)
