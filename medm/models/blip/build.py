"""From a recipe's `model` section to a model of kind `blip`: resolve sizes, build, load weights."""

from __future__ import annotations

import logging
import re
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AddedToken,
    AutoTokenizer,
    BertConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from medm.encoders import EncoderOptions
from medm.encoders.sizes import number
from medm.errors import CheckpointError, DataError, RecipeError
from medm.imaging import Preprocess
from medm.models.base import CardText, ModelKind
from medm.models.blip.answers import resolved_answers
from medm.models.blip.configuration import ImageEntry, MedmBlipConfig, TextEntry
from medm.models.blip.modeling import MedmBlip, StudyImageTower
from medm.models.blip.options import GIVES, BlipOptions, StudyTextOptions
from medm.models.blip.processing import DECODER_TOKEN, ENCODER_TOKEN, MedmBlipProcessor
from medm.models.blip.published import load_published, text_sizes
from medm.models.blip.text import StudyTextEncoder
from medm.models.blip.trained import load_trained
from medm.models.knowledge_files import described_knowledge
from medm.models.published.weights import LoadReport, PretrainedSource, load_module
from medm.models.vision import (
    check_channels,
    described_encoder,
    load_encoder,
    num_channels,
    preprocess_of,
    spatial_of,
)
from medm.text_encoders.bert import BertTextEncoder
from medm.types import ANSWER_BRANCHES, Answerer, AnswerItem, PredictionField

logger = logging.getLogger(__name__)

_PLACE = "model.image.preprocess"
_NORM_EPS = 1e-6
"""Of the norm behind an encoder whose sizes do not say one."""
_SUMMARY = (
    "A medical image-text model trained with medm on studies and their reports. It can be wrong, "
    "and carries the biases of its data. It was\nnot validated on any clinical task."
)
_EXAMPLE = """from transformers import AutoModel, AutoProcessor

import medm

model = AutoModel.from_pretrained("path/to/this/folder").eval()
processor = AutoProcessor.from_pretrained("path/to/this/folder")
inputs = processor("a text", images=["image.png"])
print(model.get_image_features(inputs["pixels"]))
"""


class BlipKind(ModelKind[BlipOptions, MedmBlip, MedmBlipProcessor]):
    """The kind `blip`."""

    config_class = MedmBlipConfig
    model_class = MedmBlip
    processor_class = MedmBlipProcessor
    pipeline = "studies"
    outputs = BlipOptions.outputs
    predictor = "studies"

    def gives(self, config: PreTrainedConfig) -> frozenset[PredictionField]:
        """Return what the heads of the model give."""
        return frozenset(GIVES[head] for head in cast(MedmBlipConfig, config).heads)

    def build(self, options: BlipOptions) -> tuple[MedmBlip, MedmBlipProcessor]:
        """Return a model with published weights wherever the recipe gives a path, and its
        processor.

        Raises:
            RecipeError: parts that do not fit each other or the recipe.
            CheckpointError: published weights that do not fit.
        """
        config, processor = resolve(options)
        model = MedmBlip(config)
        if options.pretrained is not None:
            load_trained(model, options.pretrained)
        elif options.path is not None:
            load_published(model, PretrainedSource(options.path))
        else:
            _load_towers(model, options)
        if model.answer_encoder is not None:
            model.answer_encoder.load_state_dict(model.text.state_dict())
        model.init_training_state()
        model.eval()
        return model, processor

    def answerer(
        self,
        model: MedmBlip,
        processor: MedmBlipProcessor,
        fields: frozenset[PredictionField],
        *,
        batch_size: int,
        max_new_tokens: int | None = None,
    ) -> Answerer:
        from medm.models.blip.answering import StudyAnswerer

        return StudyAnswerer(model, processor, fields, batch_size=batch_size, with_reports=True)

    def check_item(self, processor: MedmBlipProcessor, item: AnswerItem) -> None:
        if not item.pixels:
            raise DataError("a study without an image", field="image")
        if processor.answers and item.question is None:
            raise DataError(
                "the model chooses answers to questions; expected a question", field="question"
            )

    def card_text(self, options: BlipOptions) -> CardText:
        return CardText(
            tags=("medical", "vision-language", "contrastive", "image-to-text"),
            summary=_SUMMARY,
            example=_EXAMPLE,
        )

    def skeleton(self, options: BlipOptions) -> MedmBlip:
        config, _ = resolve(options)
        with torch.device("meta"):
            return MedmBlip(config)

    def processor(self, options: BlipOptions) -> MedmBlipProcessor:
        return resolve(options)[1]

    def preprocess(self, options: BlipOptions) -> dict[str, Preprocess]:
        fields = options.image.preprocess
        return {"image": preprocess_of("image", _image_encoder(options), fields, place=_PLACE)}

    def adapt(
        self,
        options: BlipOptions,
        processor: MedmBlipProcessor,
        *,
        model: MedmBlip | None = None,
    ) -> MedmBlipProcessor:
        adapted = processor.adapt(options)
        if model is not None:
            _check_length(options, int(model.text.config.max_position_embeddings))
            for name in ("alpha", "alpha_steps", "same_report", "negatives", "label_smoothing"):
                setattr(model.config, name, getattr(options, name))
            if options.answers is not None:
                model.config.answers = {**model.config.answers, "route": options.answers.route}
        return adapted


