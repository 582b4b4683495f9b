"""Masks of an LVLM: the language model's state at `[SEG]` prompts a mask head.

As in LISA (arXiv 2308.00692), Sa2VA (2501.04001), UniBiomed (2504.21336) and M3D-LaMed
(2404.00578).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from medm.heads.base import MaskHead, MaskLogits
from medm.models.lvlm.configuration import MaskEntry
from medm.models.lvlm.options import MaskProjectionOptions
from medm.models.lvlm.scatter import check
from medm.models.mask_heads import construct_head


class MaskInputs(NamedTuple):
    """Images and masks of a batch, as `medm.types.ConversationBatch` names them."""

    pixels: Tensor
    """(N, C, *spatial)."""
    tokens: Tensor
    """(M,) int64: of each mask its `[SEG]`, in the order of rows and positions."""
    items: Tensor
    """(M,) int64: of each mask its image in `pixels`."""


class MaskBranch(nn.Module):
    """A mask head, and the projection that leads to it from the language model.

    Args:
        config: entry in the config of a checkpoint.
        in_dim: width of the language model.
    """

    def __init__(self, config: MaskEntry, *, in_dim: int) -> None:
        super().__init__()
        self.view, self.token_id = config.view, config.token_id
        self.spatial, self.channels = tuple(config.spatial), config.channels
        self._offset = 1 if config.state == "before" else 0
        self.head: MaskHead = construct_head(config.head)
        self.projection = mask_projection(config.projection, in_dim, self.head.dim)

    @property
    def grid(self) -> tuple[int, ...]:
        """Grid of the logits of an input of the branch's size."""
        return self.head.grid(self.spatial)

    def prompts(self, hidden: Tensor, input_ids: Tensor, tokens: Tensor) -> Tensor:
        """Return the prompt of each mask, (M, D).

        Args:
            hidden: (B, T, D_llm), output of the language model's last layer.
            input_ids: (B, T).
            tokens: (M,), the number of the `[SEG]` of each mask.

        Raises:
            ValueError: fewer `[SEG]` than `tokens` name. Any number may stay without a mask.
        """
        marks = (input_ids == self.token_id).flatten()
        # The k-th mark by search, so that a GPU is not waited for.
        places = torch.searchsorted(marks.cumsum(0), tokens + 1)
        check(
            (places < len(marks)).all(),
            lambda: (
                f"masks name [SEG] number {int(tokens.max())} from 0, and the text holds "
                f"{int(marks.sum())}"
            ),
        )
        states = hidden.flatten(0, 1).index_select(0, places - self._offset)
        return self.projection(states.to(self._dtype))

    def forward(self, hidden: Tensor, input_ids: Tensor, inputs: MaskInputs | None) -> MaskLogits:
        """Return one mask for each entry of `inputs.tokens`.

        Without inputs there are none (M = 0), and they depend on every weight that masks use: a
        mask of a blank item is computed and left out. ZeRO-3 compares the modules that the ranks
        call, this one included, and a rank may have masks where another has none.
        """
        if inputs is None:
            prompts = self.projection(hidden[:1, 0].to(self._dtype))
            pixels = prompts.new_zeros(1, self.channels, *self.spatial)
            items = torch.zeros(1, dtype=torch.int64, device=prompts.device)
            return MaskLogits(*(value[:0] for value in self.head(pixels, prompts, items)))
        prompts = self.prompts(hidden, input_ids, inputs.tokens)
        return self.head(inputs.pixels.to(self._dtype), prompts, inputs.items)

    def nothing(self, hidden: Tensor) -> MaskLogits:
        """Return the output for no mask that depends on no weight: no module is called."""
        scores = hidden.new_zeros(0)
        return MaskLogits(hidden.new_zeros(0, *self.grid), scores, scores)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.projection.parameters()).dtype


def mask_projection(options: MaskProjectionOptions, in_dim: int, out_dim: int) -> nn.Sequential:
    """Return `depth` linear layers in_dim -> in_dim ... -> out_dim, named 0, 2, 4 ..."""
    layers: list[nn.Module] = []
    for _ in range(options.depth - 1):
        layers += [nn.Linear(in_dim, in_dim), ACT2FN[options.activation]]
    layers.append(nn.Linear(in_dim, out_dim))
    if options.dropout:
        layers.append(nn.Dropout(options.dropout))
    return nn.Sequential(*layers)
