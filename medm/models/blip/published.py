"""Published BLIP checkpoints: their `model` section, and their weights in every part of a model.

`PretrainedSource` gives BLIP's own files, and those of MOTOR, under the names of transformers
(`medm.models.published.blip`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig

from medm.encoders.sizes import whole
from medm.errors import CheckpointError
from medm.models.blip.modeling import MedmBlip
from medm.models.blip.options import Head, StudyTextOptions
from medm.models.published.blip import BLIP
from medm.models.published.weights import LoadReport, PretrainedSource, group, load_module
from medm.text_encoders.bert import BertTextEncoder
from medm.types import Config

logger = logging.getLogger(__name__)

_PREFIXES = {
    "training state": r"^(?=(?:visual_encoder|text_encoder|vision_proj|text_proj|cross_attn)_m\."
    r"|(?:image|text|idx)_queue$|(?:queue_ptr|ptr_queue)$)",
    "knowledge": r"^(?=(?:cross_attn|tag_encoder|create_knowledge)\.)",
    "image.norm": r"^vision_model\.post_layernorm\.",
    "image.encoder": r"^vision_model\.",
    "text.encoder": r"^text_encoder\.",
    "text.decoder": r"^text_decoder\.",
    "image.projection": r"^vision_proj\.",
    "text.projection": r"^text_proj\.",
    "itm": r"^itm_head\.",
    "temperature": r"^(?=temp$)",
}
"""Parts of a file by the names of their tensors."""
_LEFT = {
    "training state": "momentum copies and queues are left out; training starts with its own",
    "knowledge": "MOTOR's knowledge modules compute otherwise than medm's and are left out",
}
_TEXT_NAMES = ((r"^encoder\.layer\.", "layers."),)
_BUFFERS = (r"position_ids$",)
_OF_DECODER = (
    (r"^bert\.encoder\.layer\.(\d+)\.attention\.", r"attention.\1."),
    (r"^cls\.predictions\.transform\.", "transform."),
    (r"^cls\.predictions\.bias$", "bias"),
    (r"^cls\.predictions\.decoder\.weight$", "words"),
)
"""What belongs to the decoder alone; all else it shares with the text encoder."""
_WORDS = "embeddings.word_embeddings.weight"
_TYPES = "embeddings.token_type_embeddings.weight"


class Loaded(NamedTuple):
    """What became of the tensors of a file."""

    reports: list[LoadReport]
    """One a part, under the names of the file."""
    notes: list[str]
    """What starts from new weights, what was left out, and why."""


def text_sizes(source: PretrainedSource) -> Config:
    """Return the fields of `BertConfig` of a published BLIP.

    Raises:
        CheckpointError: it is none.
    """
    config = source.config()
    if config.get("model_type") != BLIP or "text_config" not in config:
        raise CheckpointError(
            f"{source.path}: no BLIP; expected a folder of transformers' type {BLIP!r}, or a file "
            "with visual_encoder.* and text_encoder.* or text_decoder.*. Weights of one tower are "
            "named by image.encoder.path and text.path"
        )
    sizes = BertTextEncoder.architecture_from(_text_config(config).to_dict())
    for field in ("is_decoder", "bos_token_id", "eos_token_id", "tie_word_embeddings"):
        sizes.pop(field, None)
    return sizes


def published_section(
    source: PretrainedSource,
    *,
    tokenizer: str | None = None,
    preprocess: Mapping[str, object] | None = None,
) -> Config:
    """Return the `model` section of a published BLIP, whose heads are all that the file has.

    Args:
        source: its weights.
        tokenizer: folder or id, where the source has none.
        preprocess: fields that replace what is known of it.

    Raises:
        CheckpointError: it is no BLIP, or one that the kind does not compute.
    """
    sizes, parts = text_sizes(source), group(source.tensors(), _PREFIXES, source=source.path)
    has = {name for name, tensors in parts.items() if tensors}
    _refuse_answers(parts, source)
    heads: list[Head] = []
    if {"text.encoder", "image.projection", "text.projection"} <= has:
        heads += ["itc", "itm"] if "itm" in has else ["itc"]
    if "text.decoder" in has:
        heads += ["lm"]
    if not heads:
        raise CheckpointError(
            f"{source.path}: no head that the kind blip has; expected vision_proj, text_proj and "
            f"itm_head, or a text_decoder, found {', '.join(sorted(has))}"
        )
    section: Config = {
        "kind": "blip",
        "path": source.path,
        "image": {"encoder": {"name": "vit"}, "preprocess": dict(preprocess or {})},
        "text": {
            "tokenizer": tokenizer,
            "lm_head": "tied" if _head_is_tied(parts) else "own",
            "max_length": min(
                StudyTextOptions().max_length,
                whole(sizes, "max_position_embeddings"),
            ),
        },
        "heads": heads,
    }
    if "itc" in heads:
        section["embed_dim"] = len(parts["image.projection"]["weight"])
    if parts["temperature"]:
        section["temperature"] = float(parts["temperature"]["temp"])
    return section


def load_published(model: MedmBlip, source: PretrainedSource) -> Loaded:
    """Load a published BLIP into a new model.

    A part of the model is wholly that of the file or wholly new. The decoder shares every weight
    with the text encoder except its self-attention and LM head; a file whose two copies differ is
    refused.

    Raises:
        CheckpointError: a tensor is missing, unexpected or misshaped; the file has no image tower
            or no text encoder; or its decoder is one that the kind does not compute.
    """
    tensors = source.tensors()
    parts = group(tensors, _PREFIXES, source=source.path)
    job = _Load(source, parts, group({n: n for n in tensors}, _PREFIXES, source=source.path))
    if not parts["image.encoder"] or not (parts["text.encoder"] or parts["text.decoder"]):
        raise CheckpointError(
            f"{source.path}: no BLIP; expected vision_model.* (or visual_encoder.*) and "
            f"text_encoder.* or text_decoder.*, found {', '.join(list(tensors)[:3])}"
        )
    _check_first_token(model, source)
    encoder = model.image.encoder
    job.load(
        "image.encoder",
        encoder,
        key_map=type(encoder).key_map,
        ignored=type(encoder).ignored_keys,
        truncated=type(encoder).truncated_keys,
    )
    job.load("image.norm", model.image.norm)
    job.load_text(model)
    job.load_or_leave("image.projection", model.image_projection)
    job.load_or_leave("text.projection", model.text_projection)
    job.load_or_leave("itm", model.itm)
    job.load_or_leave("temperature", model.temperature)
    for part, reason in _LEFT.items():
        job.leave(part, reason)
    for part, module in (
        ("image.join", model.image.join), ("labels", model.labels), ("knowledge", model.knowledge),
    ):  # fmt: skip
        if module is not None:
            job.note(f"{part} starts from new weights")
    return Loaded(job.reports, job.notes)


class _Load:
    """One load: a report for each part, and notes, which the log has as well.

    Args:
        source: for messages and names.
        parts: tensors by part of the file.
        names: the names that `source` gave them, likewise.
    """

    def __init__(
        self,
        source: PretrainedSource,
        parts: dict[str, dict[str, Tensor]],
        names: dict[str, dict[str, str]],
    ) -> None:
        self.source, self.parts, self.names = source, parts, names
        self.reports: list[LoadReport] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Note a decision, in the report and in the log."""
        self.notes.append(text)
        logger.info("%s: %s", self.source.path, text)

    def load(
        self,
        part: str,
        module: nn.Module,
        *,
        key_map: tuple[tuple[str, str], ...] = (),
        ignored: tuple[str, ...] = (),
        truncated: tuple[str, ...] = (),
    ) -> None:
        """Load a part of the file into a module, all or nothing."""
        report = load_module(
            module,
            self.parts[part],
            source=f"{part} from {self.source.path}",
            key_map=key_map,
            ignored=ignored,
            truncated=truncated,
        )
        self.report(part, report.loaded, report.ignored)

    def report(self, part: str, loaded: list[str], ignored: list[str]) -> None:
        """Add a report on tensors of a part, by their names within the part."""
        names = self.names[part]
        found, left = (
            sorted(self.source.in_file(names[name]) for name in some if name in names)
            for some in (loaded, ignored)
        )
        self.reports.append(LoadReport(part, loaded=found, ignored=left))

    def leave(self, part: str, reason: str) -> None:
        """Leave a part of the file out, named with the reason."""
        if self.parts[part]:
            self.report(part, [], list(self.parts[part]))
            self.note(reason)

    def load_or_leave(self, part: str, module: nn.Module | None) -> None:
        """Load a part that file and model may have; one that only one of them has is noted."""
        if module is None:
            self.leave(part, f"{part} is left out: no head of the model needs it")
            return
        if not self.parts[part]:
            self.note(f"the file has no {part}, which starts from new weights")
            return
        if part == "temperature":
            self.parts[part] = {"temp": self.parts[part]["temp"].reshape(1)}
        self.load(part, module, key_map=((r"^temp$", "value"),))

    def load_text(self, model: MedmBlip) -> None:
        """Load the text encoder and what the decoder has besides."""
        encoder, decoder = self.parts["text.encoder"], self.parts["text.decoder"]
        shared = {
            name.removeprefix("bert."): tensor
            for name, tensor in decoder.items()
            if name.startswith("bert.")
        }
        if model.decoder is not None:
            _refuse_answers(self.parts, self.source)
        used = dict(encoder or shared)
        if _TYPES not in used:
            self.note("the embeddings of token types, which BLIP does not have, start as zeros")
            used[_TYPES] = torch.zeros_like(model.text.embeddings.token_type_embeddings.weight)
        report = load_module(
            model.text,
            used,
            source=f"text.encoder from {self.source.path}",
            key_map=_TEXT_NAMES,
            ignored=_BUFFERS,
            truncated=(r"^layers\.\d+\.crossattention\.",),
        )
        if encoder:
            self.report("text.encoder", report.loaded, report.ignored)
        else:
            self.note(
                "the file has no text encoder: embeddings, cross-attention and feed-forward "
                "networks are those of its decoder, whose self-attention is also the start of the "
                "encoder's"
            )
        loaded = [] if encoder else [f"bert.{name}" for name in report.loaded]
        ignored = [] if encoder else [f"bert.{name}" for name in report.ignored]
        if model.decoder is None:
            rest = [name for name in decoder if name not in {*loaded, *ignored}]
            if decoder:
                self.report("text.decoder", loaded, ignored + rest)
                self.note(
                    "the LM head is left out: the model has no head lm"
                    if not encoder
                    else "the decoder is left out: the model has no head lm"
                )
            return
        if not decoder:
            for layer, attention in zip(
                model.text.blocks(), model.decoder.attentions(), strict=True
            ):
                attention.load_state_dict(layer.attention.state_dict())
            if model.decoder.words is not None:
                words = model.text.embeddings.word_embeddings.weight
                model.decoder.words.data.copy_(words)
            self.note(
                "the file has no decoder: its self-attention starts as the text encoder's, and its "
                "LM head from new weights"
            )
            return
        self._load_decoder(model, decoder, encoder, shared)

    def _load_decoder(
        self,
        model: MedmBlip,
        decoder: dict[str, Tensor],
        encoder: dict[str, Tensor],
        shared: dict[str, Tensor],
    ) -> None:
        """Load self-attention and LM head of the decoder; compare what it shares."""
        assert model.decoder is not None
        path = self.source.path
        different = _different(encoder, shared)
        if different:
            raise CheckpointError(
                f"{path}: {len(different)} tensors of the decoder differ from those of the text "
                f"encoder, and medm's decoder shares them: {', '.join(different[:3])} ... Such a "
                "file (fine-tuned without tied weights) cannot be represented; leave the head lm "
                "out, or start from the pretrained file"
            )
        bias = "cls.predictions.bias"
        second = decoder.get("cls.predictions.decoder.bias")
        if bias not in decoder and second is not None:
            bias = "cls.predictions.decoder.bias"
        elif second is not None and not torch.equal(second, decoder[bias]):
            raise CheckpointError(
                f"{path}: text_decoder.{bias} and .decoder.bias differ, and are one tensor in BLIP"
            )
        tied = _head_is_tied(self.parts)
        if not tied and model.decoder.words is None:
            raise CheckpointError(
                f"{path}: the matrix of its LM head is not that of the word embeddings; set "
                "model.text.lm_head: own"
            )
        own = {
            name: tensor
            for name, tensor in decoder.items()
            if any(re.match(pattern, name) for pattern, _ in _OF_DECODER) or name == bias
        }
        matrix = "cls.predictions.decoder.weight"
        if model.decoder.words is None:
            own.pop(matrix, None)
        elif matrix not in own:
            own[matrix] = shared[_WORDS]
        report = load_module(
            model.decoder,
            own,
            source=f"text.decoder from {path}",
            key_map=(*_OF_DECODER, (rf"^{re.escape(bias)}$", "bias")),
        )
        buffers = [name for name in decoder if re.search(_BUFFERS[0], name)]
        known = {*report.loaded, *buffers}
        equal = [f"bert.{name}" for name in shared if f"bert.{name}" not in known]
        equal += [name for name in (matrix, "cls.predictions.decoder.bias") if name in decoder]
        strangers = sorted(decoder.keys() - known - {*equal})
        if strangers:
            raise CheckpointError(
                f"{path}: {len(strangers)} tensors of the decoder are unknown: "
                f"{', '.join(strangers[:5])}"
            )
        self.report("text.decoder", sorted({*report.loaded, *equal}), buffers)
        if encoder:
            self.note("what the decoder shares with the text encoder is equal in the file")


