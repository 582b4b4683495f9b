"""Masks of a volume by SAM 2's memory: slices are the frames of a video (arXiv 2408.00714)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from medm.errors import RecipeError
from medm.heads.base import Maps, MaskLogits
from medm.heads.sam2 import Sam2Head
from medm.heads.sam2_memory_modules import SliceMemory

ABSENT_LOGIT = -1024.0
"""Logit of a blanked mask, Meta's."""


class Sam2Memory:
    """Carries the mask of one target through the slices of a volume.

    The defaults are UniBiomed's and Sa2VA's: masks of prompted slices enter the memory as
    probabilities, and a low presence score blanks no mask. `binarize` and `blank_absent` are what
    `Sam2VideoModel` and Meta's predictor do after clicks. The mask of a slice with its own prompt
    is decoded without memory.

    Args:
        head: with memory.
        binarize: masks of conditioning slices enter the memory as 0 and 1.
        blank_absent: a presence score of 0 or less empties the mask.
        dtype: of kept memories; bfloat16 halves them, as the published predictors do. Default:
            that of the weights.

    Raises:
        RecipeError: the head has no memory.
    """

    def __init__(
        self,
        head: Sam2Head,
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
    def propagate(self, maps: Maps, conditioning: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mask of every slice.

        From the first conditioning slice to the last slice, then from there back to slice 0. A
        slice attends to all conditioning slices, to the slices decoded before it (6 of them) and to
        the object pointers of the slices behind it.

        Args:
            maps: of S slices, in order, as `Sam2Head.encode` gives them.
            conditioning: by slice either a prompt (D,), or a mask as logits (*grid), which is kept
                as it is.

        Returns:
            Logits (S, *grid) and presence (S,), a logit.

        Raises:
            ValueError: no conditioning, or one of another slice or shape.
        """
        num_slices = len(maps[0])
        _check(conditioning, num_slices, dim=self.head.dim, grid=tuple(maps[0].shape[-2:]))
        masks: dict[int, MaskLogits] = {}
        known: dict[int, SliceMemory] = {}
        tracked: dict[int, SliceMemory] = {}
        for index in sorted(conditioning):
            masks[index], known[index] = self._condition(maps, index, conditioning[index])
        first = min(known)
        for index in [*range(first + 1, num_slices), *range(first - 1, -1, -1)]:
            if index not in known:
                step = 1 if index > first else -1
                masks[index], tracked[index] = self._track(
                    maps, index, known, tracked, step=step, num_slices=num_slices
                )
        order = [masks[index] for index in range(num_slices)]
        return (
            torch.cat([mask.logits for mask in order]),
            torch.cat([mask.presence for mask in order]),
        )

    def _condition(self, maps: Maps, index: int, given: Tensor) -> tuple[MaskLogits, SliceMemory]:
        levels = tuple(level[index : index + 1] for level in maps)
        head, coarse = self.head, levels[-1]
        fine = head.fine_levels(levels)
        given = given.to(coarse)
        if given.ndim == 1:
            alone = coarse + head.decoder.no_memory_embedding.view(1, -1, 1, 1)
            masks, token = head.decode_levels(fine, alone, given.unsqueeze(0))
            return self._keep(coarse, masks, token, binarize=self.binarize)

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
        self,
        maps: Maps,
        index: int,
        known: Mapping[int, SliceMemory],
        tracked: Mapping[int, SliceMemory],
        *,
        step: int,
        num_slices: int,
    ) -> tuple[MaskLogits, SliceMemory]:
        """Decode a slice from memory alone.

        Args:
            maps: of all slices.
            index: of the slice.
            known: memories of conditioning slices.
            tracked: memories of slices decoded so far.
            step: 1 forward, -1 backward.
            num_slices: of the volume.
        """
        config = self.memory.config
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
        levels = tuple(level[index : index + 1] for level in maps)
        coarse = levels[-1]
        sines = self.memory.image_positions(coarse)
        conditioned = self.memory.attend(coarse, sines, memories, pointers, num_slices)
        masks, token = self.head.decode_levels(self.head.fine_levels(levels), conditioned, None)
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


def _check(
    conditioning: Mapping[int, Tensor], num_slices: int, *, dim: int, grid: tuple[int, ...]
) -> None:
    if not conditioning:
        raise ValueError("memory: no conditioning slice; give the prompt or mask of at least one")
    for index, given in conditioning.items():
        if not 0 <= index < num_slices:
            raise ValueError(f"memory: conditioning slice {index} of a volume of {num_slices}")
        if tuple(given.shape) not in ((dim,), grid):
            raise ValueError(
                f"memory, slice {index}: expected a prompt ({dim},) or logits {grid}, found "
                f"{tuple(given.shape)}"
            )
