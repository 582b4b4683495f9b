"""Masks of volumes by models that read images. The table at the end has one line per mode.

The volume is cut into axial slices, chosen by its geometry and never resampled. A few of them are
shown to the language model; the state of `[SEG]` prompts the head on slices. Masks come back on the
volume's own grid, oblique or flipped as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from medm.data.base import missing_branch
from medm.errors import DataError, MediaError, RecipeError
from medm.heads.base import Maps, MaskHead, MaskLogits
from medm.imaging import ImagePreprocess, Preprocess, load_pixels, prepare
from medm.imaging.placement import Placement, Prepared
from medm.imaging.sources import as_source
from medm.imaging.transforms import default_window, oriented
from medm.imaging.volumes import read_volume
from medm.inference.options import SegmentationOptions
from medm.types import Example, Kind, Media, Sample, TurnPart

if TYPE_CHECKING:
    from medm.models.lvlm.processing import LVLMProcessor

NOTHING = -1e4
"""Logit of voxels that the head did not see: a probability of 0."""
_ORIENTATION = "SPL"
"""Axial slices from feet to head, front up, the patient's left on the right."""


@dataclass(frozen=True, slots=True)
class FileMasks:
    """Masks of one image or volume."""

    logits: Callable[[int], np.ndarray]
    """(source_shape) float32 of a mask on the grid of the file; `NOTHING` where nothing is seen."""
    quality: Tensor
    """(masks,), predicted IoU."""
    presence: Tensor
    """(masks,), logit of the target being there at all."""
    placement: Placement
    """Of what the head saw in the file."""


class Slices(Protocol):
    """Slices of one body, in order."""

    def __len__(self) -> int: ...

    def prepared(self, index: int, preprocess: Preprocess) -> Prepared:
        """Return a slice as a head or an encoder takes it."""
        ...


@dataclass(frozen=True, slots=True)
class ImageStack:
    """Slices that a prompt shows as images of their own."""

    sources: Sequence[object]

    def __len__(self) -> int:
        return len(self.sources)

    def prepared(self, index: int, preprocess: Preprocess) -> Prepared:
        """Return a slice as a head or an encoder takes it. Raises `MediaError`."""
        return prepare(self.sources[index], preprocess)


