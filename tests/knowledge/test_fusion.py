"""Fusion of tokens with knowledge: padding is masked unless the published flaw is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from medm.knowledge.base import KnowledgeTokens
from medm.knowledge.fusion import CrossAttentionFusion


def fusion(**options: object) -> CrossAttentionFusion:
    torch.manual_seed(0)
    keywords = {"heads": 2, "feed_forward": 16, "dropout": 0.0, **options}
    return CrossAttentionFusion(8, 6, **keywords).eval()  # type: ignore[arg-type]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    return torch.randn(2, 3, 8), torch.randn(2, 4, 6), mask


def test_padding_does_not_change_the_tokens() -> None:
    tokens, knowledge, mask = inputs()
    other = knowledge.masked_fill(~mask.unsqueeze(-1), 9.0)
    corrected, published = fusion(), fusion(mask_padding=False)
    assert torch.equal(corrected(tokens, knowledge, mask), corrected(tokens, other, mask))
    assert not torch.allclose(published(tokens, knowledge, mask), published(tokens, other, mask))
    full = torch.ones_like(mask)
    torch.testing.assert_close(
        published(tokens, knowledge, mask), corrected(tokens, knowledge, full)
    )


def test_it_equals_a_straight_computation() -> None:
    tokens, knowledge, mask = inputs()
    one = fusion(layers=1, width=4)
    layer = one.layers[0]
    norm = torch.nn.functional.layer_norm
    q = layer.attention.query(norm(tokens, (8,))).view(2, 3, 2, 2).transpose(1, 2)
    k = layer.attention.key(knowledge).view(2, 4, 2, 2).transpose(1, 2)
    v = layer.attention.value(knowledge).view(2, 4, 2, 2).transpose(1, 2)
    scores = (q @ k.transpose(-1, -2) / 2**0.5).masked_fill(~mask[:, None, None], -torch.inf)
    x = tokens + layer.attention.output((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 3, 4))
    x = x + layer.outer(torch.nn.functional.gelu(layer.inner(norm(x, (8,)))))
    torch.testing.assert_close(one(tokens, knowledge, mask), x, atol=1e-5, rtol=1e-4)


def test_a_sample_without_knowledge_gets_no_attention_term_and_finite_gradients() -> None:
    tokens, knowledge, mask = inputs()
    mask[1] = False
    one = fusion(layers=1)
    tokens.requires_grad_()
    fused = one(tokens, knowledge, mask)
    layer = one.layers[0]
    alone = tokens[1] + layer.outer(
        torch.nn.functional.gelu(layer.inner(layer.feed_forward_norm(tokens[1])))
    )
    torch.testing.assert_close(fused[1], alone)
    fused.sum().backward()
    assert tokens.grad is not None and tokens.grad.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in one.parameters())


def test_shared_knowledge_serves_every_sample() -> None:
    tokens, knowledge, _ = inputs()
    shared = KnowledgeTokens(knowledge[:1], torch.ones(1, 4, dtype=torch.bool))
    one = fusion()
    together = one.fuse(tokens, shared)
    alone = torch.cat([one.fuse(tokens[row : row + 1], shared) for row in range(2)])
    torch.testing.assert_close(together, alone)


def test_an_identity_start_leaves_the_tokens_and_learns() -> None:
    tokens, knowledge, mask = inputs()
    one = fusion(start="identity")
    assert torch.equal(one(tokens, knowledge, mask), tokens)
    one(tokens, knowledge, mask).square().sum().backward()
    weight = one.layers[0].attention.output.weight
    assert weight.grad is not None and weight.grad.abs().sum() > 0
