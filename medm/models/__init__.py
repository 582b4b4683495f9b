"""Models: how parts are put together, saved and loaded.

Knows nothing of paths, DeepSpeed or task names.

A kind of model (`medm.models.kinds` has the table) turns its section of a recipe into a model and
its processor (`medm.models.base.ModelKind`); `load` opens what any of them saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from medm.models.kinds import MODELS, kind_of, kind_of_config, outputs_of
from medm.models.options import ModelOptions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from medm.imaging import Preprocess
    from medm.models.base import MedmModel
    from medm.types import Processor

    Built: TypeAlias = tuple[MedmModel, Processor]

__all__ = [
    "MODELS",
    "build",
    "kind_of",
    "kind_of_config",
    "load",
    "load_config",
    "load_processor",
    "outputs_of",
    "preprocess_of",
    "processor_of",
]


def build(options: ModelOptions, *, init_from: str | None = None) -> Built:
    """The model that a recipe's `model` section describes, and its processor.

    Args:
        options: the section; its `kind` chooses the builder.
        init_from: a folder that medm saved. Its weights are the start instead of the published
            ones, with any adapter that they hold, and its parts must be the ones that the section
            names. Chat template and preprocessing are the saved ones but for what the section
            writes.

    Raises:
        RecipeError: parts that do not fit each other or this machine, or `init_from` holds other
            parts.
        CheckpointError: weights that do not fit, or are damaged.
    """
    kind = kind_of(options)
    kind.check(options)
    if init_from is None:
        return kind.build(options)
    model, processor = load(init_from)
    model.check_same_parts(options, source=init_from)
    return model, kind.adapt(options, processor, model=model)


def processor_of(options: ModelOptions, *, init_from: str | None = None) -> Processor:
    """Return the processor that `build` would give.

    Reads no weights if the kind of model can do without.

    Raises:
        RecipeError, CheckpointError: as `build`.
    """
    kind = kind_of(options)
    if init_from is None:
        return kind.processor(options)
    return kind.adapt(options, load_processor(init_from))


def preprocess_of(options: ModelOptions, *, init_from: str | None = None) -> dict[str, Preprocess]:
    """Return the preprocessing of the model that a recipe's section describes, by branch.

    Needs no language model.

    Raises:
        RecipeError, CheckpointError: as `build`.
    """
    if init_from is not None:
        return dict(processor_of(options, init_from=init_from).preprocess)
    return kind_of(options).preprocess(options)


def load(folder: str) -> Built:
    """A model folder that medm saved: model and processor, in the precision they were saved in.

    Raises:
        CheckpointError: no such folder, not a medm model, damaged, or tensors are missing,
            unexpected or misshaped.
    """
    from medm.models.checkpoint import open_saved

    return open_saved(folder)


def load_processor(folder: str) -> Processor:
    """The processor of a model folder, without its weights. Raises `CheckpointError`."""
    from medm.models.checkpoint import open_processor

    return open_processor(folder)


def load_config(folder: str) -> PreTrainedConfig:
    """The config of a model folder, without its weights.

    Raises:
        CheckpointError: no such folder, or not a medm model.
    """
    from medm.models.checkpoint import open_config

    return open_config(folder)
