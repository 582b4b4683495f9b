"""Interface of connectors. Connectors do not depend on the encoder or the LLM."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from math import prod
from typing import ClassVar

from torch import Tensor, nn

from medm.types import VisionFeatures


class Connector(nn.Module, metaclass=ABCMeta):
    """Vision features to tokens of the LLM's width.

    A subclass without `forward` raises `TypeError` when it is constructed.

    A subclass takes `in_dim`, `out_dim`, `grid` and `prefix` (derived by the composition: input
    width, output width, token grid, tokens in front of it) and, by keyword, the fields of its
    options class other than `name` and `path`.
    """

    key_map: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Names in projector files to own names: (regular expression, replacement), the first that
    matches wins."""

    needs_task: bool = False
    refuses_unseen_tasks: bool = False
    """True if the forward reads `task_ids` (a router that uses the task)."""

    def __init__(
        self, *, in_dim: int, out_dim: int, grid: tuple[int, ...], prefix: int = 0
    ) -> None:
        super().__init__()
        self.in_dim, self.out_dim, self.grid, self.prefix = in_dim, out_dim, grid, prefix

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the LLM receives per image or volume, by arithmetic only.

        Checkpoints store it.
        """
        return self.prefix + prod(self.grid)

    @abstractmethod
    def forward(self, features: VisionFeatures, task_ids: Tensor | None = None) -> Tensor:
        """Returns (B, num_tokens, out_dim).

        Args:
            features: tokens (B, prefix + prod(grid), in_dim).
            task_ids: (B,) index of each item's task, for connectors with `needs_task`; negative for
                a dummy item.
        """

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Return the auxiliary losses of the last forward by name; usually empty.

        Training adds them (load balance of a router).
        """
        return {}
