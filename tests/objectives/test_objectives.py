from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medm.objectives import OBJECTIVES
from medm.objectives.base import Objective
from medm.objectives.contrastive import Contrastive
from medm.objectives.language_modeling import LanguageModeling


class Output(dict[str, Any]):
    __getattr__ = dict.get


class Unigram(nn.Module):
    """Logits that do not depend on the input, so that losses can be worked out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.0, 1.0, 2.0]))

    def forward(self, labels: Tensor, num_items_in_batch: Any = None) -> Output:
        targets = labels[:, 1:][labels[:, 1:] != -100]
        total = -self.logits.log_softmax(0)[targets].sum()
        return Output(
            loss=total / (len(targets) if num_items_in_batch is None else num_items_in_batch),
            losses={"balance": self.logits.pow(2).mean()},
        )


class Fixed(nn.Module):
    """Returns the embeddings it was given."""

    def __init__(self, scale: float = 5.0, bias: float = -3.0) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor(scale)), nn.Parameter(torch.tensor(bias))

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        return {"image_embeds": first, "text_embeds": second, "logit_scale": self.scale, "logit_bias": self.bias}


LABELS = torch.tensor([[0, -100, 1, 2], [2, 0, -100, -100]])  # learned: 1, 2 and 0; the first column never is


def test_language_modeling_by_hand() -> None:
    objective, model = LanguageModeling(auxiliary={"balance": 0.5}), Unigram()
    assert objective.num_items({"labels": LABELS}) == 3
    normaliser = math.log(1 + math.e + math.e**2)
    language = ((normaliser - 1) + (normaliser - 2) + normaliser) / 3
    losses = objective(model, {"labels": LABELS})
    assert losses.parts["language"].item() == pytest.approx(language, rel=1e-6)
    assert losses.parts["balance"].item() == pytest.approx(0.5 * 5 / 3, rel=1e-6)
    assert losses.total.item() == pytest.approx(language + 0.5 * 5 / 3, rel=1e-6)


@pytest.mark.parametrize("cut", [(slice(0, 1), slice(1, 2))])
def test_micro_batches_add_up_to_the_batch(cut: tuple[slice, slice]) -> None:
    objective, model = LanguageModeling(), Unigram()
    objective(model, {"labels": LABELS}).total.backward()
    whole = model.logits.grad
    model.logits.grad = None
    for part in cut:
        objective(model, {"labels": LABELS[part]}, num_items_in_batch=3).total.backward()
    torch.testing.assert_close(model.logits.grad, whole)


def test_softmax_loss_equals_clip_in_transformers() -> None:
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss as reference

    torch.manual_seed(0)
    first, second = torch.randn(6, 4), torch.randn(6, 4)
    logits = 5.0 * nn.functional.normalize(second, dim=-1) @ nn.functional.normalize(first, dim=-1).T
    losses = Contrastive()(Fixed(), {"first": first, "second": second})
    torch.testing.assert_close(losses.total, reference(logits))


def test_sigmoid_loss_by_hand() -> None:
    first = second = torch.eye(2)
    # Partners score 5 - 3 = 2 and count positive, strangers score -3 and count negative; two of each, two items.
    expected = math.log1p(math.exp(-2)) + math.log1p(math.exp(-3))
    losses = Contrastive(loss="sigmoid")(Fixed(), {"first": first, "second": second})
    assert losses.total.item() == pytest.approx(expected, rel=1e-6)


def test_contrast_learns_the_partner_not_the_order() -> None:
    torch.manual_seed(0)
    first = torch.randn(8, 4)
    matched = Contrastive()(Fixed(), {"first": first, "second": first}).total
    shuffled = Contrastive()(Fixed(), {"first": first, "second": first.roll(1, 0)}).total
    moved = Contrastive()(Fixed(), {"first": first.roll(3, 0), "second": first.roll(3, 0)}).total
    assert matched < shuffled
    torch.testing.assert_close(matched, moved)


def test_contrast_is_weighted_by_its_share_of_the_step() -> None:
    pairs = {"first": torch.randn(2, 4), "second": torch.randn(2, 4)}
    whole = Contrastive()(Fixed(), pairs).total
    torch.testing.assert_close(Contrastive()(Fixed(), pairs, num_items_in_batch=8).total, whole / 4)


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_every_registered_objective_builds_from_its_options(name: str) -> None:
    entry = OBJECTIVES.entry(name)
    options = entry.options.model_validate({"name": name}).model_dump()
    options.pop("name")
    assert isinstance(OBJECTIVES.get(name)(**options), Objective)
    assert entry.summary
