"""From a recipe's `model` section to a dual encoder: resolve every size, build, load what was
published.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from medm.config import Options
from medm.errors import CheckpointError, RecipeError
from medm.imaging import Preprocess
from medm.models.base import CardText, ModelKind
from medm.models.dual_encoder.configuration import DualEncoderConfig, ImageEntry, TextEntry
from medm.models.dual_encoder.embedder import Embedder
from medm.models.dual_encoder.modeling import DualEncoder
from medm.models.dual_encoder.options import DualEncoderOptions, TextTowerOptions
from medm.models.dual_encoder.processing import DualEncoderProcessor
from medm.models.dual_encoder.published import load_published, load_readout
from medm.models.published.weights import PretrainedSource, load_module
from medm.models.vision import (
    check_channels,
    described_encoder,
    fields_of,
    load_encoder,
    num_channels,
    preprocess_of,
    spatial_of,
)
from medm.text_encoders import TEXT_ENCODERS, TextEncoderOptions
from medm.types import Config, PredictionField

Block = TypeVar("Block", bound=Options)

_PLACE = "model.image.preprocess"
_NOT_FOR_THE_ENCODER = {"name", "path", "architecture"}
MAX_LENGTH = 256
"""Tokens of a text where neither the recipe nor the encoder says fewer."""


_SUMMARY = (
    "A medical image-text encoder trained with medm: the cosine of two vectors says how well an "
    "image and a text fit. It can be\nwrong, and carries the biases of its data. It was not "
    "validated on any clinical task."
)
_EXAMPLE = """import torch

from medm.inference.embedder import load_embedder

