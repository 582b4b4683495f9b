"""Two processes: efficiency relative to twice the speed of one, when every step waits for the
slower process.
"""

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
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from benchmarks.cells.training import CAPACITY, _Workload
from benchmarks.harness import Figure, seconds
from benchmarks.workloads import PAD
from medm.children import safe_path
from medm.data.collator import Collator
from medm.data.packing import PackedBatches
from medm.data.sampling import Shuffle

WORLD = 2


class TwoRanks(Figure):
    """P16: efficiency of two processes with rows of equal tokens, over that of padded batches in
    random order.

    The efficiency of either is the tokens per second of two processes over twice those of one, in
    micro-batches of the same size and whole steps; two processes exchange their gradients in each
    step (DDP). The model is the same on both sides. Each round draws a new order.
    """

    name, title, peer = "P16", "two-rank efficiency", "padded batches, DistributedSampler"
    targets: ClassVar = {"cpu": 1.15}
    samples: ClassVar[int] = 128
    batch: ClassVar[int] = 4

    @property
    def setting(self) -> dict[str, Any]:
        return {
            "workload": "tiny",
            "samples": self.samples,
            "batch": self.batch,
            "threads a process": 1,
        }

    def gate(self) -> str:
        return _Workload("cpu", "tiny", self.samples).check_same()

    def values(self, rounds: int) -> list[float]:
        context = get_context("spawn")
        with tempfile.TemporaryDirectory() as folder:
            found, meeting = context.SimpleQueue(), Path(folder) / "meeting"
            others = [
                context.Process(
                    target=_rank, args=(rank, str(meeting), rounds, self.samples, self.batch, found)
                )
                for rank in range(WORLD)
            ]
            with safe_path():
                for process in others:
                    process.start()
            for process in others:
                process.join()
            if any(process.exitcode for process in others):
                raise RuntimeError(
                    f"processes ended with {[process.exitcode for process in others]}"
                )
            values: list[float] = found.get()
        return values


def _rank(rank: int, meeting: str, rounds: int, samples: int, batch: int, found: Any) -> None:
    """One process; the first one puts a value for each round."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD
    )
    load = _Workload("cpu", "tiny", samples)
    values = []
    for number in range(rounds + 1):  # the first warms up
        efficiency = {}
        for side in ("peer", "ours") if number % 2 else ("ours", "peer"):
            alone = _speed(load, side, number, batch, rank=0, world=1) if rank == 0 else math.nan
            distributed.barrier()
            both = torch.tensor(_speed(load, side, number, batch, rank=rank, world=WORLD))
            distributed.all_reduce(both)
            efficiency[side] = both.item() / (WORLD * alone)
        values.append(efficiency["ours"] / efficiency["peer"])
    if rank == 0:
        found.put(values[1:])
    distributed.destroy_process_group()


def _speed(load: _Workload, side: str, number: int, batch: int, *, rank: int, world: int) -> float:
    """Useful tokens per second of this process."""
    model: nn.Module = load.ours.train()
    if world > 1:
        # Gradients are exchanged while the rest of them is computed, as in training.
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    chosen = list(_chosen(load, side, number, batch, rank=rank, world=world))
    if world == 1:
        chosen = chosen[: len(chosen) // WORLD]  # as many steps as each of two processes makes
    collate = Collator(PAD) if side == "peer" else load.collator
    prepared = [load.to_device(collate([load.examples[index] for index in one])) for one in chosen]

    def run() -> None:
        for one in prepared:
            model(**one).loss.backward()
            model.zero_grad()

    return sum(int(load.lengths[one].sum()) for one in chosen) / seconds(run)


def _chosen(
    load: _Workload, side: str, number: int, batch: int, *, rank: int, world: int
) -> Iterator[list[int]]:
    """The samples of each micro-batch of an epoch; an incomplete last step is left out."""
    count = len(load.examples)
    if side == "peer":
        order = list(DistributedSampler(range(count), world, rank, seed=number, drop_last=True))
        yield from (
            order[start : start + batch] for start in range(0, len(order) - batch + 1, batch)
        )
        return
    capacity = CAPACITY["cpu"]
    # As many rows as hold the batch's samples, so that both sides make about as many steps.
    rows = max(1, round(batch * load.useful / count / capacity))
    yield from PackedBatches(
        Shuffle(count, seed=number),
        lengths=load.lengths,
        capacity=capacity,
        batch_size=rows,
        rank=rank,
        world=world,
        seed=number,
        drop_last=True,
    )
