"""Peak memory of a piece of work, above the memory allocated before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], Any]) -> int:
    """Largest sum of live tensor bytes allocated inside `work`.

    On CUDA the allocator counts. On the CPU the profiler's allocation events are added up in order,
    since the resident size of a process says little about what a step needed.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    live = peak = 0
    for event in sorted(_allocations(recorded), key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _allocations(recorded: profile) -> list[Any]:
    return [
        event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
