"""Models: how parts are put together, saved and loaded. Knows nothing of paths, DeepSpeed or task names.

One line a kind of model. A kind is a function that turns its section of a recipe into a model and its
processor; `load` opens what such a model saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from medm.models.lvlm.options import LVLMOptions
from medm.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    Built: TypeAlias = tuple[PreTrainedModel, ProcessorMixin]

MODELS: Registry[Callable[[Any], Built]] = Registry("model kind", group="medm.models")

MODELS.add("lvlm", "medm.models.lvlm.build:build", "encoder, connector and LLM: answers in text", options=LVLMOptions)
