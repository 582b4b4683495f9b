"""Answers to closed and open questions as classes, and the type of a question."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from medm.errors import RecipeError
from medm.objectives.base import Objective, Output
from medm.types import ANSWER_BRANCHES, IGNORE_INDEX, Batch

_CLOSED, _OPEN = range(len(ANSWER_BRANCHES))


class AnswerClasses(Objective):
    """Binary cross-entropy against soft scores of answers, and cross-entropy of two types.

    The output has `answer_logits_closed` (B, C), `answer_logits_open` (B, O) and
    `answer_logits_type` (B, 2); the batch has `answer_branches` (B,) and `answer_targets`
    (B, C + O). A question counts in the branch of its record's type alone; one without a type does
    not count. Every output has a place in the graph, so that a batch without questions of a type
    gives each weight a gradient.

    Args:
        part: see `AnswersOptions`.
        type_weight: see `AnswersOptions`.
    """

    term = "answers"

    def __init__(
        self, *, part: Literal["all", "closed", "open", "type"] = "all", type_weight: float = 1.0
    ) -> None:
        self.part = part
        self.answer_weights = {
            _CLOSED: float(part in ("all", "closed")),
            _OPEN: float(part in ("all", "open")),
        }
        self.type_weight = {"all": type_weight, "type": 1.0}.get(part, 0.0)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"answer_logits_closed", "answer_logits_open", "answer_logits_type"})

    def count(self, batch: Batch) -> Tensor:
        """Return the questions of the part."""
        branches = self._field(batch, "answer_branches")
        if self.part in ANSWER_BRANCHES:
            return (branches == ANSWER_BRANCHES.index(self.part)).sum()
        return (branches != IGNORE_INDEX).sum()

    def loss(self, output: Output, batch: Batch) -> Tensor:
        closed, open_ = output["answer_logits_closed"], output["answer_logits_open"]
        types = output["answer_logits_type"].float()
        branches = self._field(batch, "answer_branches")
        targets = self._field(batch, "answer_targets")
        if targets.shape[1] != closed.shape[1] + open_.shape[1]:
            raise RecipeError(
                f"answers: the model has {closed.shape[1]} closed and {open_.shape[1]} open "
                f"answers, and the batch targets for {targets.shape[1]}; expected their sum"
            )
        parts = targets.float().split([closed.shape[1], open_.shape[1]], dim=1)
        loss = self.type_weight * F.cross_entropy(
            types, branches, ignore_index=IGNORE_INDEX, reduction="sum"
        )
        for branch, logits in ((_CLOSED, closed), (_OPEN, open_)):
            each = F.binary_cross_entropy_with_logits(
                logits.float(), parts[branch], reduction="none"
            ).mean(dim=1)  # (B,)
            loss = loss + self.answer_weights[branch] * each[branches == branch].sum()
            loss = loss + 0.0 * logits.sum()
        return loss

    def _field(self, batch: Batch, name: str) -> Tensor:
        found = batch.get(name)
        if not isinstance(found, Tensor):
            raise RecipeError(
                f"answers: expected the batch field {name!r}, found the fields "
                f"{', '.join(sorted(batch))}; list the head answers in model.heads"
            )
        return found
