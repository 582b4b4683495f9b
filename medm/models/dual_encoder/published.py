"""Published dual encoders: their `model` section, and their weights in every part of a model.

`PretrainedSource` gives all of them under the names of transformers' `CLIPModel`
(`medm.models.published.open_clip`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from medm.errors import CheckpointError
from medm.models.published.weights import LoadReport, PretrainedSource, group, load_module
from medm.types import Config

if TYPE_CHECKING:
    from medm.models.dual_encoder.modeling import DualEncoder

logger = logging.getLogger(__name__)

_BUFFERS = (r"position_ids$", r"^(attn_mask|context_length|vocab_size|input_resolution)$")


class _Part(NamedTuple):
    """A module, and how published names become its own (`load_module`)."""

    module: nn.Module
    key_map: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    truncated: tuple[str, ...] = ()


def load_published(model: DualEncoder, source: PretrainedSource) -> list[LoadReport]:
    """Load a published dual encoder into a new model.

    Returns:
        A report for each part, under the names of the file.

    Raises:
        CheckpointError: a tensor is missing, unexpected or misshaped, or belongs to a part that the
            model does not have.
    """
    tensors = source.tensors()
    image, text = model.image, model.text
    prefixes = {
        "image.projection": r"^visual_projection\.",
        "text.projection": r"^text_projection\.",
        "scale": r"^(?=logit_(scale|bias)$)",
        "image.norm": r"^vision_model\.(post_layernorm|norm)\.",
        "image.head": r"^vision_model\.head\.",
        "image.encoder": r"^vision_model\.",
        "text.encoder": r"^text_model\.",
    }
    pooling = image.readout.pooling
    if not pooling.norm.state_dict():
        del prefixes["image.norm"]  # the encoder knows it, or leaves it out
    if pooling.head is None:
        del prefixes["image.head"]
    groups = group(tensors, prefixes, source=source.path)
    names = group({name: name for name in tensors}, prefixes, source=source.path)
    groups["scale"] = {name: tensor.reshape(1) for name, tensor in groups["scale"].items()}
    encoder = image.encoder.inner or image.encoder
    parts = {
        "image.encoder": _Part(
            encoder,
            type(encoder).key_map,
            (*type(encoder).ignored_keys, *_BUFFERS),
            type(encoder).truncated_keys,
        ),
        "image.projection": _Part(image.readout.projection),
        "text.encoder": _Part(
            text.encoder, text.encoder.key_map, (*text.encoder.ignored_keys, *_BUFFERS)
        ),
        "text.projection": _Part(text.projection),
        "scale": _Part(model.scale),
    }
    if "image.norm" in prefixes:
        parts["image.norm"] = _Part(pooling.norm)
    if pooling.head is not None:
        parts["image.head"] = _Part(pooling.head)
    reports = []
    for part, rules in parts.items():
        report = load_module(
            rules.module,
            groups[part],
            source=f"{part} from {source.path}",
            key_map=rules.key_map,
            ignored=rules.ignored,
            truncated=rules.truncated,
        )
        report.source = part
        in_file = {own: source.in_file(name) for own, name in names[part].items()}
        report.loaded = sorted({in_file[name] for name in report.loaded})
        report.ignored = sorted({in_file[name] for name in report.ignored})
        reports.append(report)
    return reports


def load_readout(model: DualEncoder, source: PretrainedSource) -> list[LoadReport]:
    """Load what stands behind the image encoder of a published dual encoder, where the recipe names
    it as the path of that encoder alone: norm, pooling head and projection.

    Parts that the model or the source does not have are left as they are. So are those of other
    shapes (a projection to another width), which the log says.

    Raises:
        CheckpointError: the source cannot be read.
    """
    if source.is_bundle():
        return []
    tensors, readout = source.encoder_tensors(), model.image.readout
    tensors |= source.tensors_under("visual_projection.")  # it is no part of a tower by itself
    parts: list[tuple[str, nn.Module | None, str]] = [
        ("norm", readout.pooling.norm, r"(?:vision_model\.)?(?:post_layernorm|norm)\."),
        ("head", readout.pooling.head, r"(?:vision_model\.)?head\."),
        ("projection", readout.projection, r"visual_projection\."),
    ]
    reports = []
    for name, module, pattern in parts:
        found = {
            key[match.end() :]: tensor
            for key, tensor in tensors.items()
            if (match := re.match(pattern, key))
        }
        own = module.state_dict() if module is not None else {}
        if not found or not own:
            continue
        shapes = {key: tuple(tensor.shape) for key, tensor in found.items()}
        if shapes != (expected := {key: tuple(tensor.shape) for key, tensor in own.items()}):
            logger.info(
                "%s: image %s of shapes %s, and the recipe's has %s; that of the model starts from "
                "new weights",
                source.path,
                name,
                shapes,
                expected,
            )
            continue
        assert module is not None
        reports.append(load_module(module, found, source=f"image.{name} from {source.path}"))
    return reports


def published_section(
    source: PretrainedSource,
    *,
    tokenizer: str | None = None,
    preprocess: Mapping[str, object] | None = None,
) -> Config:
    """Return the `model` section of a published dual encoder.

    Args:
        source: its weights.
        tokenizer: folder or id, where the source has none.
        preprocess: fields that replace what is known of it.

    Raises:
        CheckpointError: it is none of those that are known.
    """
    tensors = source.tensors()
    names = set(tensors)
    if not {"logit_scale"} <= names or not any(name.startswith("text_model.") for name in names):
        raise CheckpointError(
            f"{source.path}: no dual encoder; expected the tensors of an image tower, a text tower "
            "and a logit_scale"
        )
    siglip = "vision_model.head.probe" in names
    timm = any(name.startswith("vision_model.blocks.") for name in names)
    bert = "text_model.embeddings.word_embeddings.weight" in names
    mlp, linear = "text_projection.0.weight" in names, "text_projection.weight" in names
    if mlp:
        width = len(tensors["text_projection.2.weight"])
    elif linear:
        width = len(tensors["text_projection.weight"])
    elif siglip and "text_model.head.weight" in names:
        width = len(tensors["text_model.head.weight"])
    else:
        raise CheckpointError(
            f"{source.path}: the width of the common space is not known; expected a "
            "text_projection, or the head of SigLIP"
        )
    bias = tensors.get("logit_bias")
    projected = "visual_projection.weight" in names
    return {
        "kind": "dual-encoder",
        "path": source.path,
        "image": {
            "encoder": {"name": "siglip" if siglip else "vit" if timm else "clip"},
            "pool": "attention" if siglip else "cls",
            "projection": "linear" if projected else "none",
            "preprocess": dict(preprocess or {}),
        },
        "text": {
            "encoder": {"name": "bert" if bert else "siglip-text" if siglip else "clip-text"},
            "projection": "mlp" if mlp else "linear" if linear else "none",
            "tokenizer": tokenizer,
        },
        "embed_dim": width,
        "logit_bias": None if bias is None else float(bias),
    }
