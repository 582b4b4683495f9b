"""Sections of a recipe from the configs of published models. Reads no tensor files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from medm.encoders import ENCODERS
from medm.encoders.sizes import whole
from medm.errors import CheckpointError
from medm.models.published.weights import PretrainedSource
from medm.types import Config

FAMILIES = {
    "qwen2": "qwen2.5",
    "qwen3": "qwen3",
    "llama": "llama-3.2",
    "phi": "phi",
    "phi3": "phi3",
}
"""Families of `medm.llms` by the `model_type` of their configs; others are `auto`."""

END_TOKENS = {"qwen2": "<|im_end|>", "phi": "<|endoftext|>", "phi3": "<|endoftext|>"}
"""What MedM-VL and TinyLLaVA end a reply with; Llama's depends on its generation and stands in its
tokenizer."""

_ENCODERS = {"clip": "clip", "siglip": "siglip", "m3dclip": "m3d-clip", "medmclip": "medm-clip"}
_CONNECTORS = {
    "mlp": "mlp",
    "spatial_pooling": "spatial-pooling",
    "attn_pooling": "attention-pooling",
}


@dataclass(frozen=True, slots=True)
class Hints:
    """Values that a user may know and the source lacks."""

    llm: str | None = None
    """Folder or id with the language model's config (and tokenizer, where the source has none)."""
    encoder: str | None = None
    """Folder or id with the encoder's config."""
    chat_template: str | None = None
    """Template by name or file, where it is not the published one."""
    preprocess: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """By branch, fields of the preprocessing that replace what the kind is known for."""
    tokenizer: str | None = None
    """Folder or id with the tokenizer of a dual encoder or a BLIP, where the source has none."""


@dataclass(slots=True)
class Section:
    """A recipe's `model` section without paths, and where its weights are."""

    family: str
    """Name of the language model's family."""
    architecture: Config
    """Config of the language model."""
    branches: dict[str, Config] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    """Part of the model -> part of the source."""
    chat_template: str | None = None
    """Template by name or file that the source was trained with; None where it does not say."""
    masks: Config | None = None
    """Mask head, where there is one."""
    control_tokens: list[str] | None = None

    def as_recipe(self, *, tokenizer: str, chat_template: str, dtype: str) -> Config:
        """Return the section as a recipe writes it."""
        llm = {
            "name": self.family,
            "architecture": self.architecture,
            "tokenizer": tokenizer,
            "chat_template": chat_template,
        }
        return {
            "llm": llm,
            "branches": self.branches,
            "masks": self.masks,
            "control_tokens": self.control_tokens,
            "dtype": dtype,
        }


def generation_of(config: Mapping[str, object]) -> str | None:
    """Return MedM-VL's generation of a config, None for other models.

    "C" has prefixed keys, "A/B" has not.
    """
    if any(key.startswith(("lvlm_llm_", "lvlm_encoder_", "lvlm_connector_")) for key in config):
        return "C"
    own = ("llm_type", "llm_config", "encoder_image_type", "encoder_image3d_type",
    "encoder_image_config",
           "encoder_image3d_config", "connector_image_config",
           "connector_image3d_config")  # fmt: skip
    return "A/B" if any(key in config for key in own) else None


def setting(config: Mapping[str, object], part: str, key: str) -> object:
    """One setting of a part, wherever a generation writes it.

    `lvlm_encoder_image_type` (C), `encoder_image_type` (A, B), or `type`, `encoder_type` or
    `encoder_image_type` in the nested `encoder_image_config` (A).
    """
    for name in (f"lvlm_{part}_{key}", f"{part}_{key}"):
        if config.get(name) is not None:
            return config[name]
    nested = _nested(config, f"{part}_config")
    for name in (f"{part}_{key}", f"{part.split('_')[0]}_{key}", key):
        if nested.get(name) is not None:
            return nested[name]
    return None


def _text(config: Mapping[str, object], part: str, key: str) -> str | None:
    value = setting(config, part, key)
    return None if value is None else str(value)


