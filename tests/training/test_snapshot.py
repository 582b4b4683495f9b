"""Copies that training does not reach, and files that safetensors reads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from medm.errors import CheckpointError
from medm.training.snapshot import _TYPES, Snapshot, tensor_bytes, write_safetensors


def test_a_copy_stays_what_it_was_and_its_memory_is_used_again() -> None:
    weight, step = torch.arange(6.0).reshape(2, 3), torch.tensor(3)
    state = {
        "model": {"weight": weight},
        "optimizer": {"state": {0: {"step": step}}, "groups": [{"lr": 0.1}]},
    }
    snapshot = Snapshot()
    first = snapshot.copy(state)
    weight.zero_()
    assert first["model"]["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert first["optimizer"] == {"state": {0: {"step": step}}, "groups": [{"lr": 0.1}]}
    second = snapshot.copy(state)
    assert second["model"]["weight"].data_ptr() == first["model"]["weight"].data_ptr()
    assert not second["model"]["weight"].any()
    snapshot.copy({"other": torch.zeros(2)})
    assert [tensor.numel() for tensor in snapshot._memory.values()] == [2], (
        "what is not copied any more is given back"
    )


def test_memory_that_is_held_already_is_not_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    available = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available._replace(available=1000))
    snapshot = Snapshot()
    state = {"a": torch.zeros(100), "b": [torch.zeros(25, dtype=torch.bfloat16)]}
    assert tensor_bytes(state) == 450
    assert snapshot.fits(500)
    assert not snapshot.fits(501)
    snapshot.copy(state)
    assert snapshot.fits(950)
    assert snapshot.fits(450 + 125, processes=4)
    assert not snapshot.fits(450 + 126, processes=4)


def test_what_is_shared_is_copied_once_and_what_is_no_tensor_too() -> None:
    """Tied weights, and the loss scaler of DeepSpeed, whose scale training changes."""
    flat = torch.arange(6.0)
    scaler = SimpleNamespace(scale=2.0)
    state = {
        "a": flat[:4],
        "b": flat[:4],
        "c": flat[2:],
        "sizes": (torch.Size([2]), [1]),
        "scaler": scaler,
    }
    assert tensor_bytes(state) == 32
    copied = Snapshot().copy(state)
    flat.zero_()
    scaler.scale = 1.0
    state["sizes"][1].append(2)
    assert copied["a"] is copied["b"]
    assert (copied["a"].tolist(), copied["c"].tolist()) == ([0, 1, 2, 3], [2, 3, 4, 5])
    assert copied["scaler"].scale == 2.0
    assert copied["sizes"] == (torch.Size([2]), [1])


def test_the_file_is_what_safetensors_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "b.weight": torch.randn(3, 5), "a": torch.randn(7, dtype=torch.float64), "c": torch.randn(2, 2).bfloat16(),
        "scalar": torch.tensor(4), "none": torch.zeros(0, 3), "mask": torch.tensor([True, False, True]),
        "half": torch.randn(5).half(), "byte": torch.arange(3, dtype=torch.uint8),
    }  # fmt: skip
    file = tmp_path / "model.safetensors"
    write_safetensors(tensors, file)
    read = load_file(file)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", _TYPES, ids=str)
def test_every_type_is_read_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
    write_safetensors({"a": tensor, "one": tensor[1]}, tmp_path / "a.safetensors")
    read = load_file(tmp_path / "a.safetensors")
    assert read["a"].dtype == dtype
    assert torch.equal(read["a"].view(torch.uint8), tensor.view(torch.uint8))
    assert read["one"].shape == ()


def test_a_type_that_the_format_does_not_know_leaves_no_file(tmp_path: Path) -> None:
    tensors = {"fine": torch.zeros(2), "phase": torch.zeros(2, dtype=torch.complex128)}
    with pytest.raises(CheckpointError, match=r"^phase: .*F32.*found torch\.complex128"):
        write_safetensors(tensors, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
