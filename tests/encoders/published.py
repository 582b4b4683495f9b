"""Loading a published state dict into an encoder, strictly, through the tables of its class."""

from __future__ import annotations

from torch import Tensor

from medm.encoders.base import VisionEncoder
from medm.models.published.weights import LoadReport, load_module


def load_published(encoder: VisionEncoder, tensors: dict[str, Tensor]) -> LoadReport:
    return load_module(
        encoder,
        tensors,
        source="test",
        key_map=encoder.key_map,
        ignored=encoder.ignored_keys,
        truncated=encoder.truncated_keys,
    )
