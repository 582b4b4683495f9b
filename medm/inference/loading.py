"""Saved models on a device, ready for inference: adapters merged, frozen, in eval mode."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from medm.errors import CheckpointError

if TYPE_CHECKING:
    from medm.models.base import MedmModel
    from medm.types import Processor

ModelT = TypeVar("ModelT", bound="MedmModel")


def load_model(
    folder: str, model_class: type[ModelT], *, refusal: str, device: torch.device, dtype: str
) -> tuple[ModelT, Processor]:
    """Load the model of a folder onto a device, and its processor.

    Args:
        folder: that medm saved.
        model_class: class that the model has to be of.
        refusal: for the message about another class: what it does not do, and what is expected.
        device: of the weights.
        dtype: precision of the weights; `saved` keeps that of the folder.

    Raises:
        CheckpointError: see `medm.models.load`; or the model is of another class, which is known
            before weights are read.
    """
    from medm.models import kind_of_config, load, load_config

    transformers_logging.disable_progress_bar()
    found = kind_of_config(load_config(folder)).model_class
    if not issubclass(found, model_class):
        raise CheckpointError(f"{folder}: holds a {found.__name__}, which {refusal}")
    model, processor = load(folder)
    assert isinstance(model, model_class)
    model.merge_adapters()
    nn.Module.to(model, device=device, dtype=None if dtype == "saved" else getattr(torch, dtype))
    model.requires_grad_(False)
    model.eval()
    return model, processor
