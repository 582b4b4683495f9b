"""Contract of an objective: how many items a batch holds, and the sum of a loss over them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

from medm.types import Batch

Output: TypeAlias = Mapping[str, Any]
"""Output of a model: tensors by name, and `losses`, a mapping of its auxiliary losses by name."""


class Objective(ABC):
    """A loss that is a sum over items (labeled tokens, pairs).

    A subclass takes its options by keyword.

    `medm.objectives.terms` runs the model and divides the sum by the items of the whole optimizer
    step. So accumulation, uneven batches and the number of ranks do not change what is minimized.
    """

    term: ClassVar[str]
    """Name of its loss in logs, if a recipe names no terms."""
    auxiliary: Mapping[str, float] | None = None
    """Weights of the losses that the model reports by name beside its output (`losses`), 1 for a
    name that is absent; None for an objective that leaves them out."""

    @property
    @abstractmethod
    def reads(self) -> frozenset[str]:
        """Fields of the model's output that `loss` needs."""

    @abstractmethod
    def count(self, batch: Batch) -> Tensor:
        """Return the items of this batch that the loss is a sum over, an int64 scalar."""

    @abstractmethod
    def loss(self, output: Output, batch: Batch) -> Tensor:
        """Return the sum of the loss over the items of this batch; a scalar with a graph.

        Every rank calls it, also with a batch of no items, for which it returns 0.
        """


@runtime_checkable
class RowLosses(Protocol):
    """An objective whose loss is a sum over rows.

    Diagnostics can measure the loss of one task's rows.
    """

    def loss_of_rows(self, model: nn.Module, batch: Batch, rows: Tensor) -> Tensor | None:
        """Return the mean loss of some rows.

        Auxiliary losses are not part of it: they belong to no single row.

        Args:
            model: without wrappers.
            batch: see `medm.types.Batch`.
            rows: (B,) bool.

        Returns:
            A scalar with a graph; None if these rows have no item.
        """
        ...
