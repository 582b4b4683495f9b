"""Vision encoders of a `model` section: sizes, preprocessing and published weights, for every kind.

A kind of model resolves its encoder blocks here before anything is built, and loads them here
afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from medm.config import Options, validate
from medm.encoders import ENCODERS, EncoderOptions
from medm.encoders.base import VisionEncoder
from medm.errors import CheckpointError, RecipeError
from medm.imaging import Preprocess, preprocess_from_dict
from medm.imaging.options import ImagePreprocess, changed
from medm.models.published.weights import PretrainedSource, load_module
from medm.types import Config

logger = logging.getLogger(__name__)

_NOT_FOR_THE_ENCODER = {"name", "path", "architecture", "image_size"}


def described_encoder(
    branch: str, encoder: EncoderOptions, fields: Mapping[str, object], *, place: str
) -> tuple[Config, Preprocess]:
    """Return the config of an encoder, and what is done to its pixels.

    Args:
        branch: kind of the input, "image" or "volume".
        encoder: its block.
        fields: of the preprocessing, in place of what the encoder was published with.
        place: key of the recipe that holds `fields`, for messages.
    """
    entry, published = _encoder_config(encoder)
    preprocess = preprocess_from_dict(changed({"kind": branch, **published}, fields))
    spatial_of(preprocess, place=place)
    return entry, preprocess


def spatial_of(preprocess: Preprocess, *, place: str) -> list[int]:
    """Return the size of the input. Raises `RecipeError` where there is none."""
    if preprocess.size is None:
        raise RecipeError(f"{place}: size is null, but the token grid must be known; give sizes")
    return preprocess.size


def num_channels(preprocess: Preprocess) -> int:
    """Return the channels of the pixels."""
    return (
        preprocess.channels if isinstance(preprocess, ImagePreprocess) else preprocess.num_channels
    )


def preprocess_of(
    branch: str, encoder: EncoderOptions, fields: Mapping[str, object], *, place: str
) -> Preprocess:
    """Return the preprocessing alone, also where the encoder's published config is out of reach.

    Arguments as those of `described_encoder`.
    """
    try:
        return described_encoder(branch, encoder, fields, place=place)[1]
    except CheckpointError as error:
        logger.warning(
            "%s; size, mean and std are the encoder's usual ones, not those of that file", error
        )
        return described_encoder(branch, _without_path(encoder), fields, place=place)[1]


def _without_path(encoder: EncoderOptions) -> EncoderOptions:
    changes: Config = {"path": None}
    if (inner := encoder.inner()) is not None:
        changes["encoder"] = _without_path(inner)
    return encoder.model_copy(update=changes)


def check_channels(
    name: str, preprocess: Preprocess, encoder: VisionEncoder, *, place: str
) -> None:
    """Pixels and encoder are described apart; here they meet. Raises `RecipeError`."""
    channels = num_channels(preprocess)
    if encoder.channels and channels not in encoder.channels:
        raise RecipeError(
            f"{place}: gives pixels of {channels} channels (one a "
            f"window, or `channels`), but encoder {name!r} takes "
            f"{' or '.join(map(str, encoder.channels))}"
        )


def fields_of(options: Options, left_out: set[str]) -> Config:
    """Return the options of a part as keywords, without some."""
    return {key: value for key, value in options.model_dump().items() if key not in left_out}


def _encoder_config(options: EncoderOptions) -> tuple[Config, Config]:
    """Name and keywords of an encoder with every size resolved, and the preprocessing it was
    published with.
    """
    encoder = ENCODERS.get(options.name)
    entry: Config = {"name": options.name, **fields_of(options, _NOT_FOR_THE_ENCODER)}
    image_size = getattr(options, "image_size", None)
    if (inner := options.inner()) is not None:
        entry["encoder"], inner_preprocess = _encoder_config(inner)
        entry["architecture"] = {}
        return entry, encoder.preprocess_from(inner_preprocess, {}, image_size)
    published = PretrainedSource(options.path) if options.path else None
    if published is not None and published.is_bundle():
        return _bundle_config(entry, options, published.config())
    sizes = (
        encoder.architecture_from(published.config() if published else {}) | options.architecture
    )
    entry["architecture"] = sizes
    preprocessor = published.preprocessor() if published else {}
    return entry, encoder.preprocess_from(preprocessor, sizes, image_size)


def _bundle_config(
    entry: Config, options: EncoderOptions, bundle: Mapping[str, Any]
) -> tuple[Config, Config]:
    """Return config and preprocessing of an encoder that medm exported."""
    if bundle["encoder"] != options.name:
        raise RecipeError(
            f"{options.path}: holds an encoder {bundle['encoder']!r}, not {options.name!r}; name "
            "that one"
        )
    preprocess = dict(bundle["preprocess"])
    if (image_size := getattr(options, "image_size", None)) is not None:
        sized = ENCODERS.get(options.name).preprocess_from({}, bundle["architecture"], image_size)
        preprocess["size"] = sized["size"]
    entry["architecture"] = bundle["architecture"] | options.architecture
    return entry, preprocess


def encoder_options(block: Mapping[str, object], *, source: str) -> EncoderOptions:
    """Return an encoder block of a recipe, checked.

    Args:
        block: name and options.
        source: for messages.
    """
    name = str(block["name"])
    options = validate(ENCODERS.entry(name).options, block, source=source)
    if not isinstance(options, EncoderOptions):
        raise TypeError(
            f"encoder {name!r}: expected options that derive from EncoderOptions, found "
            f"{type(options).__name__}"
        )
    return options


def build_encoder(options: EncoderOptions) -> tuple[VisionEncoder, Config]:
    """An encoder alone, with its weights where the options name some, and the preprocessing that
    belongs to it.

    Args:
        options: an encoder block of a recipe.
    """
    entry, preprocess = _encoder_config(options)
    encoder = ENCODERS.constructor(entry)()
    load_encoder(encoder, options, options.name)
    encoder.eval()
    return encoder, preprocess


def load_encoder(encoder: VisionEncoder, options: EncoderOptions, part: str) -> None:
    """Load published weights into an encoder, wherever its options name some."""
    if encoder.inner is not None and (inner := options.inner()) is not None:
        load_encoder(encoder.inner, inner, f"{part}.encoder")
    elif options.path:
        published = PretrainedSource(options.path)
        load_module(
            encoder,
            encoder.rename_published(published.encoder_tensors()),
            source=f"{part} from {options.path}",
            key_map=() if published.is_bundle() else type(encoder).key_map,
            ignored=type(encoder).ignored_keys,
            truncated=type(encoder).truncated_keys,
        )
