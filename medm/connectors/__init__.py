"""Connectors: from vision tokens to tokens of the LLM's width.

The table at the end has one line per member.

To add one, write a file with a `Connector` and a line here. Its options stand above the table and
are torch-free, so that a recipe can be checked without loading model code. They hold the only
description of each option: constructors take the same names and defaults as keywords, and a test
over all registries compares the two.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from medm.config import Options
from medm.registry import Registry
from medm.types import Config

if TYPE_CHECKING:
    from medm.connectors.base import Connector


Activation: TypeAlias = Literal["gelu", "gelu_pytorch_tanh", "relu", "silu"]
Method: TypeAlias = Literal["projection", "average", "max"]
Gate: TypeAlias = Literal["soft", "sparse", "hard", "constant"]
RouteBy: TypeAlias = Literal["token", "task", "task+token"]
Mode: TypeAlias = Literal["corrected", "paper"]
UnseenTask: TypeAlias = Literal["error", "mean", "constant"]
PixelShuffleVersion: TypeAlias = Literal["v1", "v2"]


_LOG = logging.getLogger(__name__)
_OLDER_MODES = {"sound": "corrected", "published": "paper"}
"""Values of `mode` in recipes and model folders of earlier versions to those of this one."""


@functools.cache
def _warn_older_mode(older: str, mode: str) -> None:
    _LOG.warning("moe: mode %r is now called %r; the older name still works", older, mode)


def _current_mode(value: object) -> object:
    """Return the value of `mode` with an older name replaced, after a warning."""
    if isinstance(value, str) and value in _OLDER_MODES:
        _warn_older_mode(value, _OLDER_MODES[value])
        return _OLDER_MODES[value]
    return value


def upgrade_config(config: Config) -> Config:
    """Return the config of a connector, as a model folder holds it, with current option values."""
    older = config.get("mode")
    if config.get("name") == "moe" and isinstance(older, str):
        return {**config, "mode": _OLDER_MODES.get(older, older)}
    return config


class ConnectorOptions(Options):
    """Options of every connector. The composition gives widths and grids."""

    name: str
    """Registered name of the connector."""
    path: str | None = None
    """Weights of a connector trained elsewhere (LLaVA, TinyLLaVA, MedM-VL projector files); random
    without it."""


class MLPOptions(ConnectorOptions):
    """Connectors that end in an MLP to the LLM's width."""

    depth: int = Field(default=2, ge=1)
    """Number of linear layers, with an activation between them."""
    activation: Activation = "gelu"
    """Activation between the layers, by its transformers name."""


class SpatialPoolingOptions(MLPOptions):
    """Average pooling over the grid, then an MLP."""

    pool: int | list[int] = 2
    """Side of a window in cells: one number, or one for each axis of the grid. Where it does not
    divide the grid, the last window averages the cells that are left."""


class AttentionPoolingOptions(MLPOptions):
    """Learned queries over all tokens, then an MLP."""

    queries: int | None = Field(default=None, ge=1)
    """Number of queries, which is the number of tokens for the LLM. Default: one for each cell of
    the last two grid axes, so that a volume takes as many tokens as one of its slices."""
    heads: int = Field(default=8, ge=1)
    """Attention heads; must divide the encoder's width."""


class ResampleOptions(MLPOptions):
    """One token for each window of tokens, then an MLP."""

    method: Method = "projection"
    """Reduction of a window: its tokens side by side on the channel axis, their average, or their
    maximum."""
    window: int | list[int] = 2
    """Side of a window in cells: one number, or one for each axis. Uni-Med's strips of a row are
    [1, 4]."""


class PixelShuffleOptions(MLPOptions):
    """Squares of tokens side by side on the channel axis, layer norm, then an MLP."""

    window: int | list[int] = 2
    """Side of a square in cells: one number, or one for each axis. 2 is InternVL's
    `downsample_ratio` of 0.5."""
    version: PixelShuffleVersion = "v2"
    """InternVL's `ps_version`: `v2` keeps the rows of the grid (InternVL 1.2 and later); `v1`
    exchanges rows and columns of the tokens, as the first release did."""


class MoEOptions(MLPOptions):
    """Mixture of experts with a router.

    `depth` and `activation` are those of each expert; depth 1 gives linear experts.
    """

    num_experts: int = Field(default=5, ge=1)
    """Number of experts."""
    gate: Gate = "soft"
    """`soft` weighs all experts; `sparse` runs only the `top_k` best; `hard` runs the expert at the
    position of the task; `constant` averages all (the dense baseline of equal size)."""
    route_by: RouteBy = "token"
    """Input of a learned gate: the visual token, a learned token of the task, or both."""
    mode: Annotated[Mode, BeforeValidator(_current_mode)] = "corrected"
    """`corrected`: softmax, narrow router and load-balance loss. `paper`: Uni-Med's formulas:
    normalized sigmoids, a router four times as wide as its input, no auxiliary loss. The older
    names `sound` and `published` still work."""
    top_k: int = Field(default=2, ge=1)
    """Experts per token under `gate: sparse`."""
    tasks: list[str] = []
    """Names of the tasks in the order of their ids; filled from `model.tasks`."""
    unseen_task: UnseenTask = "error"
    """Handling of an item with another task: an error, the mean of the known tasks, or the mean of
    all experts."""
    task_dim: int | None = Field(default=None, ge=1)
    """Width of a task token. Default: that of a visual token (`paper`) or 64
    (`corrected`)."""
    router_dim: int | None = Field(default=None, ge=1)
    """Hidden width of the router. Default: four times its input (`paper`) or 256
    (`corrected`)."""
    resample: Literal["none"] | Method = "none"
    """Reduction of windows of tokens to one token each before the experts, as in the `resample`
    connector."""
    window: int | list[int] = 2
    """Side of such a window in cells: one number, or one for each axis."""


CONNECTORS: Registry[type[Connector]] = Registry(
    "connector", group="medm.connectors", options=ConnectorOptions
)

CONNECTORS.add(
    "linear",
    "medm.connectors.mlp:LinearConnector",
    "one linear layer per token (LLaVA 1.0, MiniGPT-4)",
)
CONNECTORS.add(
    "mlp",
    "medm.connectors.mlp:MLPConnector",
    "linear layers with an activation between (LLaVA 1.5, TinyLLaVA, MedM-VL)",
    options=MLPOptions,
)
CONNECTORS.add(
    "spatial-pooling",
    "medm.connectors.pooling:SpatialPoolingConnector",
    "averages of neighboring tokens, then an MLP (M3D-LaMed, MedM-VL-CT)",
    options=SpatialPoolingOptions,
)
CONNECTORS.add(
    "attention-pooling",
    "medm.connectors.pooling:AttentionPoolingConnector",
    "learned queries over all tokens, then an MLP (MedM-VL-CT-Chest)",
    options=AttentionPoolingOptions,
)
CONNECTORS.add(
    "resample",
    "medm.connectors.resample:ResampleConnector",
    "windows of tokens side by side, averaged or their maximum, then an MLP (MiniGPT-v2, Uni-Med)",
    options=ResampleOptions,
)
CONNECTORS.add(
    "pixel-shuffle",
    "medm.connectors.pixel_shuffle:PixelShuffleConnector",
    "squares of tokens side by side, layer norm, then an MLP (InternVL, Sa2VA, UniBiomed)",
    options=PixelShuffleOptions,
)
CONNECTORS.add(
    "moe",
    "medm.connectors.moe:MoEConnector",
    "mixture of expert MLPs, routed by token, task or both (Uni-Med)",
    options=MoEOptions,
)
