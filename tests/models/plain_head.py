"""A mask head as another package brings it: one convolution, and a dot product with the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from medm.heads import HEADS, HeadOptions
from medm.heads.base import Maps, MaskHead, MaskLogits, Points
from medm.types import Config, Kind

NAME = "test-plain"


class PlainOptions(HeadOptions):
    """Options of the head."""

    image_size: int | None = None
    """Side of the square input."""


class PlainHead(MaskHead):
    """Features at every second pixel; a mask is where they agree with the prompt."""

    kinds: ClassVar[frozenset[Kind]] = frozenset({"image", "volume"})

    def __init__(self, *, architecture: Mapping[str, int]) -> None:
        super().__init__()
        self.dim = architecture.get("dim", 6)
        conv = nn.Conv3d if architecture.get("axes") == 3 else nn.Conv2d
        self.encoder = conv(3 if conv is nn.Conv2d else 1, self.dim, 2, stride=2)
        self.decoder = nn.Linear(self.dim, self.dim)
        self.encoded = 0

    @classmethod
    def preprocess_from(
        cls,
        published: Mapping[str, object],
        architecture: Mapping[str, object],
        image_size: int | list[int] | None = None,
    ) -> Config:
        if architecture.get("axes") == 3:
            return {"size": [8, 8, 8], "windows": [[-1000.0, 1000.0]]}
        return {"size": [image_size or 16, image_size or 16]}

    def grid(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(side // 2 for side in spatial)

    def encode(self, pixels: Tensor) -> Maps:
        self.encoded += len(pixels)
        return (self.encoder(pixels),)

    def decode(
        self, maps: Maps, prompts: Tensor, items: Tensor, points: Points | None = None
    ) -> MaskLogits:
        if points is not None:
            raise ValueError(f"{NAME} takes no points")
        logits = torch.einsum("md,md...->m...", self.decoder(prompts), maps[0][items])
        peak = logits.flatten(1).amax(1)
        return MaskLogits(logits, peak.sigmoid(), peak)


@contextmanager
def registered() -> Iterator[str]:
    """Register the head for a while, and give its name."""
    with HEADS.temporary():
        HEADS.add(NAME, PlainHead, "for tests", options=PlainOptions)
        yield NAME