def _nested(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


def medm_vl_section(
    config: Mapping[str, object],
    groups: Mapping[str, Mapping[str, Tensor]],
    *,
    hints: Hints,
    notes: list[str],
) -> Section:
    """Return the `model` section that a MedM-VL folder stands for.

    Args:
        config: `config.json`.
        groups: tensors by part of the source, for what the config does not say.
        hints: see there.
        notes: appended to.
    """
    section = _llm(config, hints)
    for kind in ("image", "image3d"):
        encoder_part, connector_part = f"encoder_{kind}", f"connector_{kind}"
        if not groups[encoder_part]:
            continue
        name = _encoder_name(config, encoder_part, groups[encoder_part])
        connector = _connector(
            config, connector_part, groups[connector_part], encoder=name, notes=notes
        )
        encoder = _encoder(
            config, encoder_part, name, groups[encoder_part], hints=hints, notes=notes
        )
        branch: Config = {"encoder": encoder, "connector": connector}
        three_d = kind == "image3d"
        if not three_d and connector["name"] == "attention-pooling":
            # MedM-VL has one encoder for images and slices; queries over all slices are of a
            # volume.
            branch["encoder"] = {"name": "slices", "encoder": encoder}
            three_d = True
        target = "volume" if three_d else "image"
        if target in section.branches:
            raise CheckpointError(
                "the source has a 2-D encoder over slices and a 3-D encoder; expected one for "
                "volumes"
            )
        preprocess = dict(hints.preprocess.get(target, {}))
        if three_d and generation_of(config) != "C":
            preprocess = _scale(name, preprocess, notes)
        branch["preprocess"] = preprocess
        section.branches[target] = branch
        section.sources |= {
            f"{target}.encoder": encoder_part,
            f"{target}.connector": connector_part,
        }
    return section


def _scale(encoder: str, preprocess: Config, notes: list[str]) -> Config:
    """Return the preprocessing with the scale of volumes, which no config gives.

    Generations A and B read the numbers of files as they were.
    """
    is_given = "convention" in preprocess or "scale" in preprocess
    if encoder == "m3d-clip":
        if not is_given:
            notes.append(
                "volumes are expected as M3D prepared them, arrays of 0..1; for files in HU say "
                "--preprocess volume.convention=medm-vl, for arrays of 0..255 --preprocess "
                "volume.scale=0-255"
            )
        return preprocess if "convention" in preprocess else {"convention": "m3d", **preprocess}
    if not is_given:
        notes.append(
            "volumes are expected in HU, -1000..1000 of which become what the source's own "
            "arrays of 0..255 held; to give such arrays themselves say --preprocess "
            "volume.scale=0-255 and volume.windows=null"
        )
    return preprocess


def _llm(config: Mapping[str, object], hints: Hints) -> Section:
    nested = _nested(config, "llm_config") or _nested(config, "text_config")
    if hints.llm is None and "model_type" in nested:
        architecture = dict(nested)
    else:
        path = hints.llm or _text(config, "llm", "name_or_path")
        if path is None:
            raise CheckpointError(
                "config.json names no language model; give a folder or id with its config by --llm"
            )
        try:
            architecture = AutoConfig.from_pretrained(path, trust_remote_code=False).to_dict()
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"the language model's config is looked up as {path!r} and cannot be read "
                f"({error}); give a folder or id that has it by --llm"
            ) from None
    for foreign in (
        "transformers_version",
        "architectures",
        "torch_dtype",
        "dtype",
        "_name_or_path",
    ):
        architecture.pop(foreign, None)
    family = FAMILIES.get(str(architecture["model_type"]), "auto")
    if family == "llama-3.2" and setting(config, "llm", "type") == "llama":
        family = "auto"  # Llama 2 and TinyLlama
    return Section(family, architecture)


