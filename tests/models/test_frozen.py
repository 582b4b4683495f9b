"""A frozen encoder keeps nothing for a backward pass, and what is trained learns as it would beside
a trained one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.models.test_lvlm import build, collate, example, picture


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llm("qwen2.5", tmp_path_factory.mktemp("llm"))


def test_a_frozen_encoder_keeps_no_graph_and_the_rest_learns_the_same(llm: Path) -> None:
    model, processor = build(llm, family="qwen2.5")
    model.train()
    encoder = model.parts()["image.encoder"]
    batch = collate(
        processor, example(processor), example(processor, "A longer question?", images=2)
    )
    results = []
    for frozen in (False, True):
        encoder.requires_grad_(not frozen)
        tokens = model.branch("image").encode(torch.from_numpy(picture())[None]).tokens
        assert tokens.requires_grad is not frozen
        model.zero_grad()
        kept: list[int] = []

        def keep(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**batch).loss
        loss.backward()
        others = {
            n: p.grad.clone()
            for n, p in model.named_parameters()
            if p.grad is not None and "encoder" not in n
        }
        results.append((loss.item(), others, sum(kept)))
    (with_graph, gradients, much), (without, same, little) = results
    assert without == with_graph
    assert little < much
    assert gradients.keys() == same.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same[name]), name
    assert all(p.grad is None for p in encoder.parameters())
