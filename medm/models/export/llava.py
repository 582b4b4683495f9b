"""An LVLM as transformers' own `LlavaForConditionalGeneration`, where the two compute the same.

The stock class knows one vision tower (here CLIP or SigLIP), linear - activation - linear, and a
language model whose head has no bias. Everything else is refused with a reason.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import (
    BaseImageProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaProcessor,
    SiglipImageProcessor,
)

from medm.encoders.vit import HFViTEncoder
from medm.errors import ExportError
from medm.imaging import ImagePreprocess, Preprocess
from medm.models.lvlm.configuration import BranchEntry
from medm.models.lvlm.modeling import Branch, LVLMForConditionalGeneration
from medm.models.lvlm.processing import LVLMProcessor
from medm.types import Config

_VISION_TYPES = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Numbers of Pillow's filters."""

_FLATTEN = (
    "{%- set medm = namespace(turns=[], text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set medm.text = message['content'] -%}"
    "{%- else -%}{%- set medm.text = '' -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{%- set medm.text = medm.text + part['text'] -%}"
    "{%- else -%}{%- set medm.text = medm.text + 'IMAGE\\n' -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set medm.turns = medm.turns + [{'role': message['role'], 'content': medm.text}] -%}"
    "{%- endfor -%}{%- set messages = medm.turns -%}"
)
"""Content that comes in parts, as servers hand it over, to the text that the model was
trained on."""


def save_llava(model: LVLMForConditionalGeneration, processor: LVLMProcessor, folder: Path) -> None:
    """Write the stock layout into an empty folder.

    Args:
        model: an LVLM without adapters.
        processor: its processor.
        folder: exists.

    Raises:
        ExportError: the stock class would compute something else.
    """
    refuse_what_differs(model, processor)
    branch, entry = model.branch("image"), model.config.branch("image")
    encoder, preprocess = branch.encoder, processor.preprocess["image"]
    if not isinstance(encoder, HFViTEncoder) or not isinstance(preprocess, ImagePreprocess):
        raise ExportError(
            f"expected an image tower of transformers, found {type(encoder).__name__} with "
            f"{type(preprocess).__name__}"
        )
    strategy: Literal["default", "full"] = (
        "default" if encoder.has_class_token and encoder.tokens == "patch" else "full"
    )
    side, patch = branch.spatial[0], encoder.patch_size
    text_config = copy.deepcopy(model.config.get_text_config())
    text_config._name_or_path = ""  # a folder of the machine that trained it
    config = LlavaConfig(
        vision_config=_vision_config(encoder, str(entry.encoder["name"]), side),
        text_config=text_config,
        image_token_index=entry.placeholder_id,
        image_seq_length=branch.num_tokens,
        projector_hidden_act=entry.connector.get("activation", "gelu"),
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-2,
        multimodal_projector_bias=True,
        tie_word_embeddings=bool(text_config.tie_word_embeddings),
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = model.dtype
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_torch_state_dict(_tensors(model, encoder), folder, safe_serialization=True)
    template = stock_template(
        str(processor.chat_template),
        processor.template_kwargs,
        image_token=processor.branches["image"]["placeholder"],
    )
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = template
    image_processor = _image_processor(preprocess, side)
    LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        chat_template=template,
        image_token=processor.branches["image"]["placeholder"],
        num_additional_image_tokens=int(encoder.has_class_token),
    ).save_pretrained(folder)
    # Servers and older readers look for the image processor in a file of its own.
    image_processor.save_pretrained(folder)


def refuse_what_differs(model: LVLMForConditionalGeneration, processor: LVLMProcessor) -> None:
    """Raises `ExportError` with everything that the stock class cannot compute."""
    reasons = []
    if set(model.config.branches) != {"image"}:
        reasons.append(
            "it has one image branch and no other; this model has "
            f"{sorted(model.config.branches) or 'none'}"
        )
    else:
        branch, entry = model.branch("image"), model.config.branch("image")
        reasons += _vision_reasons(branch, entry, processor.preprocess["image"])
        spec = processor.branches["image"]
        if wrap := [spec[side] for side in ("before", "after") if spec.get(side)]:
            reasons.append(
                f"its prompts have nothing around an image; this model's have {' and '.join(wrap)}"
            )
    if end := processor.chat.end_text:
        reasons.append(f"its replies end with a token; this model's end with the text {end!r}")
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None and float(bias.detach().abs().max()) > 0:
        reasons.append(
            "its head has no bias; without the bias of this "
            f"{model.config.get_text_config().model_type} model the logits would change by up to "
            f"{float(bias.detach().abs().max()):.3g}"
        )
    if reasons:
        raise ExportError(
            "not exportable to transformers' LlavaForConditionalGeneration: " + "; ".join(reasons)
        )