def _encoder_name(config: Mapping[str, object], part: str, tensors: Mapping[str, Tensor]) -> str:
    said = _text(config, part, "type")
    if said in _ENCODERS:
        return _ENCODERS[said]
    if said is not None:
        raise CheckpointError(
            f"{part}: encoder {said!r} is not imported; known are {', '.join(_ENCODERS)}"
        )
    marks = {
        "patch_embedding.patch_embeddings": "m3d-clip",
        "to_patch_embedding": "medm-clip",
        "embeddings.class_embedding": "clip",
        "embeddings.patch_embedding": "siglip",
    }
    for mark, name in marks.items():
        if any(mark in tensor for tensor in tensors):
            return name
    raise CheckpointError(f"{part}: neither the config nor the tensors say which encoder this is")


def _encoder(
    config: Mapping[str, object],
    part: str,
    name: str,
    tensors: Mapping[str, Tensor],
    *,
    hints: Hints,
    notes: list[str],
) -> Config:
    layer, feature = setting(config, part, "select_layer"), setting(config, part, "select_feature")
    if name == "siglip" and feature == "patch":
        raise CheckpointError(
            f"{part}: SigLIP with select_feature 'patch' drops its first image patch, which medm "
            "does not do; such a model cannot be imported without changing its answers"
        )
    has_class = name != "siglip"
    tokens = "cls_patch" if has_class and feature == "cls_patch" else "patch"
    return {
        "name": name,
        "tokens": tokens,
        "layer": -1 if layer is None else whole({"select_layer": layer}, "select_layer"),
        "architecture": _architecture(config, part, name, tensors, hints=hints, notes=notes),
    }


def _architecture(
    config: Mapping[str, object],
    part: str,
    name: str,
    tensors: Mapping[str, Tensor],
    *,
    hints: Hints,
    notes: list[str],
) -> Config:
    """Return the sizes of the tower.

    They come from the hint, the nested config, its own published config, or the tensors' shapes.
    """
    encoder = ENCODERS.get(name)
    nested = _nested(config, f"{part}_config")
    if hints.encoder is not None:
        return encoder.architecture_from(PretrainedSource(hints.encoder).config())
    if _says_heads(sizes := encoder.architecture_from(nested)):
        return sizes
    path = _text(config, part, "name_or_path")
    try:
        published = PretrainedSource(path).config() if path else {}
    except CheckpointError:
        published = {}
    sizes = encoder.architecture_from(published)
    if _says_heads(sizes):
        return sizes
    if name in ("m3d-clip", "medm-clip"):
        notes.append(
            f"{part}: no config of the tower at hand; it is taken to have the published sizes"
        )
        return {}
    return sizes_from_shapes(name, tensors, part=part, notes=notes)


def _says_heads(sizes: Mapping[str, object]) -> bool:
    return "num_attention_heads" in sizes and "hidden_size" in sizes


def sizes_from_shapes(
    name: str, tensors: Mapping[str, Tensor], *, part: str, notes: list[str]
) -> Config:
    """Return the sizes of a CLIP or SigLIP tower.

    Shapes do not tell the heads: published towers have heads 64 or 72 wide.
    """
    short = {key.removeprefix("vision_model."): tensor for key, tensor in tensors.items()}
    patches, positions = (
        short["embeddings.patch_embedding.weight"],
        short["embeddings.position_embedding.weight"],
    )
    dim, patch = patches.shape[0], patches.shape[-1]
    blocks = 1 + max(int(key.split(".")[2]) for key in short if key.startswith("encoder.layers."))
    side = round((len(positions) - (name == "clip")) ** 0.5) * patch
    width = next((size for size in (64, 72) if dim % size == 0), None)
    if width is None:
        raise CheckpointError(
            f"{part}: shapes of width {dim} do not tell the number of heads; give the tower by "
            "--encoder"
        )
    notes.append(
        f"{part}: no config of the tower at hand; read from shapes as {blocks} blocks of width "
        f"{dim}, {dim // width} heads, {side} pixels a side. Give the published tower by "
        "--encoder where this is not so"
    )
    return {
        "hidden_size": dim,
        "num_hidden_layers": blocks,
        "num_attention_heads": dim // width,
        "patch_size": patch,
        "image_size": side,
        "intermediate_size": short["encoder.layers.0.mlp.fc1.weight"].shape[0],
    } | ({"hidden_act": "quick_gelu"} if name == "clip" else {})


