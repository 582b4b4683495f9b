"""Two implementations of the same work, measured side by side in one process.

The rounds are interleaved (A B B A), so that other load on the machine affects both; the ratio of a
round is formed inside it, and the figure is the median over rounds with a bootstrap interval. The
two A's of a round give the ratio of the peer with itself: the noise. A cell is only measured after
its gate has shown that both implementations give the same numbers. A fast implementation that fails
its gate has failed.
"""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np

ROUNDS, WARM_UP = 7, 2
FEWEST = 3
"""Least number of rounds."""
NOISE = (0.95, 1.05)
"""Range of the median of the peer against itself in which a ratio counts as measured."""


class Cell(ABC):
    """One line of the table.

    `targets` maps a profile ("cpu", "h200") to the value to reach; a profile that is absent is not
    measured there.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    peer: ClassVar[str]
    targets: ClassVar[dict[str, float]]
    at_most: ClassVar[bool] = False
    """True where smaller is better."""

    def __init__(self, profile: str) -> None:
        self.profile = profile

    @property
    def setting(self) -> dict[str, Any]:
        """Sizes that the figure depends on, printed beside it."""
        return {}

    @abstractmethod
    def measure(self, rounds: int, *, until: float = math.inf) -> Result:
        """Check the gate, then measure; with fewer rounds where `time.monotonic()` passes
        `until`.
        """

    def failed(self, reason: str) -> Result:
        """A cell without a result."""
        return Result(
            name=self.name,
            title=self.title,
            peer=self.peer,
            profile=self.profile,
            value=math.nan,
            target=self.targets.get(self.profile),
            at_most=self.at_most,
            reached=None,
            setting={},
            gate=reason,
            status="failed",
        )

    def result(self, value: float, **rest: Any) -> Result:
        """The value judged against this profile's target."""
        target = self.targets.get(self.profile)
        reached = None if target is None else value <= target if self.at_most else value >= target
        return Result(
            name=self.name,
            title=self.title,
            peer=self.peer,
            profile=self.profile,
            value=value,
            target=target,
            at_most=self.at_most,
            reached=reached,
            setting=self.setting,
            **rest,
        )


class Ratio(Cell):
    """Speedup of medm over the peer on the same work."""

    @abstractmethod
    def gate(self) -> str:
        """Prove that both give the same numbers; returns what was compared. Raises `GateError`."""

    @abstractmethod
    def run_peer(self) -> float:
        """Do the work once; returns the number of units."""

    @abstractmethod
    def run_ours(self) -> float:
        """Do the same work with medm's implementation."""

    def measure(self, rounds: int, *, until: float = math.inf) -> Result:
        try:
            proof = self.gate()
        except GateError as error:
            return self.result(math.nan, gate=f"FAILED: {error}", status="gate failed")
        for number in range(WARM_UP):
            if number and time.monotonic() > until:
                break
            self.run_peer()
            self.run_ours()
        ratios, noise, raw = [], [], []
        for number in range(rounds):
            if number >= FEWEST and time.monotonic() > until:
                break
            a1, b1, b2, a2 = (
                rate(side) for side in (self.run_peer, self.run_ours, self.run_ours, self.run_peer)
            )
            ratios.append((b1 + b2) / (a1 + a2))
            noise.append(a2 / a1)
            raw.append({"peer": [a1, a2], "ours": [b1, b2]})
        low, high = bootstrap(ratios)
        quiet = NOISE[0] <= statistics.median(noise) <= NOISE[1]
        return self.result(
            statistics.median(ratios),
            low=low,
            high=high,
            noise=statistics.median(noise),
            gate=proof,
            raw=raw,
            status="measured" if quiet else "noisy",
        )


class Figure(Cell):
    """A value that is not a ratio of two speeds: a fraction, a limit, a count."""

    @abstractmethod
    def values(self, rounds: int) -> list[float]:
        """One value per round."""

    def gate(self) -> str:
        """Result of the gate."""
        return ""

    def measure(self, rounds: int, *, until: float = math.inf) -> Result:
        try:
            proof = self.gate()
        except GateError as error:
            return self.result(math.nan, gate=f"FAILED: {error}", status="gate failed")
        values = self.values(rounds if time.monotonic() < until else FEWEST)
        low, high = bootstrap(values)
        return self.result(
            statistics.median(values), low=low, high=high, gate=proof, raw=[{"values": values}]
        )


class GateError(AssertionError):
    """medm and the peer gave different numbers."""


@dataclass(slots=True)
class Result:
    """Result of one cell."""

    name: str
    title: str
    peer: str
    profile: str
    value: float
    target: float | None
    at_most: bool
    reached: bool | None
    setting: dict[str, Any]
    low: float = math.nan
    high: float = math.nan
    noise: float = math.nan
    gate: str = ""
    status: str = "measured"
    raw: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return asdict(self)


def rate(work: Callable[[], float]) -> float:
    """Units per second of one run."""
    synchronize()
    start = time.perf_counter()
    units = work()
    synchronize()
    return units / (time.perf_counter() - start)


def seconds(work: Callable[[], Any]) -> float:
    """Seconds of one run."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bootstrap(values: list[float], *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the median."""
    sample = np.random.default_rng(seed).choice(np.asarray(values), size=(draws, len(values)))
    low, high = np.quantile(np.median(sample, axis=1), [0.025, 0.975])
    return float(low), float(high)
