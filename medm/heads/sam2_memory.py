"""Masks of a volume by SAM 2's memory: slices are the frames of a video (arXiv 2408.00714)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from medm.errors import RecipeError
from medm.heads.base import Maps, MaskLogits
from medm.heads.sam2_memory_modules import Decoded, Sam2MemoryModules, SliceMemory

ABSENT_LOGIT = -1024.0
"""Logit of a blanked mask, Meta's."""


class MemoryDecoder(Protocol):
    """Decoder of a head whose masks are carried."""

    @property
    def memory(self) -> Sam2MemoryModules | None:
        """Modules of the memory; None without one."""
        ...

    @property
    def no_memory_embedding(self) -> Tensor:
        """(1, 1, dim), added to slices that no memory conditions."""
        ...


class MemoryHead(Protocol):
    """The methods of `medm.heads.sam2.Sam2Head` that the memory calls."""

    dim: int

    @property
    def decoder(self) -> MemoryDecoder:
        """See `Sam2Head`."""
        ...

    def fine_levels(self, maps: Maps) -> list[Tensor]:
        """See `Sam2Head`."""
        ...

    def decode_levels(
        self,
        fine: list[Tensor],
        coarse: Tensor,
        prompts: Tensor | None,
        *,
        mask: Tensor | None = None,
        multimask: bool | None = None,
    ) -> Decoded:
        """See `Sam2Head`."""
        ...


@dataclass(slots=True)
class _Target:
    """What is known of a target that is followed."""

    conditioning: Mapping[int, Tensor]
    known: dict[int, SliceMemory] = field(default_factory=dict)
    """Memories of conditioning slices."""
    tracked: dict[int, SliceMemory] = field(default_factory=dict)
    """Memories of slices decoded from memory."""
    logits: dict[int, Tensor] = field(default_factory=dict)
    presence: dict[int, Tensor] = field(default_factory=dict)

    @property
    def first(self) -> int:
        """First conditioning slice, from which the target is followed both ways."""
        return min(self.conditioning)

    def forget(self, index: int, *, step: int, reach: int) -> None:
        """Release the memory of a slice that no later one attends to.

        Args:
            index: of the slice that was decoded last.
            step: 1 forward, -1 backward.
            reach: slices that one attends to.
        """
        old = index - step * reach
        if step < 0 or old > self.first + reach:  # the way back begins with those behind the first
            self.tracked.pop(old, None)

    def note(self, index: int, masks: MaskLogits) -> None:
        """Store the mask of a slice in host memory."""
        self.logits[index] = masks.logits[0].float().cpu()
        self.presence[index] = masks.presence[0].float().cpu()