def _connector(
    config: Mapping[str, object],
    part: str,
    tensors: Mapping[str, Tensor],
    *,
    encoder: str,
    notes: list[str],
) -> Config:
    said = _text(config, part, "type")
    if said is None and any(key.rpartition(".")[2] == "query" for key in tensors):
        said = "attn_pooling"
    elif said is None and encoder in ("m3d-clip", "medm-clip"):
        said = "spatial_pooling"
        notes.append(
            f"{part}: the config does not name it, and its tensors are those of an MLP with or "
            "without pooling; taken to be spatial_pooling, with which every published 3-D tower "
            "was trained"
        )
    elif said is None:
        said = "mlp"
    if said not in _CONNECTORS:
        raise CheckpointError(
            f"{part}: connector {said!r} is not imported; known are {', '.join(_CONNECTORS)}"
        )
    depth = sum(key.endswith(".weight") and "attn." not in key for key in tensors)
    block: Config = {"name": _CONNECTORS[said], "depth": depth}
    if said == "attn_pooling":
        query = next(tensor for key, tensor in tensors.items() if key.rpartition(".")[2] == "query")
        block["queries"] = query.shape[-2]
    return block


def llava_section(
    config: Mapping[str, Any], preprocessor: Mapping[str, object], *, hints: Hints
) -> Section:
    """Return the `model` section of a stock LLaVA folder."""
    completed = AutoConfig.for_model(**config)  # llava-hf configs leave out what is at its default
    text, vision = completed.text_config.to_dict(), completed.vision_config.to_dict()
    types = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
    if vision["model_type"] not in types:
        raise CheckpointError(
            f"vision tower {vision['model_type']!r} is not imported; known are {', '.join(types)}"
        )
    if not isinstance(completed.vision_feature_layer, int):
        raise CheckpointError(
            f"features of several layers {completed.vision_feature_layer} joined are not imported"
        )
    name = types[vision["model_type"]]
    if name == "siglip" and completed.vision_feature_select_strategy == "default":
        raise CheckpointError(
            "SigLIP with strategy 'default' drops its first image patch, which medm does not do"
        )
    encoder = ENCODERS.get(name)
    architecture = encoder.architecture_from(vision)
    tokens = (
        "cls_patch"
        if name == "clip" and completed.vision_feature_select_strategy == "full"
        else "patch"
    )
    for foreign in (
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "_name_or_path",
    ):
        text.pop(foreign, None)
    branch: Config = {
        "encoder": {
            "name": name,
            "layer": completed.vision_feature_layer,
            "tokens": tokens,
            "architecture": architecture,
        },
        "connector": {"name": "mlp", "depth": 2, "activation": completed.projector_hidden_act},
        "preprocess": {
            **encoder.preprocess_from(preprocessor, architecture),
            **hints.preprocess.get("image", {}),
        },
    }
    return Section(
        family=FAMILIES.get(text["model_type"], "auto"),
        architecture=text,
        branches={"image": branch},
        sources={"image.encoder": "encoder_image", "image.connector": "connector_image"},
    )


def encoder_block(name: str, path: str, hints: Hints) -> Config:
    """Return the options of a tower that is imported whole.

    It keeps every block, so that any layer can be chosen later.
    """
    block: Config = {"name": name, "path": path}
    if name == "m3d-clip":
        block["norm"] = "after"  # keeps the last norm; recipes choose what layer -1 means
    if hints.encoder is not None:
        block["architecture"] = ENCODERS.get(name).architecture_from(
            PretrainedSource(hints.encoder).config()
        )
    return block
