"""Interface of mask heads. Heads depend on no data set, token or loss."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from medm.errors import RecipeError
from medm.types import Config, Kind

Maps = tuple[Tensor, ...]
"""Features of N images or volumes, each tensor (N, ...): what a head keeps of its input."""


class MaskLogits(NamedTuple):
    """Output of a head for M prompts. It is a tuple, because ZeRO-3 finds tensors in tuples."""

    logits: Tensor
    """(M, *grid); the mask is where they are above 0."""
    quality: Tensor
    """(M,), predicted IoU of each mask, about 0..1."""
    presence: Tensor
    """(M,), logit of the target being in the image at all."""


class Points(NamedTuple):
    """Points beside a language prompt, as SAM takes them."""

    coords: Tensor
    """(M, P, axes), in voxels of the input (rows, columns) or (depth, rows, columns)."""
    labels: Tensor
    """(M, P) int64: 1 inside, 0 outside, 2 and 3 the first and last corner of a box, -1 padding."""


def zero_of(weights: Iterable[Tensor]) -> Tensor:
    """Return zero that depends on weights that a batch leaves unused.

    DDP waits for the gradient of every weight. ZeRO-3 does not; the weights that it holds in shards
    are empty outside of their modules, take no gradient there, and are left out.
    """
    sums = [weight.sum() for weight in weights if weight.numel()]
    return 0.0 * torch.stack(sums).sum() if sums else torch.zeros(())


class MaskMemory(Protocol):
    """Follows targets through the slices of a volume."""

    def propagate(
        self,
        maps_of: Callable[[int], Maps],
        num_slices: int,
        conditioning: Sequence[Mapping[int, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Return the masks of every slice, of all targets.

        Args:
            maps_of: gives the maps of a slice, (1, ...) each. It is asked for one slice at a time,
                so that a volume's maps need not lie in memory together.
            num_slices: of the volume, S.
            conditioning: of each of M targets, by slice, the prompt (D,), or a mask as logits
                (*grid).

        Returns:
            Logits (S, M, *grid) and presence (S, M), a logit, float32 in host memory.

        Raises:
            ValueError: a target without conditioning, or with one of another slice or shape.
        """
        ...


class MaskHead(nn.Module, metaclass=ABCMeta):
    """Pixels (N, C, *spatial) and prompts (M, D) to M masks.

    An image is encoded once, whatever the number of its masks: `items` names the image of each
    prompt, so that prompts of all images lie on one ragged axis.

    A subclass is built from plain values alone: `architecture`, a JSON-able mapping of sizes, and
    the fields of its options class other than `name`, `path`, `architecture` and `image_size`.
    Building is offline and random. A subclass without an abstract method raises `TypeError` when it
    is constructed.

    Every parameter lies in `encoder` or `decoder`, the two units that a recipe freezes or trains.
    Work that depends on decoder weights is done in `decode`, so that maps of a frozen encoder can
    be kept.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"image"})
    """Kinds of file that it reads."""
    key_map: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Published tensor names to own names: (regular expression, replacement), the first that
    matches wins."""
    ignored_keys: ClassVar[tuple[str, ...]] = ()
    """Regular expressions of published tensors that this head does not use."""

    dim: int
    """Width D of a prompt."""
    channels: tuple[int, ...] = ()
    """Accepted numbers of input channels; empty if any number is accepted."""
    encoder: nn.Module
    decoder: nn.Module

    @classmethod
    def architecture_from(cls, published: Mapping[str, object]) -> Config:
        """Return own `architecture` from the published `config.json`; empty if there is none."""
        return dict(published)

    @classmethod
    def architecture_for(cls, kind: Kind, architecture: Mapping[str, object]) -> Config:
        """Complete the sizes of a head that reads several kinds of file by the one it is used for.

        The default changes nothing. Raises `RecipeError` where they disagree.
        """
        return dict(architecture)

    @classmethod
    @abstractmethod
    def preprocess_from(
        cls,
        published: Mapping[str, object],
        architecture: Mapping[str, object],
        image_size: int | list[int] | None = None,
    ) -> Config:
        """Return the preprocessing fields (`medm.imaging`) of a published head, without `kind`.

        Args:
            published: content of `preprocessor_config.json`, or empty.
            architecture: own sizes.
            image_size: option of the recipe.
        """
        raise NotImplementedError(f"mask head class {cls.__name__} defines no preprocess_from")

    @abstractmethod
    def grid(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """Return the grid of the logits for an input of this spatial size, by arithmetic only.

        The faces of both grids coincide. Raises `ValueError` when the size does not fit.
        """

    @abstractmethod
    def encode(self, pixels: Tensor) -> Maps:
        """Return the maps of (N, C, *spatial), by weights of `encoder` alone."""

    @abstractmethod
    def decode(
        self, maps: Maps, prompts: Tensor, items: Tensor, points: Points | None = None
    ) -> MaskLogits:
        """Return one mask for each prompt.

        Args:
            maps: of N items.
            prompts: (M, D), M may be any number from 1 on.
            items: (M,) int64, the item in `maps` of each prompt.
            points: beside the prompts, for heads that take them.

        Raises:
            ValueError: points for a head that takes none.
        """

    def forward(
        self, pixels: Tensor, prompts: Tensor, items: Tensor, points: Points | None = None
    ) -> MaskLogits:
        """Encode and decode; without gradient book-keeping in a frozen encoder."""
        frozen = not any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            maps = self.encode(pixels)
        return self.decode(maps, prompts, items, points)

    def memory(self) -> MaskMemory:
        """Return the memory of the head, for the 3-D mode `memory`.

        Raises:
            RecipeError: the head has none.
        """
        raise RecipeError(
            f"3-D mode memory: {type(self).__name__} has no memory; use the head sam2 with memory: "
            "true in its block, or the mode slices"
        )

    def rename_published(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Rename published tensors to the names that `key_map` reads.

        The default changes nothing. Raises `CheckpointError` for a file of another model.
        """
        return tensors
