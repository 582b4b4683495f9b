"""The table of kinds of model: one line a kind, its class imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medm.errors import CheckpointError
from medm.models.blip.options import BlipOptions
from medm.models.dual_encoder.options import DualEncoderOptions
from medm.models.lvlm.options import LVLMOptions
from medm.models.options import ModelOptions
from medm.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from medm.models.base import ModelKind

MODELS: Registry[type[ModelKind]] = Registry("model kind", group="medm.models")

MODELS.add(
    "lvlm",
    "medm.models.lvlm.build:LVLM",
    "encoder, connector and LLM: answers in text",
    options=LVLMOptions,
)
MODELS.add(
    "dual-encoder",
    "medm.models.dual_encoder.build:DualEncoderKind",
    "image and text encoder with one space (CLIP, SigLIP): vectors and scores",
    options=DualEncoderOptions,
)
MODELS.add(
    "blip",
    "medm.models.blip.build:BlipKind",
    "image and text encoder with cross-attention and tied decoder (BLIP, MOTOR): contrast, "
    "matching, reports, labels",
    options=BlipOptions,
)


def kind_of(options: ModelOptions) -> ModelKind:
    """Return the kind of model that a recipe's `model` section names."""
    return MODELS.get(options.kind)()


def outputs_of(options: ModelOptions) -> frozenset[str]:
    """Return the fields that the output of this model has in training (`ModelKind.outputs`)."""
    fields = options.output_fields()
    return kind_of(options).outputs if fields is None else fields


def kind_of_config(config: PreTrainedConfig) -> ModelKind:
    """Return the kind of model that a saved config belongs to.

    Raises:
        CheckpointError: no kind of the table has its `model_type`.
    """
    for name in MODELS.names():
        kind = MODELS.get(name)()
        if kind.config_class.model_type == config.model_type:
            return kind
    raise CheckpointError(
        f"no kind of model saves folders of type {config.model_type!r}; expected one of "
        f"{', '.join(MODELS.names())}, or a kind of your own by 'medm --plugin FILE'"
    )
