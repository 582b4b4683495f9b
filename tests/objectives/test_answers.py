"""The objective of answers as classes: numbers by hand."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch

from medm.errors import RecipeError
from medm.objectives.answers import AnswerClasses

Part = Literal["all", "closed", "open", "type"]
LN3 = math.log(3)
OUTPUT = {
    "answer_logits_closed": torch.tensor([[0.0, LN3], [0.0, 0.0], [9.0, 9.0]]),
    "answer_logits_open": torch.tensor([[9.0] * 3, [LN3, -LN3, 0.0], [9.0] * 3]),
    "answer_logits_type": torch.tensor([[0.0, LN3], [0.0, LN3], [5.0, 5.0]]),
}
BATCH = {
    "answer_branches": torch.tensor([0, 1, -100]),
    "answer_targets": torch.tensor([[0, 1.0, 0, 0, 0], [0, 0, 0.25, 0, 0], [0] * 5]),
}
"""A closed question, an open one with a soft score, and a study without a question."""
CLOSED = (math.log(2) + math.log(4 / 3)) / 2
OPEN = (0.25 * math.log(4 / 3) + 0.75 * math.log(4) + math.log(4 / 3) + math.log(2)) / 3
TYPE = math.log(4) + math.log(4 / 3)


@pytest.mark.parametrize(
    ("part", "weight", "count", "expected"),
    [
        ("all", 1.0, 2, CLOSED + OPEN + TYPE),
        ("all", 0.5, 2, CLOSED + OPEN + TYPE / 2),
        ("closed", 1.0, 1, CLOSED),
        ("open", 1.0, 1, OPEN),
        ("type", 0.5, 2, TYPE),
    ],
)
def test_parts_by_hand(part: Part, weight: float, count: int, expected: float) -> None:
    objective = AnswerClasses(part=part, type_weight=weight)
    assert objective.count(BATCH) == count
    assert objective.loss(OUTPUT, BATCH).item() == pytest.approx(expected, rel=1e-6)


def test_all_parts_are_the_published_sum_of_means() -> None:
    """MOTOR: BCEWithLogitsLoss of the closed rows, plus that of the open ones."""
    torch.manual_seed(0)
    closed, open_, rows = torch.randn(6, 4), torch.randn(6, 7), torch.tensor([0, 1, 1, 0, 1, 1])
    targets = torch.rand(6, 11)
    published = torch.nn.BCEWithLogitsLoss()
    expected = published(closed[rows == 0], targets[rows == 0, :4])
    expected = expected + published(open_[rows == 1], targets[rows == 1, 4:])
    output: dict[str, Any] = {"answer_logits_closed": closed, "answer_logits_open": open_}
    output["answer_logits_type"] = torch.randn(6, 2)
    batch = {"answer_branches": rows, "answer_targets": targets}
    terms = [AnswerClasses(part="closed"), AnswerClasses(part="open")]
    found = sum(float(term.loss(output, batch) / term.count(batch)) for term in terms)
    assert found == pytest.approx(expected.item(), rel=1e-6)


def test_a_batch_of_other_lists_or_none_is_refused() -> None:
    with pytest.raises(RecipeError, match="2 closed and 3 open answers, and the batch targets for"):
        AnswerClasses().loss(OUTPUT, BATCH | {"answer_targets": torch.zeros(3, 4)})
    with pytest.raises(RecipeError, match="expected the batch field 'answer_branches'"):
        AnswerClasses().count({"input_ids": torch.zeros(1, 2)})