def _load_towers(model: MedmBlip, options: BlipOptions) -> None:
    """Load published weights of the towers wherever the recipe gives a path."""
    load_encoder(model.image.encoder, options.image.encoder, "image.encoder")
    if options.image.encoder.path is not None:
        _load_norm(model.image, PretrainedSource(options.image.encoder.path))
    if options.text.path is not None:
        load_text(model, PretrainedSource(options.text.path))


def resolve(options: BlipOptions) -> tuple[MedmBlipConfig, MedmBlipProcessor]:
    """Every size and the processor, from published configs and tokenizers.

    No weights are read, except for a published file that has no config: its sizes are those of its
    tensors.
    """
    block = _image_encoder(options)
    encoder, preprocess = described_encoder("image", block, options.image.preprocess, place=_PLACE)
    sizes_of_tower = cast(dict[str, object], encoder["architecture"])
    tokenizer = _tokenizer(options.text, options.path)
    architecture = _text_sizes(options) | options.text.architecture
    sizes = BertConfig(**architecture)
    architecture["vocab_size"] = max(sizes.vocab_size, len(tokenizer))
    architecture["pad_token_id"] = int(tokenizer.pad_token_id)
    _check_length(options, int(sizes.max_position_embeddings))
    answers = None if options.answers is None else resolved_answers(options.answers)
    processor = MedmBlipProcessor(
        tokenizer,
        image_views={"image": preprocess.model_dump()},
        max_length=options.text.max_length,
        prompt=options.text.prompt,
        labels=options.labels,
        views=options.image.views,
        reads_text=bool({"itc", "itm", "lm"} & {*options.heads}),
        answers={name: getattr(answers, name) for name in ANSWER_BRANCHES} if answers else {},
        stores_triplets=any(one.name == "memory" for one in options.knowledge),
    )
    config = MedmBlipConfig(
        image=ImageEntry(
            encoder=encoder,
            channels=num_channels(preprocess),
            spatial=spatial_of(preprocess, place=_PLACE),
            views=options.image.views,
            fusion=options.image.fusion,
            norm_eps=number({"layer_norm_eps": _NORM_EPS, **sizes_of_tower}, "layer_norm_eps"),
        ).model_dump(),
        text=TextEntry(
            architecture=architecture,
            decoder_id=_id_of(tokenizer, DECODER_TOKEN),
            encoder_id=_id_of(tokenizer, ENCODER_TOKEN),
            end_id=int(tokenizer.sep_token_id),
            lm_head=options.text.lm_head,
            label_ids=[processor.encode_target(name, "").input_ids for name in options.labels],
        ).model_dump(),
        knowledge=[
            described_knowledge(one, tokenizer, place=f"model.knowledge.{number}")
            for number, one in enumerate(options.knowledge)
        ],
        answers={} if answers is None else answers.model_dump(exclude={"file"}),
        memory_length=options.text.max_length,
        **options.model_dump(
            include={
                "keep_memory",
                "embed_dim", "heads", "momentum", "queue", "alpha", "alpha_steps", "temperature",
                "same_report", "negatives", "label_smoothing", "labels", "label_head",
            }
        ),
    )  # fmt: skip
    config.pad_token_id = processor.pad_id
    with torch.device("meta"):
        tower = StudyImageTower(config.image_entry()).encoder
    check_channels(block.name, preprocess, tower, place=_PLACE)
    if preprocess.max_items > 1:
        raise RecipeError(
            f"{_PLACE}.tiles: images are cut into up to {preprocess.max_items} tiles, and this "
            "kind takes an image as a whole; set tiles: null"
        )
    if tower.axes != 2:
        raise RecipeError(
            f"model.image.encoder: {block.name!r} reads volumes; expected an encoder of images"
        )
    tower.grid(tuple(config.image["spatial"]))
    return config, processor