def _different(encoder: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors that differ between encoder and decoder, where both are there.

    Self-attention is none of them: each has its own.
    """
    if not encoder:
        return []
    return [
        name
        for name, tensor in shared.items()
        if ".attention." not in name
        and not re.search(_BUFFERS[0], name)
        and (name not in encoder or not torch.equal(encoder[name], tensor))
    ]


def _head_is_tied(parts: Mapping[str, Mapping[str, Tensor]]) -> bool:
    decoder = parts["text.decoder"]
    matrix = decoder.get("cls.predictions.decoder.weight")
    words = decoder.get(f"bert.{_WORDS}")
    return matrix is None or (words is not None and torch.equal(matrix, words))


def _refuse_answers(parts: Mapping[str, Mapping[str, Tensor]], source: PretrainedSource) -> None:
    """Refuse the decoder of BLIP's question answering."""
    if parts["text.encoder"] and parts["text.decoder"] and not parts["itm"]:
        raise CheckpointError(
            f"{source.path}: a BLIP that answers questions. Its decoder attends to the text "
            "encoder's states of the question, and that of the kind blip to the image, so this "
            "model cannot be represented. Name it as model.path of a recipe without the head lm: "
            "image tower and text encoder are loaded, and the decoder is left out"
        )


def _text_config(config: Mapping[str, Any]) -> BlipTextConfig:
    """Return the config of the text encoder with the fields that a published config leaves out."""
    return BlipTextConfig(**config["text_config"])


def _check_first_token(model: MedmBlip, source: PretrainedSource) -> None:
    """Refuse a tokenizer whose token [DEC] is not the one that texts of the file begin with."""
    first = _text_config(source.config()).bos_token_id
    if first != model.ids.decoder_id:
        raise CheckpointError(
            f"{source.path}: its decoder begins a text with token {first}, and [DEC] is "
            f"{model.ids.decoder_id} in the tokenizer; set model.text.tokenizer to the one that "
            "the file was trained with (BLIP: bert-base-uncased, MOTOR: SciBERT)"
        )
