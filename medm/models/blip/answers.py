"""Answers to questions as classes: gate of the question, classifiers, predictor of the type.

MOTOR's layout (its VQA scripts follow the conditional reasoning of Zhan et al., ACM MM 2020): the
question attends to the image, and a classifier for closed questions and one for open questions
score the answers of their list. Knows no image and no tokens; `MedmBlip` gives the states.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medm.config import validate
from medm.errors import RecipeError
from medm.models.blip.options import AnswerOptions
from medm.types import ANSWER_BRANCHES, IGNORE_INDEX


class Question(NamedTuple):
    """States of B questions in a text encoder."""

    words: Tensor
    """(B, T, D) embeddings."""
    states: Tensor
    """(B, T, D) of the question alone."""
    fused: Tensor
    """(B, D) of the first token, which has seen the image."""


class AnswerLogits(NamedTuple):
    """Scores of answers and types for B questions."""

    closed: Tensor
    """(B, closed answers)."""
    open: Tensor
    """(B, open answers)."""
    type: Tensor
    """(B, 2), in the order of `ANSWER_BRANCHES`."""


class Answers(NamedTuple):
    """The answers to B questions."""

    branches: Tensor
    """(B,) int64, type of each question as a place in `ANSWER_BRANCHES`."""
    classes: Tensor
    """(B,) int64, place of the answer in the list of its branch."""
    scores: Tensor
    """(B,) sigmoid of the answer's logit. It is not calibrated."""


def resolved_answers(options: AnswerOptions) -> AnswerOptions:
    """Return the options with the lists of the file in place of its name.

    Raises:
        RecipeError: the file cannot be read, or its lists are not usable.
    """
    if options.file is None:
        return options
    place = f"model.answers.file: {options.file}"
    try:
        lists = json.loads(Path(options.file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{place}: cannot be read as JSON ({error})") from None
    if not isinstance(lists, dict) or set(lists) != set(ANSWER_BRANCHES):
        raise RecipeError(
            f"{place}: expected an object of the lists {' and '.join(ANSWER_BRANCHES)}, as `medm "
            "data answers` writes it"
        )
    fields = options.model_dump(exclude={"file"})
    return validate(AnswerOptions, fields | lists, source=place)


class QuestionPooling(nn.Module):
    """One vector of a question: attention that a tanh and a sigmoid gate score.

    Args:
        word_dim: width of the embeddings.
        dim: width of the states.
    """

    def __init__(self, word_dim: int, dim: int) -> None:
        super().__init__()
        self.tanh = nn.Linear(word_dim + dim, dim)
        self.sigmoid = nn.Linear(word_dim + dim, dim)
        self.score = nn.Linear(dim, 1)

    def forward(self, words: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Return (B, dim).

        Args:
            words: (B, T, word_dim).
            states: (B, T, dim).
            mask: (B, T), 0 at padding, which has no weight. The release gives it weight.
        """
        both = torch.cat([words, states], dim=2)
        gated = self.tanh(both).tanh() * self.sigmoid(both).sigmoid()
        scores = self.score(gated).squeeze(2).masked_fill(~mask.bool(), -torch.inf)  # (B, T)
        return (scores.softmax(dim=1).unsqueeze(1) @ states).squeeze(1)


class QuestionMLP(nn.Module):
    """A question's pooled vector through three layers.

    Args:
        word_dim: width of the embeddings.
        dim: width of the states.
        widths: of the three layers.
        dropout: in front of the second activation, as published.
    """

    def __init__(self, word_dim: int, dim: int, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        first, second, third = widths
        self.pooling = QuestionPooling(word_dim, dim)
        self.layers = nn.Sequential(
            nn.Linear(dim, first),
            nn.ReLU(),
            nn.Linear(first, second),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Linear(second, third),
        )

    def forward(self, words: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Return (B, last width); arguments as those of `QuestionPooling`."""
        return self.layers(self.pooling(words, states, mask))


class AnswerHead(nn.Module):
    """From the states of questions to scores of answers and types.

    Projection and gate are shared by the branches, as published; each has a classifier of its own.

    Args:
        options: with both lists.
        dim: width of the states.
    """

    def __init__(self, options: AnswerOptions, dim: int) -> None:
        super().__init__()
        wide, dropout = options.dim, options.dropout
        self.projection = nn.Linear(dim, wide)
        gated = wide if options.gate == "projected" else dim
        self.gate: QuestionMLP | None = None
        self.state_projection: nn.Linear | None = None
        if options.gate != "none":
            self.gate = QuestionMLP(dim, gated, (2 * gated, gated, gated), dropout)
        if options.gate == "projected":
            self.state_projection = nn.Linear(dim, wide)
        self.question_type = QuestionMLP(dim, dim, (256, 64, len(ANSWER_BRANCHES)), dropout)
        self.classifiers = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(wide, 2 * wide),
                    nn.ReLU(),
                    nn.Dropout(dropout),
                    nn.Linear(2 * wide, len(getattr(options, name))),
                )
                for name in ANSWER_BRANCHES
            }
        )
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)

    def forward(self, questions: Sequence[Question], mask: Tensor) -> AnswerLogits:
        """Score the answers of both branches for every question.

        Args:
            questions: states in the encoder of each branch, in the order of `ANSWER_BRANCHES`. The
                type is read from the first.
            mask: (B, T), 0 at padding.
        """
        closed, open_ = (
            self.classifiers[name](self._vector(question, mask))
            for name, question in zip(ANSWER_BRANCHES, questions, strict=True)
        )
        first = questions[0]
        types = self.question_type(first.words, first.states, mask)
        return AnswerLogits(closed, open_, types)

    def _vector(self, question: Question, mask: Tensor) -> Tensor:
        """Return (B, width of the classifiers)."""
        if self.gate is None:
            return self.projection(question.fused)
        states = question.states
        if self.state_projection is not None:
            gate = self.gate(question.words, self.state_projection(states), mask)
            return self.projection(question.fused) * gate
        return self.projection(question.fused * self.gate(question.words, states, mask))


def branch_or_unknown(answer_type: str | None) -> int:
    """Return the place of a type in `ANSWER_BRANCHES`, or `IGNORE_INDEX` for any other."""
    name = (answer_type or "").strip().casefold()
    return ANSWER_BRANCHES.index(name) if name in ANSWER_BRANCHES else IGNORE_INDEX


def choose(logits: AnswerLogits, gold: Tensor | None) -> Answers:
    """Return the best answer of each question in its branch.

    Args:
        logits: of answers and types.
        gold: (B,) int64, the branches; None takes the predicted ones.

    Raises:
        RecipeError: a branch is missing.
    """
    branches = logits.type.argmax(dim=1) if gold is None else gold
    if bool((branches == IGNORE_INDEX).any()):
        raise RecipeError(
            "model.answers.route is gold, and a question has no answer_type; give every record "
            "one, closed or open, or set model.answers.route: predicted"
        )
    best = [one.float().sigmoid().max(dim=1) for one in (logits.closed, logits.open)]
    rows = torch.arange(len(branches), device=branches.device)
    scores = torch.stack([one.values for one in best])[branches, rows]
    return Answers(branches, torch.stack([one.indices for one in best])[branches, rows], scores)
