"""Several objectives over one run of the model: hand-computed totals, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medm.config import validate
from medm.errors import RecipeError
from medm.objectives import LanguageModelingOptions, TermsOptions
from medm.objectives.base import Objective, Output
from medm.objectives.contrastive import Contrastive
from medm.objectives.language_modeling import LanguageModeling
from medm.objectives.terms import Term, Terms, terms_of
from medm.types import Batch


class SumOf(Objective):
    """The sum over items of one field; another field of the batch says which items count."""

    term = "sum"

    def __init__(self, field: str, *, where: str) -> None:
        self.field, self.where = field, where

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({self.field})

    def count(self, batch: Batch) -> Tensor:
        return batch[self.where].sum()

    def loss(self, output: Output, batch: Batch) -> Tensor:
        return (output[self.field] * batch[self.where]).sum()


class Scale(nn.Module):
    """Gives its input times a weight, and the square of that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.calls = 0

    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> Output:
        self.calls += 1
        y = self.weight * x
        return {"y": y, "square": y * y, "losses": {"balance": 3 * self.weight}}


X = torch.tensor([1.0, 2.0, 3.0, 4.0])
A, B = torch.tensor([1, 1, 0, 1]), torch.tensor([0, 0, 1, 0])
BATCH = {"x": X, "a": A, "b": B}


def two(auxiliary: dict[str, float] | None = None) -> Terms:
    first = SumOf("y", where="a")
    first.auxiliary = auxiliary
    return Terms({"first": Term(first), "second": Term(SumOf("square", where="b"), weight=0.5)})


def test_two_terms_by_hand_in_one_run_of_the_model() -> None:
    """(2 + 4 + 8) / 3 items, and half of 6 * 6 / 1 item; derivatives 7 / 3 and half of 2 * 2
    * 9."""
    model, terms = Scale(), two()
    assert terms.counts(BATCH).tolist() == [3, 1]
    losses = terms(model, BATCH, terms.counts(BATCH))
    losses.total.backward()
    assert losses.total.item() == pytest.approx(14 / 3 + 18)
    assert {name: value.item() for name, value in losses.terms.items()} == pytest.approx(
        {"first": 14 / 3, "second": 18}
    )
    assert model.weight.grad is not None
    assert model.weight.grad.item() == pytest.approx(7 / 3 + 18)
    assert model.calls == 1


def test_micro_batches_of_different_counts_add_up_to_the_step() -> None:
    """One has items of the second term, the other has none."""
    model, terms = Scale(), two({"balance": 0.1})
    halves = [
        {name: value[part] for name, value in BATCH.items()} for part in (slice(0, 2), slice(2, 4))
    ]
    counts = terms.total_counts(halves, torch.device("cpu"))
    assert counts.tolist() == [3, 1]
    losses = [terms(model, half, counts) for half in halves]
    whole = terms(model, BATCH, counts)
    torch.testing.assert_close(losses[0].total + losses[1].total, whole.total)
    assert losses[0].terms["second"] == 0
    # A mean over the batch counts by the batch's fraction of the items: two of three, and one of
    # three.
    assert [part.terms["balance"].item() for part in losses] == pytest.approx(
        [0.6 * 2 / 3, 0.6 / 3]
    )
    assert list(whole.terms) == ["first", "balance", "second"]
    assert whole.by_objective.tolist() == pytest.approx([14 / 3 + 0.6, 18])


def test_one_objective_names_no_terms() -> None:
    terms = Terms.of(SumOf("y", where="a"))
    losses = terms(Scale(), BATCH, terms.counts(BATCH))
    assert losses.terms == {}
    assert losses.total == losses.by_objective


def test_a_field_that_the_model_does_not_give_is_named() -> None:
    terms = Terms(
        {"first": Term(SumOf("y", where="a")), "masks": Term(SumOf("mask_logits", where="b"))}
    )
    words = r"term 'masks' \(SumOf\) reads mask_logits, and the model gives losses, square, y"
    with pytest.raises(RecipeError, match=words):
        terms(Scale(), BATCH, torch.tensor([1, 1]))


def test_a_model_is_told_what_is_read_where_it_asks() -> None:
    class Asking(nn.Module):
        def forward(self, outputs: frozenset[str], **batch: Tensor) -> Output:
            self.outputs = outputs
            return dict.fromkeys(outputs, batch["x"])

    asking, terms = Asking(), two()
    wrapped = nn.Module()
    wrapped.module, wrapped.forward = asking, asking.forward
    for model in (asking, wrapped):
        terms(model, BATCH, terms.counts(BATCH))
        assert asking.outputs == terms.reads == {"y", "square"}


def test_auxiliary_losses_are_not_counted_twice() -> None:
    twice = {"one": Term(LanguageModeling()), "two": Term(LanguageModeling())}
    with pytest.raises(RecipeError, match="one and two each add the auxiliary losses"):
        Terms(twice)


def test_terms_of_a_recipe() -> None:
    section = {
        "terms": {
            "text": {"objective": {"name": "language-modeling", "auxiliary": {"balance": 0.5}}},
            "pairs": {"objective": {"name": "contrastive", "loss": "sigmoid"}, "weight": 0.25},
        }
    }
    options = validate(TermsOptions, section, source="a recipe")
    terms = terms_of(options)
    text, pairs = terms.terms["text"], terms.terms["pairs"]
    assert isinstance(text.objective, LanguageModeling)
    assert isinstance(pairs.objective, Contrastive)
    assert (text.weight, pairs.weight) == (1.0, 0.25)
    assert text.objective.auxiliary == {"balance": 0.5}
    assert pairs.objective.sigmoid
    assert terms.reads == {"loss_sum", "image_embeds", "text_embeds", "logit_scale", "logit_bias"}
    assert validate(TermsOptions, options.model_dump(mode="json"), source="itself") == options


def test_one_objective_of_a_recipe_keeps_its_name() -> None:
    terms = terms_of(LanguageModelingOptions(name="language-modeling", auxiliary={"balance": 2.0}))
    assert list(terms.terms) == ["language"]
    assert terms.terms["language"].objective.auxiliary == {"balance": 2.0}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"terms": {}}, "terms: "),
        ({"terms": {"a": {"objective": "contrastiv"}}}, "did you mean 'contrastive'"),
        ({"terms": {"a": {"objective": "contrastive", "wieght": 1}}}, "did you mean 'weight'"),
        ({"terms": {"a": {"objective": "contrastive", "weight": -1}}}, "terms.a.weight: "),
        ({"terms": {"a": {"weight": 1}}}, "terms.a.objective: missing"),
    ],
)
def test_a_broken_section_is_refused_with_its_key(section: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError) as refused:
        validate(TermsOptions, section, source="a recipe")
    assert words in str(refused.value)