class Sam2Memory:
    """Carries the masks of targets through the slices of a volume.

    The defaults are UniBiomed's and Sa2VA's: masks of prompted slices enter the memory as
    probabilities, and a low presence score blanks no mask. `binarize` and `blank_absent` are what
    `Sam2VideoModel` and Meta's predictor do after clicks. The mask of a slice with its own prompt
    is decoded without memory.

    Args:
        head: with memory.
        binarize: masks of conditioning slices enter the memory as 0 and 1.
        blank_absent: a presence score of 0 or less empties the mask.
        dtype: of the stored memories; bfloat16 halves them, as the published predictors do.
            Default: that of the weights.

    Raises:
        RecipeError: the head has no memory.
    """

    def __init__(
        self,
        head: MemoryHead,
        *,
        binarize: bool = False,
        blank_absent: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        memory = head.decoder.memory
        if memory is None:
            raise RecipeError(
                "3-D mode memory: the head was built without memory weights; set memory: true in "
                "the block of the head, with the weights of a SAM 2 video model (every .pt file of "
                "Meta, and the Hugging Face folders of type sam2_video), or choose mode slices"
            )
        self.head, self.memory = head, memory
        self.binarize, self.blank_absent, self.dtype = binarize, blank_absent, dtype

    @torch.no_grad()
    def propagate(
        self,
        maps_of: Callable[[int], Maps],
        num_slices: int,
        conditioning: Sequence[Mapping[int, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Follow the targets; see `MaskMemory.propagate`.

        From the first conditioning slice of a target to the last slice, then from there back to
        slice 0. A slice attends to all conditioning slices, to the slices decoded before it (6 of
        them) and to the object pointers of the slices behind it. A mask that is given stays as it
        is. All targets are followed together, so that the maps of a slice are asked for at most
        three times, whatever their number.
        """
        config = self.memory.config
        reach = max(config.num_maskmem, config.max_object_pointers_in_encoder)
        targets = [_Target(given) for given in conditioning]
        for target in targets:
            _check(target.conditioning, num_slices, dim=self.head.dim)
        for index in sorted({index for target in targets for index in target.conditioning}):
            maps = maps_of(index)
            for target in targets:
                if index in target.conditioning:
                    masks, memory = self._condition(maps, index, target.conditioning[index])
                    target.note(index, masks)
                    target.known[index] = memory
        for step in (1, -1):
            for index in range(num_slices)[::step]:
                ahead = [
                    target
                    for target in targets
                    if step * (index - target.first) > 0 and index not in target.known
                ]
                if not ahead:
                    continue
                maps = maps_of(index)
                for target in ahead:
                    masks, memory = self._track(
                        maps, index, target, step=step, num_slices=num_slices
                    )
                    target.note(index, masks)
                    target.tracked[index] = memory
                    target.forget(index, step=step, reach=reach)
        slices = range(num_slices)
        return (
            torch.stack([torch.stack([t.logits[i] for t in targets]) for i in slices]),
            torch.stack([torch.stack([t.presence[i] for t in targets]) for i in slices]),
        )

    def _condition(self, maps: Maps, index: int, given: Tensor) -> tuple[MaskLogits, SliceMemory]:
        head, coarse = self.head, maps[-1]
        fine = head.fine_levels(maps)
        given = given.to(coarse)
        if given.ndim == 1:
            alone = coarse + head.decoder.no_memory_embedding.view(1, -1, 1, 1)
            masks, token = head.decode_levels(fine, alone, given.unsqueeze(0))
            return self._keep(coarse, masks, token, binarize=self.binarize)

        grid = tuple(maps[0].shape[-2:])
        if tuple(given.shape) != grid:
            raise ValueError(_expected(index, given, dim=head.dim, grid=grid))
        # A mask that is given needs no decoding; the decoder runs for its object pointer.
        whole = (_to_image(given[None, None]) > 0).to(coarse.dtype)
        prompt = self.memory.mask_downsample(whole)
        decoded = head.decode_levels(fine, coarse, None, mask=prompt, multimask=True)
        present = decoded.masks.presence > 0
        pointer = self.memory.pointer(decoded.token, present)
        visible = whole.flatten(1).any(dim=1)
        pointer = torch.where(visible.unsqueeze(1), pointer, self.memory.no_object_pointer)
        presence = torch.where(visible, 10.0, -10.0).to(coarse.dtype)
        masks = MaskLogits(given.unsqueeze(0), torch.ones_like(presence), presence)
        features, positions = self.memory.remember(coarse, whole, visible, self.dtype)
        return masks, SliceMemory(features, positions, pointer)

    def _track(
        self, maps: Maps, index: int, target: _Target, *, step: int, num_slices: int
    ) -> tuple[MaskLogits, SliceMemory]:
        """Decode a slice from memory alone.

        Args:
            maps: of the slice.
            index: of the slice.
            target: that is followed.
            step: 1 forward, -1 backward.
            num_slices: of the volume.
        """
        config, known, tracked = self.memory.config, target.known, target.tracked
        memories = [(0, memory) for memory in known.values()]
        memories += [
            (distance, tracked[index - step * distance])
            for distance in range(config.num_maskmem - 1, 0, -1)
            if index - step * distance in tracked
        ]
        # A pointer to a slice that lies ahead would tell of what has not been seen.
        pointers = [
            (step * (index - place), memory.pointer)
            for place, memory in known.items()
            if step * (index - place) >= 0
        ]
        pointers += [
            (distance, tracked[index - step * distance].pointer)
            for distance in range(1, min(num_slices, config.max_object_pointers_in_encoder))
            if index - step * distance in tracked
        ]
        coarse = maps[-1]
        sines = self.memory.image_positions(coarse)
        conditioned = self.memory.attend(coarse, sines, memories, pointers, num_slices)
        masks, token = self.head.decode_levels(self.head.fine_levels(maps), conditioned, None)
        return self._keep(coarse, masks, token, binarize=False)

    def _keep(
        self, coarse: Tensor, masks: MaskLogits, token: Tensor, *, binarize: bool
    ) -> tuple[MaskLogits, SliceMemory]:
        present = masks.presence > 0
        if self.blank_absent:
            blank = torch.where(present[:, None, None], masks.logits, ABSENT_LOGIT)
            masks = masks._replace(logits=blank)
        whole = _to_image(masks.logits.unsqueeze(1))
        mask = (whole > 0).to(whole.dtype) if binarize else whole.sigmoid()
        features, positions = self.memory.remember(coarse, mask, present, self.dtype)
        return masks, SliceMemory(features, positions, self.memory.pointer(token, present))


def _to_image(logits: Tensor) -> Tensor:
    """Interpolate (1, 1, *grid) to the pixels, four a cell and axis."""
    whole = F.interpolate(logits.float(), scale_factor=4, mode="bilinear", align_corners=False)
    return whole.to(logits.dtype)


def _check(conditioning: Mapping[int, Tensor], num_slices: int, *, dim: int) -> None:
    """Raise `ValueError` for conditioning that no slice of the volume can take."""
    if not conditioning:
        raise ValueError("memory: no conditioning slice; give the prompt or mask of at least one")
    for index, given in conditioning.items():
        if not 0 <= index < num_slices:
            raise ValueError(f"memory: conditioning slice {index} of a volume of {num_slices}")
        if given.ndim not in (1, 2) or (given.ndim == 1 and len(given) != dim):
            raise ValueError(_expected(index, given, dim=dim, grid="of the grid"))


def _expected(index: int, given: Tensor, *, dim: int, grid: object) -> str:
    return (
        f"memory, slice {index}: expected a prompt ({dim},) or logits {grid}, found "
        f"{tuple(given.shape)}"
    )
