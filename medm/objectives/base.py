"""What an objective must be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor, nn

from medm.errors import RecipeError
from medm.types import Batch


@dataclass(slots=True)
class Losses:
    """What an objective returns for one batch."""

    total: Tensor
    """What is minimised; a scalar with a graph."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """The terms of the total by name, detached, weights applied; empty where the total has one term alone."""


class Objective(ABC):
    """Turns a model and a batch into losses. A subclass takes the fields of its options class by keyword.

    Losses are sums over items (labelled tokens, pairs), divided by the items of the whole optimiser step:
    then accumulation, uneven batches and the number of processes do not change what is minimised.
    """

    @abstractmethod
    def num_items(self, batch: Batch) -> Tensor:
        """Items of this batch that the loss is a sum over; an int64 scalar. Reads the batch only."""

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Batch, num_items_in_batch: Tensor | int | None = None) -> Losses:
        """The losses of a batch.

        Args:
            model: called as `model(**batch)`; may be wrapped (DDP, DeepSpeed).
            batch: see `medm.types.Batch`.
            num_items_in_batch: items over all micro-batches and processes of the step; without it those of this
                batch alone, so that the total is a mean.
        """

    def loss_of_rows(self, model: nn.Module, batch: Batch, rows: Tensor) -> Tensor | None:
        """Mean loss of some rows of a batch, without what belongs to no single row (a router's balance).

        Args:
            model: as above, without wrappers.
            batch: as above.
            rows: (B,) bool.

        Returns:
            A scalar with a graph; None where these rows hold nothing that is learned.

        Raises:
            RecipeError: the loss of this objective does not fall apart into rows.
        """
        raise RecipeError(f"{type(self).__name__}: its loss does not fall apart into rows; leave out diagnostics")

    def share(self, batch: Batch, num_items_in_batch: Tensor | int | None) -> Tensor | float:
        """The part of the step's items that this batch holds; weighs a mean over the batch."""
        if num_items_in_batch is None:
            return 1.0
        items = self.num_items(batch)
        return items / num_items_in_batch
