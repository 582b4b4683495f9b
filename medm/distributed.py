"""Rank, world size and collective operations.

With one rank, each function is the plain action.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from medm.errors import CheckpointError, DataError, DeviceError, MedmError, RecipeError

T = TypeVar("T")

_KINDS = (MedmError, RecipeError, DataError, CheckpointError, DeviceError)
"""Errors that are constructed from their text alone, and so can be raised again on another rank."""


def world_size() -> int:
    """Return the number of ranks of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def set_timeout(seconds: float) -> None:
    """Set the time-out of collective operations; transformers leaves it out where `use_cpu` is set.

    All ranks call it, before the first collective operation. Without a process group it does
    nothing.
    """
    if world_size() > 1:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run an action on rank 0; return its result on all ranks.

    A `MedmError` or `OSError` of the action is raised on all ranks.
    """
    if world_size() == 1:
        return action()
    message: list[Any] = [None, None]
    caught: Exception | None = None
    if rank() == 0:
        try:
            message[0] = action()
        except (MedmError, OSError) as error:
            caught, message[1] = error, (type(error), str(error))
    dist.broadcast_object_list(message, src=0)
    if caught is not None:
        raise caught
    if message[1] is not None:
        kind, text = message[1]
        raise (kind if issubclass(kind, OSError) or kind in _KINDS else MedmError)(text)
    return message[0]


def failures(action: Callable[[], None]) -> list[str]:
    """Run an action on every rank; return the errors of all ranks, each with its rank."""
    problem: str | None = None
    try:
        action()
    except (MedmError, OSError, RuntimeError, SafetensorError) as error:
        problem = f"process {rank()}: {error}"
    return [text for text in all_gather_objects(problem) if text]


def all_gather_objects(value: T) -> list[T]:
    """Return the value of every rank, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(condition: bool, device: torch.device | str = "cpu") -> bool:
    """Return whether a condition holds on any rank.

    `device` is the device of the process group's communication.
    """
    if world_size() == 1:
        return condition
    flag = torch.tensor(float(condition), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


_left_group = False


def leave_group() -> None:
    """Leave the process group after the last collective operation of a command."""
    global _left_group
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        _left_group = True


def end_rank(status: int) -> None:
    """Exit a rank that is done, without the shutdown of the interpreter. Other processes return.

    Threads of gloo and DeepSpeed that still run in a shutdown sometimes abort the process
    ("terminate called without an active exception"), so that a run that wrote its model would look
    like a failure.
    """
    if _left_group:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def row_counts(rows: Tensor) -> list[int]:
    """Return the length of a tensor on every rank, in rank order.

    The last batch of an epoch may be uneven.
    """
    if world_size() == 1:
        return [len(rows)]
    counts = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor(len(rows), device=rows.device))
    return [int(count) for count in counts]


def all_gather(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the rows of every rank in rank order, with gradient.

    Args:
        rows: (N, D); N may differ between ranks.
        counts: `row_counts(rows)`.

    Returns:
        (sum of counts, D). In the backward pass each rank gets back the sum of all gradients of its
        own rows.
    """
    return _AllGather.apply(rows, list(counts)) if world_size() > 1 else rows


class _AllGatherContext(FunctionCtx):
    counts: list[int]
    """Rows of every rank."""


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _AllGatherContext, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        # Gathering takes tensors of one shape; the padding is cut off again.
        padded = F.pad(rows, (0, 0, 0, max(counts) - len(rows)))  # (most rows, D)
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    @staticmethod
    def backward(ctx: _AllGatherContext, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total.split(ctx.counts)[rank()], None
