"""Models: how parts are put together, saved and loaded. Knows nothing of paths, DeepSpeed or task names.

One line a kind of model. A kind is a function that turns its section of a recipe into a model and its
processor; `load` opens what any of them saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from medm.config import Options
from medm.models.lvlm.options import LVLMOptions
from medm.registry import Registry

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from medm.models.base import MedmModel

    Built: TypeAlias = tuple[MedmModel, ProcessorMixin]

MODELS: Registry[Callable[[Any], Built]] = Registry("model kind", group="medm.models")

MODELS.add("lvlm", "medm.models.lvlm.build:build", "encoder, connector and LLM: answers in text", options=LVLMOptions)


def build(options: Options, *, init_from: str | None = None) -> Built:
    """The model that a recipe's `model` section describes, and its processor.

    Args:
        options: the section; its `kind` chooses the builder.
        init_from: a folder that medm saved. Its weights are the start instead of the published ones, with any
            adapter that they hold, and its parts must be the ones that the section names. Chat template and
            preprocessing are the saved ones but for what the section writes.

    Raises:
        RecipeError: parts that do not fit each other, or `init_from` holds other parts.
        CheckpointError: weights that do not fit, or are damaged.
    """
    kind = options.model_dump()["kind"]
    if init_from is None:
        return MODELS.get(kind)(options)
    model, processor = load(init_from)
    model.check_same_parts(options, source=init_from)
    return model, model.follow(options, processor)


def load(folder: str) -> Built:
    """A model folder that medm saved: model and processor, in the precision they were saved in.

    Raises:
        CheckpointError: no such folder, not a medm model, damaged, or tensors are missing, unexpected or misshaped.
    """
    from medm.models.checkpoint import open_saved

    return open_saved(folder)
