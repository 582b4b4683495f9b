"""The table of kinds of model: one line a kind, its class imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medm.config import Options
from medm.models.lvlm.options import LVLMOptions
from medm.registry import Registry

if TYPE_CHECKING:
    from medm.models.base import ModelKind

MODELS: Registry[type[ModelKind]] = Registry("model kind", group="medm.models")

MODELS.add(
    "lvlm",
    "medm.models.lvlm.build:LVLM",
    "encoder, connector and LLM: answers in text",
    options=LVLMOptions,
)


def kind_of(options: Options) -> ModelKind:
    """Return the kind of model that a recipe's `model` section names."""
    return MODELS.get(options.model_dump()["kind"])()