embedder = load_embedder("path/to/this/folder", device=torch.device("cpu"))
texts = embedder.texts(["first text", "second text"])
print(embedder.probabilities(embedder.logits(embedder.images(["{file}"]), texts)))
"""


class DualEncoderKind(ModelKind[DualEncoderOptions, DualEncoder, DualEncoderProcessor]):
    """The kind `dual-encoder`."""

    config_class = DualEncoderConfig
    model_class = DualEncoder
    processor_class = DualEncoderProcessor
    pipeline = "pairs"
    predictor = "dual-encoder"
    outputs = DualEncoderOptions.outputs

    def build(self, options: DualEncoderOptions) -> tuple[DualEncoder, DualEncoderProcessor]:
        """Return a model with published weights wherever the recipe gives a path, and its
        processor.

        Raises:
            RecipeError: parts that do not fit each other or the recipe.
            CheckpointError: published weights that do not fit.
        """
        config, processor = resolve(options)
        model = DualEncoder(config)
        if options.path is not None:
            load_published(model, PretrainedSource(options.path))
        else:
            load_encoder(model.image.encoder, options.image.encoder, "image.encoder")
            if options.image.encoder.path is not None:
                load_readout(model, PretrainedSource(options.image.encoder.path))
            _load_text_encoder(model, options.text.encoder)
        dtype = getattr(torch, options.dtype)
        model.to(dtype)
        model.config.dtype = dtype
        model.eval()
        return model, processor

    def gives(self, config: PreTrainedConfig) -> frozenset[PredictionField]:
        return frozenset({"embeddings", "scores"})

    def embedder(
        self, model: DualEncoder, processor: DualEncoderProcessor, *, batch_size: int
    ) -> Embedder:
        return Embedder(model, processor, batch_size=batch_size)

    def card_text(self, options: DualEncoderOptions) -> CardText:
        return CardText(
            tags=("medical", "vision-language", "contrastive"),
            summary=_SUMMARY,
            example=_EXAMPLE.format(
                file="image.png" if options.branch == "image" else "volume.nii.gz"
            ),
        )

    def skeleton(self, options: DualEncoderOptions) -> DualEncoder:
        config, _ = resolve(options)
        with torch.device("meta"):
            return DualEncoder(config).to(getattr(torch, options.dtype))

    def processor(self, options: DualEncoderOptions) -> DualEncoderProcessor:
        return resolve(options)[1]

    def preprocess(self, options: DualEncoderOptions) -> dict[str, Preprocess]:
        image = _from_the_whole(options.image.encoder, options)
        fields = options.image.preprocess
        return {options.branch: preprocess_of(options.branch, image, fields, place=_PLACE)}

    def adapt(
        self,
        options: DualEncoderOptions,
        processor: DualEncoderProcessor,
        *,
        model: DualEncoder | None = None,
    ) -> DualEncoderProcessor:
        adapted = processor.adapt(options)
        if model is not None:
            _check_length(adapted.max_length, model.text.encoder.max_length)
            model.set_training_options(
                chunk=options.chunk, patch_dropout=options.image.patch_dropout
            )
        return adapted


def resolve(options: DualEncoderOptions) -> tuple[DualEncoderConfig, DualEncoderProcessor]:
    """Every size and the processor, from published configs and tokenizers.

    No weights are read, except for a published file that has no config: its sizes are those of its
    tensors.
    """
    block = _from_the_whole(options.image.encoder, options)
    encoder, preprocess = described_encoder(
        options.branch, block, options.image.preprocess, place=_PLACE
    )
    config = DualEncoderConfig(
        branch=options.branch,
        image=ImageEntry(
            encoder=encoder,
            pool=options.image.pool,
            norm=options.image.norm,
            projection=options.image.projection,
            channels=num_channels(preprocess),
            spatial=spatial_of(preprocess, place=_PLACE),
        ).model_dump(),
        text=TextEntry(
            encoder=_text_encoder_config(_from_the_whole(options.text.encoder, options)),
            projection=options.text.projection,
        ).model_dump(),
        embed_dim=options.embed_dim,
        logit_scale=options.logit_scale,
        logit_bias=options.logit_bias,
    )
    # After the config is made: they are not among the fields that describe the model.
    config.chunk, config.patch_dropout = options.chunk, options.image.patch_dropout
    with torch.device("meta"):
        model = DualEncoder(config)
    tower = model.image.encoder
    check_channels(block.name, preprocess, tower, place=_PLACE)
    if preprocess.max_items > 1:
        raise RecipeError(
            f"{_PLACE}.tiles: images are cut into up to {preprocess.max_items} tiles, and a dual "
            "encoder has one vector for an image; set tiles: null"
        )
    if tower.axes != {"image": 2, "volume": 3}[options.branch]:
        raise RecipeError(
            f"model.branch: {options.branch}, but encoder {block.name!r} reads "
            f"{'images' if tower.axes == 2 else 'volumes'}; set model.branch or another encoder"
        )
    tower.grid(tuple(config.image["spatial"]))
    text = model.text.encoder
    length = options.text.max_length or min(MAX_LENGTH, text.max_length)
    _check_length(length, text.max_length)
    processor = DualEncoderProcessor(
        _tokenizer(options.text, options.path),
        views={options.branch: preprocess.model_dump()},
        max_length=length,
        pad_to_max_length=text.pads_to_max_length,
    )
    rows = {"vocab_size": text.config_class().vocab_size, **config.text["encoder"]["architecture"]}
    config.pad_token_id = processor.pad_id
    if len(processor.tokenizer) > rows["vocab_size"]:
        raise RecipeError(
            f"model.text: the tokenizer has {len(processor.tokenizer)} tokens, and the text "
            f"encoder {rows['vocab_size']} rows; give the tokenizer that belongs to it"
        )
    return config, processor


def _from_the_whole(block: Block, options: DualEncoderOptions) -> Block:
    """Return an encoder's block, whose sizes come from the published dual encoder if there is
    one.
    """
    return block if options.path is None else block.model_copy(update={"path": options.path})


def _text_encoder_config(options: TextEncoderOptions) -> Config:
    """Return name and keywords of a text encoder with every size resolved."""
    cls = TEXT_ENCODERS.get(options.name)
    published = PretrainedSource(options.path).config() if options.path else {}
    sizes = cls.architecture_from(published) | options.architecture
    return {
        "name": options.name,
        **fields_of(options, _NOT_FOR_THE_ENCODER),
        "architecture": sizes,
    }


def _load_text_encoder(model: DualEncoder, options: TextEncoderOptions) -> None:
    if options.path is None:
        return
    encoder = model.text.encoder
    load_module(
        encoder,
        PretrainedSource(options.path).tensors(),
        source=f"text.encoder from {options.path}",
        key_map=encoder.key_map,
        ignored=encoder.ignored_keys,
    )


def _tokenizer(options: TextTowerOptions, path: str | None) -> PreTrainedTokenizerBase:
    source = options.tokenizer or options.encoder.path or path
    if source is None:
        raise RecipeError("model.text.tokenizer: required where model.text.encoder has no path")
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"model.text: no usable tokenizer at {source!r} ({error}); set model.text.tokenizer"
        ) from None


def _check_length(length: int, positions: int) -> None:
    if length > positions:
        raise RecipeError(
            f"model.text.max_length: {length}, but the text encoder has {positions} positions"
        )