def load_text(model: MedmBlip, source: PretrainedSource) -> list[LoadReport]:
    """Load a published BERT into the text encoder and the decoder.

    The decoder's self-attention starts as the encoder's, and its head from the file's `cls.` where
    it has one. Cross-attention and the rows of the two new tokens keep their new weights, which the
    log says.

    Returns:
        A report on each module.

    Raises:
        CheckpointError: a tensor is missing, unexpected or misshaped.
    """
    tensors = source.tensors()
    words = next((name for name in tensors if name.endswith(_WORDS)), None)
    own = model.text.embeddings.word_embeddings.weight
    added = 0 if words is None else len(own) - len(tensors[words])
    if words is not None and added > 0:
        logger.info("%s: %d rows of new tokens start from new weights", source.path, added)
        new = own[len(tensors[words]) :].detach()
        tensors[words] = torch.cat([tensors[words], new.to(tensors[words].dtype)])
    head = {name: tensors.pop(name) for name in list(tensors) if _HEAD.match(name)}
    plain = StudyTextEncoder(model.text.config, None)
    reports = [
        load_module(
            plain,
            tensors,
            source=f"text.encoder from {source.path}",
            key_map=_TEXT_NAMES,
            ignored=(r"^cls\.", r"position_ids$", r"^(?:bert\.)?pooler\."),
            truncated=(r"^layers\.\d+\.",),  # beyond those that text.architecture asks for
        )
    ]
    kept = model.text.load_state_dict(plain.state_dict(), strict=False).missing_keys
    if kept:
        logger.info(
            "%s: no cross-attention; its %d tensors start from new weights", source.path, len(kept)
        )
    if model.decoder is None:
        return reports
    if model.decoder.words is not None:
        model.decoder.words.data.copy_(model.text.embeddings.word_embeddings.weight)
    for layer, attention in zip(plain.blocks(), model.decoder.attentions(), strict=True):
        attention.load_state_dict(layer.attention.state_dict())
    loaded = {_HEAD.sub("", name): tensor for name, tensor in head.items()}
    if "transform.dense.weight" in loaded:
        bias = loaded["bias"]
        rest = model.decoder.bias.detach()[len(bias) :].to(bias.dtype)
        parts: dict[str, Tensor] = {**loaded, "bias": torch.cat([bias, rest])}
        parts |= {
            name: tensor
            for name, tensor in model.decoder.state_dict().items()
            if name == "words" or name.startswith("attention.")
        }
        reports.append(
            load_module(
                model.decoder,
                parts,
                source=f"text.decoder from {source.path}",
                ignored=(r"^decoder\.",),
            )
        )
    else:
        logger.info("%s: no LM head; that of the decoder starts from new weights", source.path)
    return reports


_WORDS = "embeddings.word_embeddings.weight"
_HEAD = re.compile(r"^cls\.predictions\.")
_TEXT_NAMES = (
    (r"^(?:bert\.)?encoder\.layer\.", "layers."),
    (r"^(?:bert\.)?embeddings\.", "embeddings."),
)
_NORM = re.compile(
    r"(?:(?:vision_model|vit|deit|dinov2|ijepa)\.)?(?:post_layernorm|layernorm|norm)\.(.+)"
)
"""The norm behind the last block in the files of towers, alone or behind a classifier."""


def _load_norm(tower: StudyImageTower, source: PretrainedSource) -> None:
    """Load the norm behind the last block, which encoders leave out, where the source has one."""
    if source.is_bundle():
        return
    found = {
        match[1]: tensor
        for name, tensor in source.encoder_tensors().items()
        if (match := _NORM.fullmatch(name))
    }
    if {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in tower.norm.state_dict().items()
    }:
        load_module(tower.norm, found, source=f"image.norm from {source.path}")
    else:
        logger.info("%s: no norm behind the last block; it starts from new weights", source.path)


def _image_encoder(options: BlipOptions) -> EncoderOptions:
    """Return the encoder's block, whose sizes come from the published BLIP if there is one."""
    block = options.image.encoder
    return block if options.path is None else block.model_copy(update={"path": options.path})


def _text_sizes(options: BlipOptions) -> dict[str, Any]:
    """Return the published sizes of the text encoder; empty without a path."""
    if options.path is not None:
        return text_sizes(PretrainedSource(options.path))
    published = PretrainedSource(options.text.path).config() if options.text.path else {}
    return BertTextEncoder.architecture_from(published)


def _tokenizer(options: StudyTextOptions, path: str | None) -> PreTrainedTokenizerBase:
    source = options.tokenizer or options.path or path
    if source is None:
        raise RecipeError("model.text.tokenizer: required where model.text has no path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"model.text: no usable tokenizer at {source!r} ({error}); set model.text.tokenizer "
            "(medm import: --tokenizer)"
        ) from None
    for name in ("cls_token_id", "sep_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is None:
            raise RecipeError(
                f"model.text.tokenizer: {source!r} has no {name.removesuffix('_id')}; expected the "
                "tokenizer of a BERT"
            )
    new = [AddedToken(token, special=True) for token in (DECODER_TOKEN, ENCODER_TOKEN)]
    tokenizer.add_tokens(new, special_tokens=True)
    return tokenizer


def _id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def _check_length(options: BlipOptions, positions: int) -> None:
    if options.text.max_length > positions:
        raise RecipeError(
            f"model.text.max_length: {options.text.max_length}, but the text encoder has "
            f"{positions} positions"
        )
