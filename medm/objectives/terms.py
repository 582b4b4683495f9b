"""The weighted sum of several objectives over one run of the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medm.errors import RecipeError
from medm.objectives import OBJECTIVES, ObjectiveOptions, TermsOptions
from medm.objectives.base import Objective, Output
from medm.types import Batch


@dataclass(frozen=True, slots=True)
class Term:
    """An objective and its weight in the sum."""

    objective: Objective
    weight: float = 1.0


@dataclass(slots=True)
class Losses:
    """Losses of one batch, its sums divided by the items of the whole step."""

    total: Tensor
    """Minimized; a scalar with a graph."""
    by_objective: Tensor
    """(K,) the total by objective, each with its auxiliary losses; detached, weights applied."""
    terms: dict[str, Tensor]
    """The total by name, auxiliary losses separately; detached, weights applied. Empty for one
    term."""


class Terms:
    """Objectives by name, each with a weight. The model runs once per batch, whatever their number.

    The total is the sum over all terms of weight * sum / count, with the count of the whole
    optimizer step: all micro-batches of all ranks. An auxiliary loss is a mean over a batch; it
    counts by the batch's fraction of the items of the objective that takes it, times a weight of
    its own.

    Args:
        terms: by name, in the order in which they are added.

    Raises:
        RecipeError: there is no term, or several of them take the auxiliary losses of the model.
    """

    def __init__(self, terms: Mapping[str, Term]) -> None:
        self.terms = dict(terms)
        if not self.terms:
            raise RecipeError("objective.terms: expected at least one term, found none")
        takers = [name for name, term in self.terms.items() if term.objective.auxiliary is not None]
        if len(takers) > 1:
            raise RecipeError(
                f"objective.terms: {' and '.join(takers)} each add the auxiliary losses of the "
                "model, which would count twice; keep one of them"
            )

    @classmethod
    def of(cls, objective: Objective) -> Terms:
        """Return the terms of a single objective, under its own name."""
        return cls({objective.term: Term(objective)})

    @property
    def reads(self) -> frozenset[str]:
        """Fields of the model's output that any objective reads."""
        return frozenset().union(*(term.objective.reads for term in self.terms.values()))

    def counts(self, batch: Batch) -> Tensor:
        """Return the items of a batch by objective, (K,) int64."""
        return torch.stack([term.objective.count(batch) for term in self.terms.values()])

    def total_counts(self, batches: Iterable[Batch], device: torch.device) -> Tensor:
        """Return the items of several batches by objective, (K,) int64 on a device."""
        total = torch.zeros(len(self.terms), dtype=torch.int64, device=device)
        for batch in batches:
            total += self.counts(batch).to(device)
        return total

    def __call__(self, model: nn.Module, batch: Batch, counts: Tensor) -> Losses:
        """Run the model on a batch and add up the terms.

        Args:
            model: called once, as `model(**batch)`, and with `outputs` where its forward has a
                parameter of that name; may be wrapped (DDP, DeepSpeed).
            batch: see `medm.types.Batch`.
            counts: (K,) items of the whole optimizer step, at least 1.
        """
        output: Output = model(**batch, **self._request(model))
        self._require(output)
        sums: list[Tensor] = []
        terms: dict[str, Tensor] = {}
        for (name, term), count in zip(self.terms.items(), counts, strict=True):
            main = term.weight * (term.objective.loss(output, batch) / count)
            terms[name] = main.detach()
            for key, loss in self._auxiliary(term.objective, output, batch, count).items():
                terms[key] = loss.detach()
                main = main + loss
            sums.append(main)
        return Losses(
            total=sum(sums[1:], sums[0]),
            by_objective=torch.stack([value.detach() for value in sums]),
            terms=terms if len(terms) > 1 else {},
        )

    def _request(self, model: nn.Module) -> dict[str, frozenset[str]]:
        """Name the fields that are read to a model that asks for them."""
        plain = model
        while isinstance(inner := getattr(plain, "module", None), nn.Module):
            plain = inner
        asks = "outputs" in inspect.signature(plain.forward).parameters
        return {"outputs": self.reads} if asks else {}

    def _require(self, output: Output) -> None:
        given = {name for name in output if output[name] is not None}
        for name, term in self.terms.items():
            if missing := sorted(term.objective.reads - given):
                raise RecipeError(
                    f"objective: the term {name!r} ({type(term.objective).__name__}) reads "
                    f"{', '.join(missing)}, and the model gives {', '.join(sorted(given))}; choose "
                    "another objective or kind of model"
                )

    def _auxiliary(
        self, objective: Objective, output: Output, batch: Batch, count: Tensor
    ) -> dict[str, Tensor]:
        """Return the weighted auxiliary losses by name, where this objective takes them."""
        losses = output.get("losses") if objective.auxiliary is not None else None
        if not losses:
            return {}
        fraction = objective.count(batch) / count
        weights = objective.auxiliary or {}
        return {name: weights.get(name, 1.0) * fraction * loss for name, loss in losses.items()}


def terms_of(section: ObjectiveOptions | TermsOptions) -> Terms:
    """Return the terms that a recipe's `objective` section describes."""
    if isinstance(section, TermsOptions):
        given = section.terms.items()
        return Terms({name: Term(_build(term.objective), term.weight) for name, term in given})
    return Terms.of(_build(section))


def _build(options: ObjectiveOptions) -> Objective:
    values = options.model_dump()
    return OBJECTIVES.get(values.pop("name"))(**values)
