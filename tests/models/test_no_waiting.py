"""A step of training asks the device for no number: on a GPU each would wait for everything before
it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from medm.data.collator import Collator
from medm.data.packing import PackingCollator
from medm.models.lvlm import modeling, scatter
from medm.objectives.language_modeling import LanguageModeling
from medm.objectives.terms import Terms
from tests import tiny
from tests.models.test_lvlm import build, example

WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "_unique2",
    "unique_dim",
    "item",
}
"""Operators whose result, or its size, Python has to know; indexing with a mask becomes one of
them."""


class Waits(TorchDispatchMode):
    """Counts such operators, of the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or masked:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llm("qwen2.5", tmp_path_factory.mktemp("llm"))


def test_the_counter_counts() -> None:
    with Waits() as waits:
        numbers = torch.arange(3.0, requires_grad=True)
        mask = torch.tensor([True, False, True])
        numbers[mask].sum().backward()
        torch.zeros(3).masked_scatter(mask, numbers).sum().item()
    assert set(waits.found) >= {"index", "_local_scalar_dense"}


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_forward_and_backward_wait_for_nothing(
    kind: str, llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = build(llm, family="qwen2.5")
    model.train()
    data = [
        example(processor),
        example(processor, "A longer question?", images=2),
        example(processor, images=0),
    ]
    collators = {
        "padded": Collator(processor.pad_id, with_mask=False, with_label_positions=True),
        "packed": PackingCollator(
            processor.pad_id, 128, padding_free=True, with_label_positions=True
        ),
    }
    if kind == "packed":
        assert model.enable_padding_free()
    batch = collators[kind](data)
    for module in (modeling, scatter):
        monkeypatch.setattr(
            module, "check", lambda condition, message: None
        )  # asserted on the device itself there
    with Waits() as waits:
        losses = Terms.of(LanguageModeling())(model, batch, torch.tensor([5]))
        losses.total.backward()
    # transformers looks once whether positions begin again within a row, where there is no mask.
    assert sum(waits.found.values()) <= (kind == "padded"), waits.found
