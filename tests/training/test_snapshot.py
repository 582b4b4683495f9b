"""Copies that training does not reach, and files that safetensors reads."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from medm.training.snapshot import Snapshot, tensor_bytes, write_safetensors


def test_a_copy_stays_what_it_was_and_its_memory_is_used_again() -> None:
    weight, step = torch.arange(6.0).reshape(2, 3), torch.tensor(3)
    state = {"model": {"weight": weight}, "optimizer": {"state": {0: {"step": step}}, "groups": [{"lr": 0.1}]}}
    snapshot = Snapshot()
    first = snapshot.copy(state)
    weight.zero_()
    assert first["model"]["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert first["optimizer"] == {"state": {0: {"step": step}}, "groups": [{"lr": 0.1}]}
    second = snapshot.copy(state)
    assert second["model"]["weight"].data_ptr() == first["model"]["weight"].data_ptr()
    assert not second["model"]["weight"].any()


def test_memory_that_is_held_already_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    available = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available._replace(available=1000))
    snapshot = Snapshot()
    state = {"a": torch.zeros(100), "b": [torch.zeros(25, dtype=torch.bfloat16)]}
    assert tensor_bytes(state) == 450
    assert snapshot.fits(500)
    assert not snapshot.fits(501)
    snapshot.copy(state)
    assert snapshot.fits(950)


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
