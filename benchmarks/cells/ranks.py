"""Two processes: how much of twice the speed of one is left when each step ends for both with the slower one."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import distributed, nn
from torch.multiprocessing import get_context
from torch.utils.data import DistributedSampler

from benchmarks.cells.training import CAPACITY, _Workload
from benchmarks.harness import Figure, seconds
from benchmarks.workloads import PAD
from medm.data.collator import Collator
from medm.data.packing import PackedBatches
from medm.data.sampling import Shuffle
from medm.types import Batch

WORLD = 2


class TwoRanks(Figure):
    """P16: efficiency of two processes with rows of equal tokens, over that of padded batches dealt at random.

    The efficiency of either is the time of one process for an epoch over twice the time of two, in micro-batches of the
    same size; two processes sum their gradients in each step, and go on together. The model and its attention are the
    same on both sides. Each round draws another order.
    """

    name, title, peer = "P16", "two-rank efficiency", "padded batches, DistributedSampler"
    targets: ClassVar = {"cpu": 1.15}
    samples: ClassVar[int] = 64
    batch: ClassVar[int] = 8

    @property
    def setting(self) -> dict[str, Any]:
        return {"workload": "tiny", "samples": self.samples, "batch": self.batch, "threads a process": 1}

    def gate(self) -> str:
        return _Workload("cpu", "tiny", self.samples).check_same()

    def values(self, rounds: int) -> list[float]:
        context = get_context("spawn")
        with tempfile.TemporaryDirectory() as folder:
            found, meeting = context.SimpleQueue(), Path(folder) / "meeting"
            others = [
                context.Process(target=_rank, args=(rank, str(meeting), rounds, self.samples, self.batch, found))
                for rank in range(WORLD)
            ]
            for process in others:
                process.start()
            for process in others:
                process.join()
            if any(process.exitcode for process in others):
                raise RuntimeError(f"processes ended with {[process.exitcode for process in others]}")
            values: list[float] = found.get()
        return values


def _rank(rank: int, meeting: str, rounds: int, samples: int, batch: int, found: Any) -> None:
    """One process; the first one puts a value for each round."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    load = _Workload("cpu", "tiny", samples)
    values = []
    for number in range(rounds + 1):  # the first warms up
        efficiency = {}
        for side in ("peer", "ours") if number % 2 else ("ours", "peer"):
            alone = _epoch(load, side, number, batch, rank=0, world=1) if rank == 0 else math.nan
            distributed.barrier()
            both = _epoch(load, side, number, batch, rank=rank, world=WORLD)
            distributed.barrier()
            efficiency[side] = alone / (WORLD * both)
        values.append(efficiency["ours"] / efficiency["peer"])
    if rank == 0:
        found.put(values[1:])
    distributed.destroy_process_group()


def _epoch(load: _Workload, side: str, number: int, batch: int, *, rank: int, world: int) -> float:
    """Seconds for every sample once."""
    model = load.ours.train()
    prepared = [load.to_device(one) for one in _batches(load, side, number, batch, rank=rank, world=world)]

    def run() -> None:
        for one in prepared:
            model(**one).loss.backward()
            if world > 1:
                _sum_gradients(model)
            model.zero_grad(set_to_none=True)

    return seconds(run)


def _batches(load: _Workload, side: str, number: int, batch: int, *, rank: int, world: int) -> Iterator[Batch]:
    count = len(load.examples)
    if side == "peer":
        order = list(DistributedSampler(range(count), world, rank, seed=number))
        for start in range(0, len(order), batch):
            yield Collator(PAD)([load.examples[index] for index in order[start : start + batch]])
        return
    capacity = CAPACITY["cpu"]
    # As many rows as hold the batch's samples, so that both sides make about as many steps.
    rows = max(1, round(batch * load.useful / count / capacity))
    packed = PackedBatches(
        Shuffle(count, seed=number), lengths=load.lengths, capacity=capacity, batch_size=rows, rank=rank, world=world,
        seed=number,
    )  # fmt: skip
    for chosen in packed:
        yield load.collator([load.examples[index] for index in chosen])


def _sum_gradients(model: nn.Module) -> None:
    """In one message; weights that a batch did not touch count as zero."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
    distributed.all_reduce(flat)
