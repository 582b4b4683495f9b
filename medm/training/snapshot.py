"""The tensors of a run at one moment, copied aside, so that they can be written while training changes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

_SHARE = 0.5
"""Part of the free memory that copies may take."""
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class Snapshot:
    """Copies in host memory, which is kept from one to the next: new pages cost more than the copying.

    What an earlier `copy` returned is overwritten by a later one.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def fits(self, size: int) -> bool:
        """Whether copies of so many bytes leave the machine enough memory."""
        held = sum(tensor.nbytes for tensor in self._memory.values())
        return size - held <= _SHARE * psutil.virtual_memory().available

    def copy(self, state: Any, place: str = "") -> Any:
        """Nested dicts and lists with every tensor replaced by a copy; other values stay as they are."""
        copied = self._copy(state, place)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _copy(self, state: Any, place: str) -> Any:
        if isinstance(state, Tensor):
            return self._copy_tensor(state.detach(), place)
        if isinstance(state, Mapping):
            return {key: self._copy(value, f"{place}/{key}") for key, value in state.items()}
        if isinstance(state, (list, tuple)):
            return type(state)(self._copy(value, f"{place}/{number}") for number, value in enumerate(state))
        return state

    def _copy_tensor(self, tensor: Tensor, place: str) -> Tensor:
        held = self._memory.get(place)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._memory[place] = held
        return held.copy_(tensor, non_blocking=True)


def tensor_bytes(state: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(state, Tensor):
        return state.nbytes
    values = state.values() if isinstance(state, Mapping) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(tensor_bytes, values))


def write_safetensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file without holding the interpreter, as safetensors' own writer does until the disk is done.

    Args:
        tensors: contiguous, in host memory.
        file: where to; overwritten.

    Format: https://github.com/huggingface/safetensors#format
    """
    # Wide types first, so that each tensor begins at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little"))
        opened.write(text)
        for name in names:
            opened.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
