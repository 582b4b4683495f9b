"""Contrast with soft targets, matching and labels: numbers by hand, straight computations."""

from __future__ import annotations

import math

import pytest
import torch

from medm.errors import RecipeError
from medm.objectives.classification import Multilabel
from medm.objectives.image_text_contrast import ImageTextContrast
from medm.objectives.matching import ImageTextMatching

PAIRS = {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
NAN = float("nan")


def test_soft_targets_by_hand() -> None:
    """Scores 0 and ln 3 are 1/4 and 3/4; a target of 0.4 and 0.6 costs that share of each."""
    logits = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]])
    targets = torch.tensor([[0.4, 0.6], [1.0, 0.0]])
    output = {
        "itc_logits_image": logits,
        "itc_targets_image": targets,
        "itc_logits_text": torch.zeros(2, 4),  # a queue of other length on this side
        "itc_targets_text": torch.eye(4)[:2],
    }
    image = 0.4 * math.log(4) + 0.6 * math.log(4 / 3) + math.log(4 / 3)
    loss = ImageTextContrast().loss(output, PAIRS)
    assert loss.item() == pytest.approx((image + 2 * math.log(4)) / 2, rel=1e-6)
    assert ImageTextContrast().count(PAIRS) == 2


def test_hard_targets_are_the_clip_loss() -> None:
    torch.manual_seed(0)
    scores = torch.randn(6, 6, requires_grad=True)
    output = {
        "itc_logits_image": scores,
        "itc_logits_text": scores.T,
        "itc_targets_image": torch.eye(6),
        "itc_targets_text": torch.eye(6),
    }
    partners = torch.arange(6)
    expected = sum(
        torch.nn.functional.cross_entropy(one, partners, reduction="sum") / 2
        for one in (scores, scores.T)
    )
    loss = ImageTextContrast().loss(output, {})
    torch.testing.assert_close(loss, expected)


def test_matching_by_hand_and_rows_without_a_negative() -> None:
    logits = torch.tensor([[0.0, math.log(3)]] * 6)
    labels = torch.tensor([1, 1, 0, -100, 0, -100])
    loss = ImageTextMatching().loss({"itm_logits": logits, "itm_labels": labels}, PAIRS)
    assert loss.item() == pytest.approx(2 * math.log(4 / 3) + 2 * math.log(4), rel=1e-6)
    assert ImageTextMatching().count(PAIRS) == 6


def test_labels_by_hand_and_unknown_ones() -> None:
    logits = torch.tensor([[math.log(3), 0.0], [-math.log(3), 7.0]], requires_grad=True)
    batch = {"label_targets": torch.tensor([[1.0, 0.0], [1.0, NAN]])}
    loss = Multilabel().loss({"label_logits": logits}, batch)
    assert loss.item() == pytest.approx(math.log(4 / 3) + math.log(2) + math.log(4), rel=1e-6)
    assert Multilabel().count(batch) == 3
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[1, 1] == 0.0
    assert torch.isfinite(logits.grad).all()


def test_a_hundred_times_a_cosine_does_not_saturate() -> None:
    """The published sigmoid is 1 in fp32 above 17; the logit of a wrong label keeps its slope."""
    logits = torch.tensor([[100.0, -100.0]], requires_grad=True)
    batch = {"label_targets": torch.tensor([[0.0, 1.0]])}
    loss = Multilabel().loss({"label_logits": logits}, batch)
    loss.backward()
    assert loss.item() == pytest.approx(200.0)
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, -1.0]]))
    published = torch.tensor([[100.0, -100.0]], requires_grad=True)
    torch.nn.functional.binary_cross_entropy(
        published.sigmoid(), batch["label_targets"], reduction="sum"
    ).backward()
    assert published.grad is not None
    assert published.grad[0, 0] == 0.0


def test_a_batch_without_items_gives_zero_with_a_graph() -> None:
    weight = torch.ones(2, requires_grad=True)
    empty = {"input_ids": torch.zeros(0, 1), "label_targets": torch.zeros(0, 2)}
    rows = weight.expand(3, 2)[:0]
    outputs = {
        ImageTextContrast(): {
            f"itc_{what}_{side}": rows if what == "logits" else rows.detach()
            for what in ("logits", "targets")
            for side in ("image", "text")
        },
        ImageTextMatching(): {"itm_logits": rows, "itm_labels": torch.zeros(0, dtype=torch.long)},
        Multilabel(): {"label_logits": rows},
    }
    for objective, output in outputs.items():
        assert objective.count(empty) == 0
        loss = objective.loss(output, empty)
        loss.backward()
        assert loss.item() == 0.0


def test_a_batch_or_an_output_that_does_not_fit_is_refused() -> None:
    for objective in (ImageTextContrast(), ImageTextMatching()):
        with pytest.raises(RecipeError, match="use records with reports"):
            objective.count({"pixels": {}})
    with pytest.raises(RecipeError, match=r"list the labels in model\.labels"):
        Multilabel().count({"pixels": {}})
    with pytest.raises(RecipeError, match=r"\(1, 2\).*\(1, 3\)"):
        Multilabel().loss({"label_logits": torch.zeros(1, 2)}, {"label_targets": torch.zeros(1, 3)})
