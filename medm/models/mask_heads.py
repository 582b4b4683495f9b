"""Mask heads of a `model` section: sizes, preprocessing and published weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from medm.encoders import ENCODERS, EncoderOptions
from medm.encoders.base import VisionEncoder
from medm.errors import CheckpointError, RecipeError
from medm.heads import HEADS, HeadOptions
from medm.heads.base import MaskHead
from medm.imaging import Preprocess, preprocess_from_dict
from medm.imaging.options import changed
from medm.models.published.weights import PretrainedSource, load_module
from medm.models.vision import (
    described_encoder,
    encoder_options,
    fields_of,
    load_encoder,
    num_channels,
    preprocess_of,
    spatial_of,
)
from medm.types import Config, Kind

logger = logging.getLogger(__name__)

_NOT_FOR_THE_HEAD = {"name", "path", "architecture", "image_size"}


def construct_head(entry: Config) -> MaskHead:
    """Construct a head from its entry in the config of a checkpoint, with random weights.

    A head of a vision encoder is given the module: heads and encoders do not know each other.
    """
    block = entry.get("encoder")
    if not isinstance(block, Mapping):
        return HEADS.constructor(entry)()
    return HEADS.constructor({**entry, "encoder": ENCODERS.constructor(block)()})()


def encoder_of(head: HeadOptions, *, place: str) -> EncoderOptions | None:
    """Return the block of the vision encoder that gives the features of a head; None without one.

    Args:
        head: block of the head.
        place: key of the recipe that holds it, for messages.
    """
    block = getattr(head, "encoder", None)
    return None if block is None else encoder_options(block, source=f"{place}.head.encoder")


def described_head(
    kind: Kind, head: HeadOptions, fields: Mapping[str, object], *, place: str
) -> tuple[Config, Preprocess]:
    """Return the config of a head with every size resolved, and what is done to its pixels.

    Args:
        kind: kind of file that it reads.
        head: its block.
        fields: of the preprocessing, in place of what the head was published with.
        place: key of the recipe that holds the block, for messages.
    """
    head_class = HEADS.get(head.name)
    if kind not in head_class.kinds:
        raise RecipeError(
            f"{place}.view: head {head.name!r} reads {' or '.join(sorted(head_class.kinds))}, "
            f"not {kind}; set view, or choose another head"
        )
    published = PretrainedSource(head.path) if head.path else None
    entry: Config = {"name": head.name, **fields_of(head, _NOT_FOR_THE_HEAD)}
    sizes = head_class.architecture_from(published.config() if published else {})
    sizes = head_class.architecture_for(kind, sizes | head.architecture)
    entry["architecture"] = sizes
    if (encoder := encoder_of(head, place=place)) is not None:
        _require_axes(kind, encoder, place=place)
        entry["encoder"], preprocess = described_encoder(
            kind, encoder, fields, place=f"{place}.preprocess"
        )
    else:
        entry.pop("encoder", None)  # an earlier medm opens the folders of heads without one
        described = head_class.preprocess_from(
            published.preprocessor() if published else {}, sizes, getattr(head, "image_size", None)
        )
        preprocess = preprocess_from_dict(changed({"kind": kind, **described}, fields))
        spatial_of(preprocess, place=f"{place}.preprocess")
    if preprocess.max_items > 1:
        raise RecipeError(
            f"{place}.preprocess.tiles: a mask head reads the whole image; set tiles: null"
        )
    return entry, preprocess


def _require_axes(kind: Kind, encoder: EncoderOptions, *, place: str) -> None:
    """Raise `RecipeError` for an encoder of images where the head reads volumes, and reverse."""
    expected, found = (3 if kind == "volume" else 2), ENCODERS.get(encoder.name).axes
    if expected != found:
        raise RecipeError(
            f"{place}.head.encoder: encoder {encoder.name!r} reads inputs of {found} axes, and "
            f"files of kind {kind} have {expected}; choose another encoder or view"
        )


def head_preprocess(
    kind: Kind, head: HeadOptions, fields: Mapping[str, object], *, place: str
) -> Preprocess:
    """Return the preprocessing alone, also where the head's published config is out of reach.

    Arguments as those of `described_head`.
    """
    if (encoder := encoder_of(head, place=place)) is not None:
        return preprocess_of(kind, encoder, fields, place=f"{place}.preprocess")
    try:
        return described_head(kind, head, fields, place=place)[1]
    except CheckpointError as error:
        logger.warning(
            "%s; size, mean and std are the head's usual ones, not those of that file", error
        )
        alone = head.model_copy(update={"path": None})
        return described_head(kind, alone, fields, place=place)[1]


def check_pixels(name: str, preprocess: Preprocess, head: MaskHead, *, place: str) -> None:
    """Raise `RecipeError` for pixels of another number of channels than the head takes."""
    channels = num_channels(preprocess)
    if head.channels and channels not in head.channels:
        raise RecipeError(
            f"{place}.preprocess: gives pixels of {channels} channels, but mask head {name!r} "
            f"takes {' or '.join(map(str, head.channels))}"
        )


def load_head(head: MaskHead, options: HeadOptions) -> None:
    """Load published weights into a head and into its vision encoder, where options name some."""
    encoder = encoder_of(options, place="model.masks")
    if encoder is not None and isinstance(head.encoder, VisionEncoder):
        load_encoder(head.encoder, encoder, "masks.encoder")
    if options.path is None:
        return
    load_module(
        head,
        head.rename_published(PretrainedSource(options.path).tensors()),
        source=f"mask head from {options.path}",
        key_map=type(head).key_map,
        ignored=type(head).ignored_keys,
    )
