"""Blocks of each registered connector as a recipe would write them, and the features that they
meet."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from medm.connectors import CONNECTORS
from medm.connectors.base import Connector
from medm.types import VisionFeatures

IN_DIM, OUT_DIM = 16, 24
NOT_FOR_CONSTRUCTORS = {"name", "path"}
TOLD_BY_COMPOSITION = {"in_dim", "out_dim", "grid", "prefix"}

TINY_CONNECTORS: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {"depth": 2},
    "spatial-pooling": {"pool": 2},
    "attention-pooling": {"queries": 3, "heads": 4},
    "resample": {"method": "projection", "window": 2},
    "pixel-shuffle": {"window": 2},
    "moe": {
        "num_experts": 3,
        "route_by": "task+token",
        "tasks": ["a", "b"],
        "router_dim": 8,
        "task_dim": 4,
    },
}


def build_connector(name: str, grid: tuple[int, ...], prefix: int = 0, **options: Any) -> Connector:
    block = CONNECTORS.entry(name).options.model_validate(
        {"name": name, **TINY_CONNECTORS.get(name, {}), **options}
    )
    return CONNECTORS.get(name)(
        in_dim=IN_DIM,
        out_dim=OUT_DIM,
        grid=grid,
        prefix=prefix,
        **block.model_dump(exclude=NOT_FOR_CONSTRUCTORS),
    )


def features_on(
    grid: tuple[int, ...], prefix: int = 0, batch: int = 2, seed: int = 0
) -> VisionFeatures:
    generator = torch.Generator().manual_seed(seed)
    return VisionFeatures(
        torch.randn(batch, prefix + prod(grid), IN_DIM, generator=generator), grid, prefix
    )