class SliceHead(Protocol):
    """A mask head on images, as `Segmenter` uses it."""

    @property
    def preprocess(self) -> Preprocess:
        """Preprocessing of the images."""
        ...

    @property
    def mask_head(self) -> MaskHead:
        """The head itself."""
        ...

    def decode(self, prepared: Prepared, prompts: Tensor) -> MaskLogits:
        """Return the output for one image, (masks, *grid), in host memory."""
        ...

    def encode(self, pixels: np.ndarray) -> Maps:
        """Return the maps of one image, (1, ...) each."""
        ...

    def decode_maps(self, maps: Maps, prompts: Tensor) -> MaskLogits:
        """Return the output for the maps of one image, as `decode`."""
        ...

    def report(self, done: int, total: int) -> None:
        """Take note of how many slices of a volume are done."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class SliceStack:
    """A volume as axial slices of 8 bits."""

    pixels: np.ndarray
    """(slices, rows, columns) uint8."""
    placement: Placement
    """Of the stack in the file: axes are exchanged and flipped at most."""

    def __len__(self) -> int:
        return len(self.pixels)

    def prepared(self, index: int, preprocess: Preprocess) -> Prepared:
        """Return a slice as a head or an encoder takes it."""
        return prepare(self.pixels[index], preprocess)


def require_mode(options: SegmentationOptions, head: Kind, *, memory: bool = True) -> str:
    """Return the mode of a head of images or volumes.

    Args:
        options: name the mode.
        head: kind of file that the head reads.
        memory: the head was built with memory.

    Raises:
        RecipeError: the head does not go with `volume_mode`.
    """
    mode = options.volume_mode or ("volume" if head == "volume" else "slices")
    if (mode == "volume") != (head == "volume"):
        expected = "volume" if head == "volume" else " or ".join(MODES)
        raise RecipeError(
            f"segmentation.volume_mode: {mode!r}, and the mask head of the model reads {head}s; "
            f"expected {expected}"
        )
    if mode == "memory" and not memory:
        raise RecipeError(
            "segmentation.volume_mode: 'memory' needs the head sam2 with memory: true in its "
            "block; set slices"
        )
    return mode


def open_slices(source: object, options: SegmentationOptions, preprocess: Preprocess) -> SliceStack:
    """Read a volume as axial slices.

    Args:
        source: a path, or an array (D, H, W), which is taken to be axial slices already.
        options: give the window.
        preprocess: of images, whose window is used where the options give none.

    Raises:
        MediaError: the volume cannot be read.
    """
    opened = as_source(source)
    if not isinstance(opened, (Path, np.ndarray)):
        raise MediaError(
            f"volume: expected a path or an array (D, H, W), found {type(opened).__name__}"
        )
    volume = read_volume(opened)
    if volume.geometry is None:
        voxels, placement = volume.voxels, Placement.of_source(volume.voxels.shape)
    else:
        voxels, _, placement = oriented(volume, _ORIENTATION)
    window = options.window
    if window is None and isinstance(preprocess, ImagePreprocess) and preprocess.window:
        window = (preprocess.window[0], preprocess.window[1])
    if window is None and volume.unit == "HU":
        low, high = default_window("hu")
    else:
        low, high = window or (float(voxels.min()), float(voxels.max()))
    values = (voxels.astype(np.float32) - low) / max(high - low, 1e-6)
    return SliceStack(np.round(values.clip(0, 1) * 255).astype(np.uint8), placement)


def choose(count: int, depth: int, choice: str) -> list[int]:
    """Return the indices of so many slices, rising; all of a shorter volume.

    Args:
        count: number of slices.
        depth: slices of the volume.
        choice: `first`, otherwise uniform: the middles of `count` equal parts.
    """
    count = min(count, depth)
    if choice == "first":
        return list(range(count))
    return [int((index + 0.5) * depth / count) for index in range(count)]


def needs_slices(processor: LVLMProcessor, kind: str) -> bool:
    """Return true for a volume, if a model with a mask head has a branch for images alone."""
    branches = processor.branches
    return (
        kind == "volume"
        and processor.mask_view is not None
        and "image" in branches
        and "volume" not in branches
    )


def slice_pixels(
    processor: LVLMProcessor, source: object, options: SegmentationOptions
) -> list[np.ndarray]:
    """Return the slices of a volume that a language model is shown, prepared as its images.

    Raises:
        MediaError: the volume cannot be read.
    """
    preprocess = processor.preprocess["image"]
    stack = open_slices(source, options, preprocess)
    chosen = choose(options.slices, len(stack), options.slice_choice)
    return [stack.prepared(index, preprocess).pixels for index in chosen]


class SlicedVolumes:
    """Prompts about volumes for models that read images: a few slices are shown.

    Args:
        processor: of a model.
        options: number, choice and window of the slices. With a `volume_mode`, the images of a
            record are slices, too: of more than `slices`, those of the choice are shown.
    """

    def __init__(self, processor: LVLMProcessor, options: SegmentationOptions) -> None:
        self.processor, self.options = processor, options

    def needed(self, sample: Sample) -> bool:
        """Return true if the language model is shown something else than the sample's media."""
        images = sum(media.branch == "image" for media in sample.media)
        many = self.options.volume_mode is not None and images > self.options.slices
        return (many and self.processor.mask_view is not None) or any(
            needs_slices(self.processor, media.branch) for media in sample.media
        )

    def example(self, sample: Sample, sources: Sequence[object]) -> Example:
        """Return the prompt of a sample of which slices are shown.

        Args:
            sample: the conversation.
            sources: file or array of each image and volume, in order.

        Raises:
            MediaError: one of them cannot be read.
            DataError: as `LVLMProcessor.encode`.
        """
        processor, options = self.processor, self.options
        images = [index for index, media in enumerate(sample.media) if media.branch == "image"]
        left_out: set[int] = set()
        if options.volume_mode is not None:
            chosen = choose(options.slices, len(images), options.slice_choice) if images else []
            left_out = {*images} - {images[number] for number in chosen}
        pixels: dict[str, list[np.ndarray]] = {}
        counts: list[int] = []
        for index, (media, source) in enumerate(zip(sample.media, sources, strict=True)):
            if needs_slices(processor, media.branch):
                arrays = slice_pixels(processor, source, options)
                pixels.setdefault("image", []).extend(arrays)
                counts.append(len(arrays))
            elif index in left_out:
                counts.append(0)
            elif media.branch not in processor.branches:
                raise DataError(
                    missing_branch(media.branch, processor.branches), field=media.branch
                )
            else:
                array = load_pixels(source, processor.preprocess[media.branch])
                pixels.setdefault(media.branch, []).append(array)
                counts.append(1)
        left = iter(counts)
        turns = []
        for turn in sample.turns:
            parts: list[TurnPart] = []
            dropped = False
            for part in turn.content:
                if dropped and isinstance(part, str):
                    part = part.removeprefix("\n")  # of the line of the image
                dropped = False
                if isinstance(part, Media):
                    count = next(left)
                    dropped = count == 0
                    kind = "image" if needs_slices(processor, part.branch) else part.branch
                    parts += _lines(Media(kind, part.path), count)
                elif part != "":
                    parts.append(part)
            turns.append(replace(turn, content=tuple(parts)))
        shown = replace(sample, turns=tuple(turns), masks=())
        return processor.encode(shown, pixels, generation=True)