def _vision_reasons(branch: Branch, entry: BranchEntry, preprocess: Preprocess) -> list[str]:
    reasons = []
    encoder, connector = entry.encoder["name"], entry.connector
    if encoder not in _VISION_TYPES or not isinstance(branch.encoder, HFViTEncoder):
        reasons.append(f"its towers are {' and '.join(_VISION_TYPES)}; this model has {encoder!r}")
    elif branch.encoder.tokens == "cls":
        reasons.append("it hands on patches; this model hands on the class token alone")
    elif branch.encoder.norm == "after" or branch.encoder.pooled_dim is not None:
        reasons.append(
            "it takes tokens before the final layer norm and no pooled vector; this model has "
            f"norm {branch.encoder.norm!r} and pooled {branch.encoder.pooled_dim is not None}"
        )
    if connector["name"] != "mlp" or connector.get("depth", 2) != 2:
        found = (
            f"{connector['name']} of depth {connector['depth']}"
            if "depth" in connector
            else connector["name"]
        )
        reasons.append(
            "its connector is linear, activation, linear ('mlp' of depth 2); this model has "
            f"{found}"
        )
    if branch.knowledge is not None:
        reasons.append("it has no knowledge; this model's vision tokens attend to some")
    height, width = branch.spatial
    if height != width:
        reasons.append(f"its images are square; this model takes {height} x {width}")
    if not isinstance(preprocess, ImagePreprocess) or preprocess.channels != 3:
        reasons.append("its images have three channels; this model's have one")
    elif preprocess.tiles is not None:
        reasons.append(
            "its images are resized to one square; this model's are cut into up to "
            f"{preprocess.max_items} tiles"
        )
    elif preprocess.fit == "pad":
        reasons.append(
            "its processor pads before it resizes; with 'fit: pad' images would differ at their "
            "borders"
        )
    return reasons


def _vision_config(encoder: HFViTEncoder, name: str, side: int) -> Config:
    """The tower's config with one block more than is used.

    The stock class takes the output of the block before the last. In that place every reader,
    servers included, agrees that no norm comes after it; about the last block they do not.
    """
    config = encoder.tower.config.to_dict()
    return config | {
        "model_type": _VISION_TYPES[name],
        "num_hidden_layers": config["num_hidden_layers"] + 1,
        "image_size": side,
    }


def _tensors(model: LVLMForConditionalGeneration, encoder: HFViTEncoder) -> dict[str, Tensor]:
    """Every weight by its name in published LLaVA checkpoints."""
    tensors = {
        f"language_model.model.{k}": v
        for k, v in model.language_model.base_model.state_dict().items()
    }
    if not model.config.get_text_config().tie_word_embeddings:
        tensors["language_model.lm_head.weight"] = model.get_output_embeddings().weight
    branch = model.branch("image")
    for name, tensor in _tower_tensors(encoder, branch.spatial[0]).items():
        tensors[f"vision_tower.vision_model.{name}"] = tensor
    weights = branch.connector.state_dict()
    for own, stock in ((0, "linear_1"), (2, "linear_2")):
        for kind in ("weight", "bias"):
            tensors[f"multi_modal_projector.{stock}.{kind}"] = weights[f"layers.{own}.{kind}"]
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _tower_tensors(encoder: HFViTEncoder, side: int) -> dict[str, Tensor]:
    """Return the tower's weights with an unused block at the end and an unused norm.

    Positions are those of the size in use.
    """
    tensors = {
        k: v for k, v in encoder.tower.state_dict().items() if not k.endswith("position_ids")
    }
    blocks = encoder.tower.config.num_hidden_layers
    last = f"encoder.layers.{blocks - 1}."
    for name in [name for name in tensors if name.startswith(last)]:
        tensors[name.replace(last, f"encoder.layers.{blocks}.")] = torch.zeros_like(tensors[name])
    tensors["post_layernorm.weight"] = torch.ones(encoder.dim, dtype=encoder.tower.dtype)
    tensors["post_layernorm.bias"] = torch.zeros(encoder.dim, dtype=encoder.tower.dtype)
    if side != encoder.native_size:
        tensors["embeddings.position_embedding.weight"] = _positions(encoder, side)
    return tensors


@torch.no_grad()
def _positions(encoder: HFViTEncoder, side: int) -> Tensor:
    """Position embeddings interpolated once, as the encoder does at each forward."""
    cells = (side // encoder.patch_size) ** 2 + int(encoder.has_class_token)
    blank = torch.zeros(1, cells, encoder.dim, **encoder.device_and_dtype)
    return cast(Tensor, encoder.tower.embeddings.interpolate_pos_encoding(blank, side, side)[0])


def _image_processor(preprocess: ImagePreprocess, side: int) -> BaseImageProcessor:
    """Return transformers' processor that gives the same pixels.

    Servers count tokens with `crop_size`.
    """
    common: dict[str, Any] = {
        "resample": _RESAMPLE[preprocess.interpolation],
        "image_mean": per_channel(preprocess.mean),
        "image_std": per_channel(preprocess.std),
        "crop_size": {"height": side, "width": side},
    }
    if preprocess.fit == "crop":
        return CLIPImageProcessor(size={"shortest_edge": side}, do_center_crop=True, **common)
    return SiglipImageProcessor(
        size={"height": side, "width": side}, do_center_crop=False, **common
    )


def per_channel(values: list[float]) -> list[float]:
    """Three values, where one may stand for all."""
    return [float(value) for value in (values * 3 if len(values) == 1 else values)]


def stock_template(template: str, variables: Mapping[str, object], *, image_token: str) -> str:
    """Return a chat template that needs nothing from medm.

    Variables inside it are fixed; content is text or parts.
    """
    fixed = "".join(f"{{%- set {name} = {literal(value)} -%}}" for name, value in variables.items())
    return fixed + _FLATTEN.replace("IMAGE", image_token) + template


def literal(value: object) -> str:
    """A plain value as Jinja writes it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if isinstance(value, (int, float)):
        return repr(value)
    raise ExportError(f"the chat template's variable {value!r} is neither text, number nor boolean")
