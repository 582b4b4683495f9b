"""Token-wise connectors: one linear layer, or an MLP (LLaVA 1.5, arXiv 2310.03744)."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn
from transformers.activations import ACT2FN

from medm.connectors import Activation
from medm.connectors.base import Connector
from medm.types import VisionFeatures


def build_mlp(in_dim: int, out_dim: int, *, depth: int, activation: Activation) -> nn.Sequential:
    """Return `depth` linear layers in_dim -> out_dim -> ... -> out_dim.

    They are named 0, 2, 4 ... as in LLaVA's files.
    """
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise([in_dim] + [out_dim] * depth):
        layers += [ACT2FN[activation]] if layers else []
        layers += [nn.Linear(width_in, width_out)]
    return nn.Sequential(*layers)


class MLPConnector(Connector):
    """One MLP over every token; the number of tokens does not change."""

    # LLaVA (`mm_projector.`), TinyLLaVA (`connector._connector.`), MedM-VL
    # (`connector_image.connector.`), stock Llava.
    key_map: ClassVar = (
        (r"^.*?linear_1\.", "layers.0."),
        (r"^.*?linear_2\.", "layers.2."),
        (r"^(?:.*\.)?(?:mm_projector|_?connector|projector)\.(\d+)\.", r"layers.\1."),
    )

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        grid: tuple[int, ...],
        prefix: int = 0,
        depth: int = 2,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, grid=grid, prefix=prefix)
        self.layers = build_mlp(in_dim, out_dim, depth=depth, activation=activation)

    def forward(self, features: VisionFeatures, task_ids: Tensor | None = None) -> Tensor:
        return self.layers(features.tokens)  # (B, N, out_dim)


class LinearConnector(MLPConnector):
    """One linear layer per token."""

    def __init__(
        self, *, in_dim: int, out_dim: int, grid: tuple[int, ...], prefix: int = 0
    ) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, grid=grid, prefix=prefix, depth=1)
