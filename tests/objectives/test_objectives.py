from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medm.errors import RecipeError
from medm.objectives import OBJECTIVES, ContrastiveOptions
from medm.objectives.base import Objective, Output
from medm.objectives.contrastive import Contrastive
from medm.objectives.language_modeling import LanguageModeling
from medm.objectives.terms import Losses, Terms
from medm.types import Batch


class Unigram(nn.Module):
    """Logits that do not depend on the input, so that losses can be worked out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.0, 1.0, 2.0]))

    def forward(self, labels: Tensor) -> Output:
        targets = labels[:, 1:][labels[:, 1:] != -100]
        return {
            "loss_sum": -self.logits.log_softmax(0)[targets].sum(),
            "losses": {"balance": self.logits.pow(2).mean()},
        }


class Fixed(nn.Module):
    """Returns the embeddings it was given."""

    def __init__(self, scale: float = 5.0, bias: float = -3.0) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor(scale)), nn.Parameter(torch.tensor(bias))

    def forward(self, first: Tensor, second: Tensor, **rest: Tensor) -> dict[str, Tensor]:
        return {
            "image_embeds": first,
            "text_embeds": second,
            "logit_scale": self.scale,
            "logit_bias": self.bias,
        }


LABELS = torch.tensor(
    [[0, -100, 1, 2], [2, 0, -100, -100]]
)  # learned: 1, 2 and 0; the first column never is


def losses_of(
    objective: Objective, model: nn.Module, batch: Batch, counts: list[int] | None = None
) -> Losses:
    """The losses of one batch that is the whole step, or a part of a step of `counts` items."""
    terms = Terms.of(objective)
    return terms(model, batch, terms.counts(batch) if counts is None else torch.tensor(counts))


def test_language_modeling_by_hand() -> None:
    objective, model = LanguageModeling(auxiliary={"balance": 0.5}), Unigram()
    assert objective.count({"labels": LABELS}) == 3
    normalizer = math.log(1 + math.e + math.e**2)
    language = ((normalizer - 1) + (normalizer - 2) + normalizer) / 3
    assert objective.loss(model(LABELS), {"labels": LABELS}).item() == pytest.approx(3 * language)
    losses = losses_of(objective, model, {"labels": LABELS})
    assert losses.terms["language"].item() == pytest.approx(language, rel=1e-6)
    assert losses.terms["balance"].item() == pytest.approx(0.5 * 5 / 3, rel=1e-6)
    assert losses.total.item() == pytest.approx(language + 0.5 * 5 / 3, rel=1e-6)


def test_rows_of_language_modeling_by_hand() -> None:
    objective, model, batch = LanguageModeling(), Unigram(), {"labels": LABELS}
    normalizer = math.log(1 + math.e + math.e**2)
    means = [
        objective.loss_of_rows(model, batch, torch.tensor(rows))
        for rows in ([True, False], [False, True])
    ]
    assert [mean.item() for mean in means if mean is not None] == pytest.approx(
        [normalizer - 1.5, normalizer]
    )
    assert (
        objective.loss_of_rows(
            model, {"labels": torch.full((2, 4), -100)}, torch.tensor([True, True])
        )
        is None
    )


@pytest.mark.parametrize("cut", [(slice(0, 1), slice(1, 2))])
def test_micro_batches_add_up_to_the_batch(cut: tuple[slice, slice]) -> None:
    objective, model = LanguageModeling(), Unigram()
    losses_of(objective, model, {"labels": LABELS}).total.backward()
    whole = model.logits.grad
    model.logits.grad = None
    for part in cut:
        losses_of(objective, model, {"labels": LABELS[part]}, [3]).total.backward()
    torch.testing.assert_close(model.logits.grad, whole)


def contrast(
    first: Tensor,
    second: Tensor,
    counts: list[int] | None = None,
    labels: list[int] | None = None,
    **options: Any,
) -> Tensor:
    batch: Batch = {"first": first, "second": second}
    if labels is not None:
        batch["pair_labels"] = torch.tensor(labels)
    return losses_of(Contrastive(pairs="first", **options), Fixed(), batch, counts).total


def test_softmax_loss_equals_clip_in_transformers() -> None:
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss as reference

    torch.manual_seed(0)
    first, second = torch.randn(6, 4), torch.randn(6, 4)
    logits = (
        5.0 * nn.functional.normalize(second, dim=-1) @ nn.functional.normalize(first, dim=-1).T
    )
    torch.testing.assert_close(contrast(first, second), reference(logits))


def test_sigmoid_loss_by_hand() -> None:
    first = second = torch.eye(2)
    # Partners score 5 - 3 = 2 and count positive, others score -3 and count negative; two of each,
    # two items.
    expected = math.log1p(math.exp(-2)) + math.log1p(math.exp(-3))
    assert contrast(first, second, loss="sigmoid").item() == pytest.approx(expected, rel=1e-6)


def test_contrast_learns_the_partner_not_the_order() -> None:
    torch.manual_seed(0)
    first = torch.randn(8, 4)
    matched, shuffled = contrast(first, first), contrast(first, first.roll(1, 0))
    assert matched < shuffled
    torch.testing.assert_close(matched, contrast(first.roll(3, 0), first.roll(3, 0)))


def test_contrast_is_weighted_by_its_fraction_of_the_step() -> None:
    first, second = torch.randn(2, 4), torch.randn(2, 4)
    torch.testing.assert_close(contrast(first, second, [8]), contrast(first, second) / 4)


def test_pairs_are_counted_by_the_stated_field_whatever_stands_before_it() -> None:
    batch = {"position_ids": torch.zeros(7, 2), "input_ids": torch.zeros(3, 9)}
    assert Contrastive().count(batch) == 3
    assert Contrastive(pairs="position_ids").count(batch) == 7
    for broken in (
        {"labels": torch.zeros(3)},
        {"input_ids": [1, 2]},
        {"input_ids": torch.tensor(5)},
    ):
        with pytest.raises(RecipeError, match=r"batch field 'input_ids'.*option pairs"):
            Contrastive().count(broken)


def test_defaults_of_later_fields_are_left_out_of_a_resolved_recipe() -> None:
    """A run from before a field has a recipe without it, and continues."""
    default = ContrastiveOptions(name="contrastive").model_dump(mode="json")
    assert not {"pairs", "same_label"} & set(default)
    set_ = ContrastiveOptions(name="contrastive", pairs="pixels", same_label="ignore").model_dump()
    assert (set_["pairs"], set_["same_label"]) == ("pixels", "ignore")


L, M, P = (math.log(a * math.exp(5) + b) for a, b in ((1, 2), (2, 1), (1, 1)))
"""Normalizers of rows with the logits 5, 0, 0; 5, 5, 0; and 5, 0."""


@pytest.mark.parametrize(
    ("same_label", "rows", "columns"),
    [
        ("negative", [L - 5, L, M - 5], [M - 5, L, L - 5]),
        ("ignore", [P - 5, math.log(2), M - 5], [P - 5, P, L - 5]),
        ("positive", [L - 2.5, L - 2.5, M - 5], [M - 5, L, L - 5]),
    ],
)
def test_softmax_loss_of_equal_captions_by_hand(
    same_label: str, rows: list[float], columns: list[float]
) -> None:
    """The first two pairs are of one label; the scores are 5, 0, 0; 5, 0, 0; 0, 5, 5."""
    axes = torch.eye(2)
    images, texts = axes[[0, 0, 1]], axes[[0, 1, 1]]
    loss = contrast(images, texts, labels=[7, 7, 9], same_label=same_label)
    assert loss.item() == pytest.approx((sum(rows) + sum(columns)) / 2 / 3, rel=1e-6)


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


@pytest.mark.parametrize(
    ("same_label", "of_one_label"),
    [
        ("negative", softplus(-3) + softplus(2)),
        ("ignore", 0.0),
        ("positive", softplus(3) + softplus(-2)),
    ],
)
def test_sigmoid_loss_of_equal_captions_by_hand(same_label: str, of_one_label: float) -> None:
    """Scores are 2 where the vectors are equal, -3 elsewhere; three pairs in every mode."""
    axes = torch.eye(2)
    images, texts = axes[[0, 0, 1]], axes[[0, 1, 1]]
    loss = contrast(images, texts, labels=[7, 7, 9], same_label=same_label, loss="sigmoid")
    partners = softplus(-2) + softplus(3) + softplus(-2)
    others = 3 * softplus(-3) + softplus(2)
    assert loss.item() == pytest.approx((partners + others + of_one_label) / 3, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("same_label", ["ignore", "positive"])
def test_several_positives_an_image_entry_by_entry(same_label: str, smoothing: float) -> None:
    torch.manual_seed(0)
    labels = [3, 5, 3, 3, 5, 8]
    images, texts = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    loss = contrast(images, texts, labels=labels, same_label=same_label, label_smoothing=smoothing)
    found = torch.autograd.grad(loss, (images, texts))
    scores = (
        5.0 * nn.functional.normalize(images, dim=-1) @ nn.functional.normalize(texts, dim=-1).T
    )
    total = torch.zeros(())
    for logits in (scores, scores.T):
        for row in range(6):
            equal = [column for column in range(6) if labels[column] == labels[row]]
            compared = [c for c in range(6) if c == row or c not in equal]
            if same_label == "positive":
                compared = list(range(6))
            wanted = equal if same_label == "positive" else [row]
            log = logits[row, compared].log_softmax(0)
            for place, column in enumerate(compared):
                target = smoothing / len(compared)
                target += (1 - smoothing) / len(wanted) if column in wanted else 0.0
                total = total - target * log[place] / 2 / 6
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(found, torch.autograd.grad(total, (images, texts)))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_pairs_without_an_equal_are_compared_as_ever(loss: str) -> None:
    torch.manual_seed(0)
    images, texts = torch.randn(5, 4), torch.randn(5, 4)
    plain = contrast(images, texts, loss=loss)
    for same_label in ("negative", "ignore", "positive"):
        options = {"loss": loss, "same_label": same_label}
        found = contrast(images, texts, labels=[4, 0, 3, 1, 2], **options)
        torch.testing.assert_close(found, plain)


def test_a_batch_of_one_label_alone_has_nothing_to_push_apart() -> None:
    images, texts = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    loss = contrast(images, texts, labels=[1, 1, 1], same_label="ignore", label_smoothing=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert images.grad is not None
    assert images.grad.abs().max() < 1e-6


@pytest.mark.parametrize("same_label", ["ignore", "positive"])
def test_labels_of_pairs_are_required_where_they_are_read(same_label: Any) -> None:
    objective, ids = Contrastive(same_label=same_label), torch.zeros(2, 9)
    with pytest.raises(RecipeError, match=r"'pair_labels', found the fields input_ids; .*pairs"):
        objective.count({"input_ids": ids})
    for broken in (torch.zeros(3, dtype=torch.long), torch.zeros(2, 1).long(), torch.zeros(2)):
        with pytest.raises(RecipeError, match="one integer for each of 2 pairs, found"):
            objective.count({"input_ids": ids, "pair_labels": broken})
    assert objective.count({"input_ids": ids, "pair_labels": torch.zeros(2).long()}) == 2


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_every_registered_objective_builds_from_its_options(name: str) -> None:
    entry = OBJECTIVES.entry(name)
    options = entry.options.model_validate({"name": name}).model_dump()
    options.pop("name")
    objective = OBJECTIVES.get(name)(**options)
    assert isinstance(objective, Objective)
    assert objective.term
    assert entry.options.model_validate({"name": name}).reads() == objective.reads
    assert entry.summary
