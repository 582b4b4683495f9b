"""The HTTP server under load: pace, waiting times, lost requests and memory."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks.harness import FEWEST, Cell, Figure, GateError, Ratio, Result
from benchmarks.server import Outcome, Running, ask_all, mixed_requests, save_model, serving
from benchmarks.workloads import WORKLOADS, Sizes
from medm.types import JsonObject

SMALL = Sizes(
    "server",
    WORKLOADS["tiny"].vision
    | {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 96,
       "image_size": 56},
    WORKLOADS["tiny"].text
    | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 512},
)  # fmt: skip
"""A model whose replies cost little, so that the server itself is measured."""


class _Side:
    """Requests to one server."""

    def __init__(self, running: Running, bodies: list[JsonObject]) -> None:
        self.running, self.bodies = running, bodies
        self.outcomes: list[Outcome] = []

    def run(self) -> float:
        """Send all requests at once; returns their number."""
        self.outcomes = ask_all(self.running.port, self.bodies, at_once=len(self.bodies))
        if any(not outcome.complete for outcome in self.outcomes):
            raise GateError("a reply is missing")
        return len(self.outcomes)


class _TwoServers(Cell):
    """The same requests to a server with slots for many replies, and to one with a single slot."""

    peer: ClassVar[str] = "the same server with one slot"
    workloads: ClassVar[dict[str, str]] = {"cpu": "tiny", "h200": "0.5B"}
    requests: ClassVar[int] = 64
    tokens: ClassVar[int] = 40
    slots: ClassVar[int] = 16

    theirs: _Side
    ours: _Side

    @property
    def setting(self) -> dict[str, Any]:
        return {
            "workload": self.workloads[self.profile],
            "requests at once": self.requests,
            "slots": self.slots,
            "tokens of a reply": f"{self.tokens // 2} to {self.tokens}",
        }

    def measure(self, rounds: int, *, until: float = math.inf) -> Result:
        sizes = WORKLOADS[self.workloads[self.profile]]
        bodies = mixed_requests(self.requests, side=sizes.image_size, tokens=self.tokens)
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            model = save_model(folder, sizes)
            self.theirs, self.ours = (
                _Side(stack.enter_context(serving(model, slots=slots, queue=self.requests)), bodies)
                for slots in (1, self.slots)
            )
            return super().measure(rounds, until=until)  # type: ignore[safe-super]

    def gate(self) -> str:
        self.theirs.run()
        self.ours.run()
        pairs = zip(self.theirs.outcomes, self.ours.outcomes, strict=True)
        if any(one.reply != other.reply for one, other in pairs):
            raise GateError("replies differ")
        return f"{self.requests} replies are equal"


class Pace(_TwoServers, Ratio):
    """S1: requests/s of parallel clients."""

    name, title = "S1", "served requests/s"
    targets: ClassVar = {"cpu": 2.0, "h200": 4.0}

    def run_peer(self) -> float:
        return self.theirs.run()

    def run_ours(self) -> float:
        return self.ours.run()


class Waiting(_TwoServers, Figure):
    """S1-p95: the longest wait of 95 of 100 clients that ask at once, over the peer's."""

    name, title, at_most = "S1-p95", "95th percentile of seconds to a reply, ratio", True
    targets: ClassVar = {"cpu": 0.6, "h200": 0.3}

    def values(self, rounds: int) -> list[float]:
        ratios = []
        for _ in range(rounds):
            self.theirs.run()
            self.ours.run()
            ratios.append(_p95(self.ours.outcomes) / _p95(self.theirs.outcomes))
        return ratios


class Lost(Figure):
    """S2: requests without a reply among many at once, of whose clients some leave."""

    name, title, peer, at_most = "S2", "requests lost of 1,000 at once, 5 % leave", "-", True
    targets: ClassVar = {"cpu": 0, "h200": 0}
    requests: ClassVar[int] = 1000
    tokens: ClassVar[int] = 24

    @property
    def setting(self) -> dict[str, Any]:
        return {"requests": self.requests, "slots": 16, "queue": 64, "model": SMALL.name}

    def values(self, rounds: int) -> list[float]:
        bodies = mixed_requests(self.requests, side=SMALL.image_size, tokens=self.tokens)
        with _server() as running:
            return [self._lost(running, bodies, seed) for seed in range(min(rounds, FEWEST))]

    def _lost(self, running: Running, bodies: list[JsonObject], seed: int) -> float:
        outcomes = ask_all(running.port, bodies, at_once=len(bodies), leave=0.05, seed=seed)
        lost = [outcome for outcome in outcomes if not (outcome.complete or outcome.left)]
        for outcome in lost:
            print(f"lost: status {outcome.status} after {outcome.seconds:.1f} s: {outcome.error}")
        if sum(outcome.left for outcome in outcomes) != len(bodies) // 20:
            raise GateError("not all that should have left did")
        if not running.idle():
            raise GateError("a slot of a client that left is not free")
        log = running.log.read_text()
        if "Traceback" in log or "error: " in log:
            raise GateError("the log of the server holds an error")
        return float(len(lost))


class Memory(Figure):
    """S3: growth of the server's memory over many requests, once the first ones are answered."""

    name, title, peer, at_most = "S3", "MiB grown over 10,000 requests", "-", True
    targets: ClassVar = {"cpu": 32, "h200": 64}
    requests: ClassVar[int] = 10_000
    warm_up: ClassVar[int] = 1000
    tokens: ClassVar[int] = 4

    @property
    def setting(self) -> dict[str, Any]:
        return {"requests": self.requests, "after": self.warm_up, "model": SMALL.name}

    def values(self, rounds: int) -> list[float]:
        with _server() as running:
            self._ask(running, self.warm_up)
            before = running.resident_mib
            self._ask(running, self.requests)
            return [running.resident_mib - before]

    def _ask(self, running: Running, count: int) -> None:
        bodies = mixed_requests(count, side=SMALL.image_size, tokens=self.tokens, seed=count)
        if any(not outcome.complete for outcome in ask_all(running.port, bodies, at_once=32)):
            raise GateError("a reply is missing")
        if not running.idle():
            raise GateError("a request is open at the end")


@contextmanager
def _server() -> Iterator[Running]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield stack.enter_context(serving(save_model(folder, SMALL), slots=16, queue=64))


def _p95(outcomes: Sequence[Outcome]) -> float:
    return float(np.quantile([outcome.seconds for outcome in outcomes], 0.95))
