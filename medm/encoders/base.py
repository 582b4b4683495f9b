"""Interface of encoders. Encoders do not depend on LLMs, prompts, files or learning rates."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Mapping
from math import prod
from typing import ClassVar, TypedDict

import torch
from torch import Tensor, nn

from medm.types import Config, VisionFeatures


class DeviceAndDtype(TypedDict):
    """Device and precision of an encoder's weights."""

    device: torch.device
    dtype: torch.dtype


class VisionEncoder(nn.Module, metaclass=ABCMeta):
    """Pixels (B, C, *spatial) to tokens on a grid.

    A subclass without one of the abstract methods raises `TypeError` when it is constructed.

    A subclass is built from plain values alone: `architecture`, a JSON-able mapping of sizes, and
    the fields of its options class other than `name`, `path`, `architecture` and `image_size`.
    Building is offline and random; reading published files is `medm.models.published.weights`,
    which calls the three translations below.
    """

    axes: ClassVar[int] = 2
    """Spatial axes of the input: 2 for images (rows, columns), 3 for volumes (depth, rows,
    columns)."""

    key_map: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Published tensor names to own names: (regular expression, replacement), the first that
    matches wins."""

    ignored_keys: ClassVar[tuple[str, ...]] = ()
    """Regular expressions of published tensors that this encoder does not use (a text tower, a
    pooling head)."""

    truncated_keys: ClassVar[tuple[str, ...]] = ()
    """Regular expressions of own names that a published file may have beyond this instance (blocks
    after the layer)."""

    dim: int
    """Width of a token."""
    pooled_dim: int | None = None
    """Width of the pooled vector; None without one."""
    channels: tuple[int, ...] = ()
    """Accepted numbers of input channels; empty if any number is accepted."""
    prefix: int = 0
    """Number of tokens in front of the grid that have no position (a class token)."""
    can_drop_patches: ClassVar[bool] = False
    """True where the forward calls `sample_patches`."""
    patch_dropout: float = 0.0
    """Fraction of the patches that are left out in training. The grid of the features is then
    (kept patches,)."""

    @property
    def inner(self) -> VisionEncoder | None:
        """Encoder that this one runs, kept as `encoder`, which owns the weights.

        None if this encoder has its own weights.
        """
        encoder = getattr(self, "encoder", None)
        return encoder if isinstance(encoder, VisionEncoder) else None

    @classmethod
    def architecture_from(cls, published: Mapping[str, object]) -> Config:
        """Return own `architecture` from the published `config.json`.

        The mapping is empty if there is none.
        """
        return dict(published)

    @classmethod
    @abstractmethod
    def preprocess_from(
        cls,
        published: Mapping[str, object],
        architecture: Mapping[str, object],
        image_size: int | None = None,
    ) -> Config:
        """Return the preprocessing fields (`medm.imaging`) of a published encoder.

        They are read from `preprocessor_config.json`.
        """
        # A recipe is resolved with the class alone, before the check of abstract methods.
        raise NotImplementedError(f"encoder class {cls.__name__} defines no preprocess_from")

    @abstractmethod
    def grid(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """Return the token grid of an input of this spatial size, by arithmetic only.

        Raises `ValueError` when the size does not fit.
        """

    @abstractmethod
    def forward(self, pixels: Tensor) -> VisionFeatures:
        """pixels: (B, C, *spatial), normalized as `preprocess_from` says."""

    def sample_patches(self, tokens: Tensor, *, prefix: int) -> Tensor:
        """Leave out a random part of the patches of each item, in training alone.

        As in FLIP (arXiv 2212.00794) and open_clip: every item keeps the same number, at least one.

        Args:
            tokens: (B, prefix + patches, D), positions included.
            prefix: tokens in front that are always kept.

        Returns:
            (B, prefix + kept, D), in the order of the grid.
        """
        if not self.training or not self.patch_dropout:
            return tokens
        rows, patches = len(tokens), tokens.shape[1] - prefix
        kept = max(1, int(patches * (1 - self.patch_dropout)))
        order = torch.rand(rows, patches, device=tokens.device).argsort(dim=1)
        chosen = prefix + order[:, :kept].sort(dim=1).values  # (B, kept)
        front = torch.arange(prefix, device=tokens.device).expand(rows, -1)
        index = torch.cat([front, chosen], dim=1).unsqueeze(-1)  # (B, prefix + kept, 1)
        return tokens.gather(1, index.expand(-1, -1, tokens.shape[2]))

    def grid_of(self, spatial: tuple[int, ...], patches: int) -> tuple[int, ...]:
        """Return the grid of features that were made of some or all patches of an input.

        Args:
            spatial: size of the input.
            patches: those that were not left out.
        """
        grid = self.grid(spatial)
        return grid if prod(grid) in (0, patches) else (patches,)

    def rename_published(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Rename published tensors to the names that `key_map` reads.

        The default changes nothing.
        """
        return tensors

    @property
    def device_and_dtype(self) -> DeviceAndDtype:
        """Return keywords for inputs beside the weights.

        For example `torch.zeros(..., **encoder.device_and_dtype)`.
        """
        parameter = next(self.parameters())
        return {"device": parameter.device, "dtype": parameter.dtype}
