"""Copies of a run's tensors at one moment, to be written while training changes the originals."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from medm.errors import CheckpointError

T = TypeVar("T")

_MEMORY_FRACTION = 0.5
"""Fraction of the free memory that copies may take."""
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip


class Snapshot:
    """Copies in host memory that is reused for the next copy: new pages cost more than the copying.

    A later `copy` overwrites the tensors that an earlier one returned, for the same places.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def fits(self, size: int, *, processes: int = 1) -> bool:
        """Return whether the free memory of the machine suffices for the copies.

        Args:
            size: bytes that this rank copies.
            processes: ranks of this machine that copy at the same time.
        """
        held = sum(tensor.nbytes for tensor in self._memory.values())
        return size - held <= _MEMORY_FRACTION / processes * psutil.virtual_memory().available

    def copy(self, state: T) -> T:
        """Return a deep copy of nested dicts and lists; shared tensors stay shared."""
        copies: dict[tuple[object, ...], Tensor] = {}
        known: dict[int, object] = {}
        before, self._memory = self._memory, {}
        for place, tensor in _tensors(state):
            memory = _memory_of(tensor)
            if memory not in copies:
                copies[memory] = self._copy_tensor(tensor.detach(), place, before.pop(place, None))
            known[id(tensor)] = copies[memory]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copy.deepcopy(state, known)

    def _copy_tensor(self, tensor: Tensor, place: str, held: Tensor | None) -> Tensor:
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._memory[place] = held
        return held.copy_(tensor, non_blocking=True)


def tensor_bytes(state: object) -> int:
    """Return the bytes of all tensors in nested dicts and lists, each counted once."""
    return sum({_memory_of(tensor): tensor.nbytes for _, tensor in _tensors(state)}.values())


def _tensors(state: object, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in nested dicts and lists, with its path."""
    if isinstance(state, Tensor):
        yield place, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _tensors(value, f"{place}/{key}")
    elif isinstance(state, (list, tuple)):
        for number, value in enumerate(state):
            yield from _tensors(value, f"{place}/{number}")


def _memory_of(tensor: Tensor) -> tuple[object, ...]:
    """Return a key that is equal for tensors of the same memory, shape and type."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def write_files(files: Mapping[Path, Any]) -> None:
    """Write the state of each file: tensors by name into `.safetensors`, others by `torch.save`."""
    for file, state in files.items():
        if file.suffix == ".safetensors":
            write_safetensors(state, file)
        else:
            torch.save(state, file)


def check_types(tensors: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` for a tensor of a type that a safetensors file cannot hold."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPES:
            raise CheckpointError(
                f"{name}: expected a type that safetensors holds "
                f"({', '.join(sorted(_TYPES.values()))}), found {tensor.dtype}; convert it, or "
                "register the buffer with persistent=False if it can be computed again"
            )


def write_safetensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file without holding the GIL.

    The writer of safetensors holds it until the disk is done.

    Args:
        tensors: contiguous.
        file: path; overwritten.

    Raises:
        CheckpointError: the format has no type for a tensor; nothing was written.

    Format: https://github.com/huggingface/safetensors#format
    """
    check_types(tensors)
    # Wide types first, so that each tensor begins at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little"))
        opened.write(text)
        for name in names:
            opened.write(tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
