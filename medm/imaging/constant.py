"""Detection of files that preprocessing makes constant: every voxel or pixel becomes one value.

The model would be trained on, or asked about, an empty image. The one implementation for images and
volumes, so that training, the data check, the preview, the caches and inference agree:

- a file that varies and becomes one value in every channel is refused, with the step that does it
  and its ranges;
- a file that holds one value only, a single channel that becomes one value, and a file that lies
  almost wholly outside of its windows are used with a warning for each file: blank images and
  narrow windows can be intended.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np

from medm.errors import MediaError
from medm.imaging.notices import warn_of_file

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-6
"""Of values in 0..1: less is the rounding of an interpolation between equal numbers."""
_MOSTLY = 0.999
"""Fraction of a file outside its windows above which a stray object is suspected and warned of."""


@dataclass(frozen=True, slots=True)
class Step:
    """The values of one channel after a step of the preprocessing."""

    name: str
    """The step as the description calls it: "window -1000..1000", "crop_foreground 0.1"."""
    low: float
    high: float
    tolerance: float = _TOLERANCE
    """Largest difference that counts as zero; 0 for stored values, which have no scale yet."""

    @classmethod
    def of(cls, name: str, values: np.ndarray | Tensor, *, tolerance: float = _TOLERANCE) -> Step:
        """Return the range of an array or tensor."""
        return cls(name, float(values.min()), float(values.max()), tolerance)

    @property
    def is_constant(self) -> bool:
        """Return true if the step leaves one value."""
        return self.high - self.low <= self.tolerance


def check_prepared(
    shown: np.ndarray | Tensor,
    stored: np.ndarray,
    *,
    name: str,
    windows: Sequence[Sequence[float]],
    trace: Callable[[int], Sequence[Step]],
    unit: Literal["voxel", "pixel"] = "voxel",
) -> None:
    """Check that a prepared array still varies, and name the step that removed the variation.

    Args:
        shown: (C, *spatial), array or tensor: the result before mean and std, in 0..1, without
            padding.
        stored: the values of the file.
        name: the file, for messages.
        windows: lower and upper stored values that become 0 and 1, one pair per channel, or empty.
        trace: the steps of a channel, from the stored values on; called only where something is
            wrong.
        unit: what one value is called.

    Raises:
        MediaError: the file varies, but no channel of the result does.
    """
    if math.prod(shown.shape[1:]) < 2:
        return  # a single value is constant however it is made
    constant = [Step.of("", channel).is_constant for channel in shown]
    if any(constant) and warn_if_constant(stored, name, unit=unit):
        return
    if all(constant):
        causes = dict.fromkeys(_cause(trace(channel)) for channel in range(len(constant)))
        raise MediaError(
            f"{name}: preprocessing turns every {unit} into one value, so the model would see "
            f"nothing: {'; '.join(causes)}. "
            "Set the preprocessing that fits the file, or leave the file out"
        )
    if len(windows) == len(constant):
        for channel in np.flatnonzero(constant):
            warn_of_file(
                logger,
                kind=f"constant channel {channel + 1}",
                file=name,
                message=f"{name}: channel {channel + 1} of {len(constant)} becomes one value: "
                f"{_cause(trace(int(channel)))}",
            )
    if windows and all(_at_an_end(channel) > _MOSTLY for channel in shown):
        _warn_if_outside(stored, windows, name, unit)


def warn_if_constant(
    stored: np.ndarray, name: str, *, unit: Literal["voxel", "pixel"] = "voxel"
) -> bool:
    """Return true, with a warning, if the file itself holds one value: it may be blank."""
    first = stored[(0,) * min(stored.ndim, 3 if unit == "voxel" else 2)]
    if (stored != first).any():
        return False
    value = f"{first:g}" if first.ndim == 0 else ", ".join(f"{part:g}" for part in first)
    warn_of_file(
        logger,
        kind="constant",
        file=name,
        message=f"{name}: all {unit}s are {value}; the file is blank, perhaps from a failed export",
    )
    return True


def refuse_lost_values(before: np.ndarray, after: np.ndarray, name: str, step: str) -> None:
    """Refuse numbers that differ before a conversion and not after it. Raises `MediaError`."""
    if after.size > 1 and after.min() == after.max() and before.min() != before.max():
        raise MediaError(
            f"{name}: {step} turns the stored values {before.min():g}..{before.max():g} into the "
            f"one value {after.min():g}, so nothing of the volume is left; correct the header, or "
            "store the values in a smaller range"
        )


def looks_constant(prepared: np.ndarray) -> bool:
    """Return true if a prepared array (C, *spatial), after mean and std, needs a closer check."""
    if math.prod(prepared.shape[1:]) < 2:
        return False
    return any(
        float(channel.max()) - float(channel.min()) <= 100 * _TOLERANCE for channel in prepared
    ) or all(
        max((channel == channel.min()).mean(), (channel == channel.max()).mean()) > _MOSTLY
        for channel in prepared
    )


def _cause(steps: Sequence[Step]) -> str:
    """Return the first step after which there is one value, with the range before it."""
    for before, after in pairwise(steps):
        if after.is_constant:
            return f"{after.name} makes {after.low:g} of the values {before.low:g}..{before.high:g}"
    return " and ".join(step.name for step in steps[1:])


def _at_an_end(channel: np.ndarray | Tensor) -> float:
    """Return the fraction of a channel at 0 or at 1, the larger; 0 if neither is a majority."""
    if 1 - _MOSTLY + _TOLERANCE < float(channel.mean()) < _MOSTLY - _TOLERANCE:
        return 0.0
    count = max(int((channel < _TOLERANCE).sum()), int((channel > 1 - _TOLERANCE).sum()))
    return count / math.prod(channel.shape)


def _warn_if_outside(
    stored: np.ndarray, windows: Sequence[Sequence[float]], name: str, unit: str
) -> None:
    outside = [max((stored < low).mean(), (stored > high).mean()) for low, high in windows]
    if min(outside) > _MOSTLY:
        ranges = ", ".join(f"{low:g}..{high:g}" for low, high in windows)
        warn_of_file(
            logger,
            kind="outside of the windows",
            file=name,
            message=f"{name}: {100 * min(outside):.2f} % of the {unit}s lie outside of the windows "
            f"({ranges}); the values are {stored.min():g}..{stored.max():g}. Are the scale "
            "and the windows right?",
        )
