"""How several processes of one run agree. With one process everything here just takes the action."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import distributed as dist

from medm.errors import CheckpointError, DataError, DeviceError, MedmError, RecipeError

T = TypeVar("T")

_KINDS = (MedmError, RecipeError, DataError, CheckpointError, DeviceError)
"""Errors that are made from their text alone, and so can be raised again on another process."""


def world_size() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def on_first(action: Callable[[], T]) -> T:
    """The result of an action that the first process alone takes; an error that the user can fix is raised in all."""
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
    """Take an action everywhere; what went wrong on any process, with its number."""
    problem: str | None = None
    try:
        action()
    except (MedmError, OSError, RuntimeError, SafetensorError) as error:
        problem = f"process {rank()}: {error}"
    return [text for text in gathered(problem) if text]


def gathered(value: T) -> list[T]:
    """The value of every process, in their order, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def anywhere(condition: bool, device: torch.device | str = "cpu") -> bool:
    """Whether it holds on any process. `device`: where the process group communicates."""
    if world_size() == 1:
        return condition
    flag = torch.tensor(float(condition), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def leave_group() -> None:
    """Leave the process group after the last collective operation of a command.

    Its threads may otherwise still run when the interpreter ends, which aborts the process now and then.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