def _lines(media: Media, count: int) -> list[TurnPart]:
    """Return so many images, each on a line of its own."""
    parts: list[TurnPart] = []
    for _ in range(count):
        parts += ["\n", media] if parts else [media]
    return parts


def segment_slices(
    head: SliceHead, stack: Slices, prompts: Tensor, options: SegmentationOptions
) -> list[MaskLogits]:
    """Segment each slice by itself; the same prompt goes to all."""
    found = []
    for index in range(len(stack)):
        head.report(index, len(stack))
        found.append(head.decode(stack.prepared(index, head.preprocess), prompts))
    return found


def on_volume(
    head: SliceHead,
    stack: SliceStack,
    found: Sequence[MaskLogits],
    options: SegmentationOptions,
) -> FileMasks:
    """Return the output for every slice on the grid of the volume.

    A slice whose presence is below the threshold is empty. The presence of a mask is the highest of
    its slices, its quality the mean over the slices that show it.
    """
    logits = torch.stack([one.logits for one in found])  # (slices, masks, *grid)
    presence = torch.stack([one.presence for one in found])  # (slices, masks)
    quality = torch.stack([one.quality for one in found])
    shown = logits.flatten(2).amax(2) > 0
    if options.presence_threshold is not None:
        shown &= presence.sigmoid() >= options.presence_threshold
        logits[~shown] = NOTHING
    mean = (quality * shown).sum(0) / shown.sum(0)
    grid = stack.prepared(0, head.preprocess).placement.resized(tuple(logits.shape[2:]))

    def on_file(token: int) -> np.ndarray:
        values = grid.to_source(logits[:, token].numpy(), interpolation="linear", fill=NOTHING)
        return stack.placement.to_source(values)

    return FileMasks(
        on_file, torch.where(shown.any(0), mean, quality.amax(0)), presence.amax(0), stack.placement
    )


def propagate(
    head: SliceHead, stack: Slices, prompts: Tensor, options: SegmentationOptions
) -> list[MaskLogits]:
    """Follow each target through the volume by SAM 2's memory, from a few slices with its prompt.

    From the first of these slices to the last slice of the volume, and back to its first one. The
    maps of a slice are made when they are needed: those of a whole volume would fill the memory.
    """
    count = len(stack)
    visits = itertools.count()

    def maps_of(index: int) -> Maps:
        total = len(looked_at) + count
        head.report(min(next(visits), total), total)
        return head.encode(stack.prepared(index, head.preprocess).pixels)

    scored = options.slice_choice == "score"
    looked_at = range(count) if scored else choose(options.slices, count, options.slice_choice)
    trust, quality = torch.zeros(2, len(prompts), count)
    for index in looked_at:
        alone = head.decode_maps(maps_of(index), prompts)
        trust[:, index] = alone.presence.sigmoid() * alone.quality
        quality[:, index] = alone.quality
    chosen = [conditioning(options, own) for own in trust]
    given = [dict.fromkeys(own, prompt) for own, prompt in zip(chosen, prompts, strict=True)]
    logits, presence = head.mask_head.memory().propagate(maps_of, count, given)
    means = torch.stack([own[places].mean() for own, places in zip(quality, chosen, strict=True)])
    return [
        MaskLogits(values, means, there) for values, there in zip(logits, presence, strict=True)
    ]


def conditioning(options: SegmentationOptions, trust: Tensor) -> list[int]:
    """Return the slices that a target is followed from, rising.

    Args:
        options: number and choice.
        trust: (slices,), presence times quality of the mask that each slice has by itself.
    """
    if options.slice_choice != "score":
        return choose(options.slices, len(trust), options.slice_choice)
    count = min(options.slices, len(trust))
    return sorted(trust.argsort(descending=True, stable=True)[:count].tolist())


VolumeMode: TypeAlias = Callable[[SliceHead, Slices, Tensor, SegmentationOptions], list[MaskLogits]]
"""Gives the output of the head for each slice, in host memory."""

MODES: Mapping[str, VolumeMode] = {
    "slices": segment_slices,
    "memory": propagate,
}
