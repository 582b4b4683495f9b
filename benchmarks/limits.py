"""Measured peak rates of this machine, in the same run as the cells that are compared with them."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.harness import seconds


@dataclass(frozen=True, slots=True)
class Limits:
    """Measured ceilings of one device."""

    device: str
    threads: int
    matmul: float
    """FLOP/s of the best square matrix product in the training precision."""
    bandwidth: float
    """Bytes/s of a large read (a matrix-vector product), which is what decoding one token does to
    the weights."""
    copy: float
    """Bytes/s of a large copy in memory, reads and writes counted."""


def measure_limits(*, device: str, dtype: torch.dtype) -> Limits:
    """Best of several runs each; a ceiling is a maximum, not a mean."""
    matmul = max(
        _matmul(size, device, dtype)
        for size in ((1024, 2048) if device == "cpu" else (8192, 16384))
    )
    size = 2**26 if device == "cpu" else 2**30
    source = torch.ones(size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(7))
    matrix = source[: (size // 4096) * 4096].view(-1, 4096)
    vector = torch.ones(4096, device=device)
    bandwidth = matrix.nbytes / min(seconds(lambda: matrix @ vector) for _ in range(7))
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else platform.processor() or platform.machine()
    )
    return Limits(name, torch.get_num_threads(), matmul, bandwidth, copy)


def _matmul(size: int, device: str, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, b)) for _ in range(7))


def versions() -> dict[str, str]:
    """Versions and settings that a result depends on."""
    names = ("torch", "transformers", "peft", "accelerate", "numpy", "monai", "SimpleITK")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a cell that needs it says so
            found[name] = "-"
    return found
