"""Sections of a recipe from folders in InternVL's own layout: InternVL, Sa2VA, UniBiomed.

Their code is not run. `InternVLChatModel` and `Sa2VAChatModel` (arXiv 2501.04001) share one config:
`vision_config`, `llm_config`, and how the tokens of an image are made. Sa2VA adds SAM 2 under
Meta's names and a projection of the state at `[SEG]`. UniBiomed (arXiv 2504.21336) is a Sa2VA.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import CONFIG_MAPPING

from medm.encoders.internvit import InternViTEncoder
from medm.encoders.sizes import whole
from medm.errors import CheckpointError
from medm.models.published.source_configs import FAMILIES, Hints, Section
from medm.types import MASK_TOKEN, PHRASE_TOKENS, Config

MODEL_TYPES = {"internvl_chat": "internvl", "sa2va_chat": "sa2va"}
"""`model_type` of the configs to kinds of `medm import`."""

TEMPLATES = {
    "internlm2_chat": "chatml",
    "internvl2_5": "internvl-2.5",
    "phi3_chat": "phi-3",
    "qwen_chat": "chatml",
}
"""Names of chat templates in the configs to those of medm."""

PREFIXES = {
    "llm": r"^language_model\.",
    "encoder_image": r"^vision_model\.",
    "connector_image": r"^(?=mlp1\.)",
    "mask_head": r"^grounding_encoder\.sam2_model\.",
    "mask_projection": r"^text_hidden_fcs\.",
}
"""Parts of the files by the beginnings of their names."""

MASKS: Config = {
    "view": "image",
    "head": {"name": "sam2", "size": "large", "era": "2.0", "memory": True},
    "preprocess": {"interpolation": "bicubic"},
    "projection": {"depth": 2, "activation": "relu"},
    "state": "at",
}
"""Mask head of every Sa2VA on an InternVL base: its code names SAM 2.0 Hiera-L and no config says
so. Images are resized by Pillow's default filter, not by SAM 2's."""

_LLMS = ("qwen2", "llama", "qwen3")
"""Language models whose tensors have the names of transformers."""

_TILES: Config = {"max": 12, "min": 1, "thumbnail": True}
"""What Sa2VA's code sets whatever its config says."""

_OLDER_FIELDS = {"rope_theta", "rope_scaling"}
"""Fields that configs of transformers 4 have and those of 5 translate."""


def internvl_section(config: Mapping[str, object], *, hints: Hints, notes: list[str]) -> Section:
    """Return the `model` section of a folder.

    Args:
        config: `config.json`.
        hints: see there.
        notes: appended to.

    Raises:
        CheckpointError: a language model or a template that is not known, or images that are padded
            to a square.
    """
    sa2va = config.get("model_type") == "sa2va_chat"
    architecture = _llm(config)
    if config.get("pad2square"):
        raise CheckpointError("config.json: pad2square is set, which is not imported")
    vision = InternViTEncoder.architecture_from(config)
    ratio = config.get("downsample_ratio", 0.5)
    window = round(1 / float(ratio)) if isinstance(ratio, (int, float)) and ratio else 0
    if window < 1 or abs(1 / window - float(str(ratio))) > 1e-6:
        raise CheckpointError(
            f"config.json: downsample_ratio: expected one of 1, 0.5, 0.25 ..., found {ratio!r}"
        )
    side = config.get("force_image_size")
    preprocess = InternViTEncoder.preprocess_from(
        {}, vision, whole({"force_image_size": side}, "force_image_size") if side else None
    )
    if sa2va or config.get("dynamic_image_size"):
        preprocess["tiles"] = dict(_TILES) if sa2va else _tiles(config)
    branch: Config = {
        "encoder": {
            "name": "internvit",
            "layer": whole({"select_layer": config.get("select_layer", -1)}, "select_layer"),
            "architecture": vision,
        },
        "connector": {
            "name": "pixel-shuffle",
            "window": window,
            "version": config.get("ps_version", "v1"),
        },
        "preprocess": {**preprocess, **hints.preprocess.get("image", {})},
        "wrap": ["<img>", "</img>"],
    }
    section = Section(
        family=FAMILIES.get(str(architecture["model_type"]), "auto"),
        architecture=architecture,
        branches={"image": branch},
        sources={"image.encoder": "encoder_image", "image.connector": "connector_image"},
        chat_template=hints.chat_template or _template(config, notes),
    )
    if sa2va:
        section.masks = dict(MASKS)
        section.control_tokens = [MASK_TOKEN, *PHRASE_TOKENS]
        section.sources |= {"masks.head": "mask_head", "masks.projection": "mask_projection"}
        notes.append(
            "SAM 2 is taken to be Hiera-L of SAM 2.0 and images to be cut into at most 12 tiles "
            "with a thumbnail: Sa2VA's code says so, and no config"
        )
    return section


def _llm(config: Mapping[str, object]) -> Config:
    """Return the fields of the language model's config that the installed transformers knows."""
    given = config.get("llm_config")
    if not isinstance(given, Mapping):
        raise CheckpointError("config.json: expected llm_config, an object")
    kind = str(given.get("model_type"))
    if kind not in _LLMS:
        raise CheckpointError(
            f"config.json: llm_config: a language model of type {kind!r} is not imported; known "
            f"are {', '.join(_LLMS)}"
        )
    # Configs of transformers 4 hold every setting of generation, too.
    own = CONFIG_MAPPING[kind]().to_dict()
    foreign = {"transformers_version", "architectures", "torch_dtype", "dtype"}
    known = {key for key in own.keys() | _OLDER_FIELDS if not key.startswith("_")} - foreign
    return {"model_type": kind} | {key: value for key, value in given.items() if key in known}


def _tiles(config: Mapping[str, object]) -> Config:
    counts = {"min": 1, "max": 6} | {
        side: whole(config, f"{side}_dynamic_patch")
        for side in ("min", "max")
        if config.get(f"{side}_dynamic_patch") is not None
    }
    return {**counts, "thumbnail": bool(config.get("use_thumbnail"))}


def _template(config: Mapping[str, object], notes: list[str]) -> str:
    """Return medm's name of the chat template that a config names."""
    name = str(config.get("template")).replace("-", "_").replace(".", "_")
    if name not in TEMPLATES:
        raise CheckpointError(
            f"config.json: template {config.get('template')!r} is not known; expected one of "
            f"{', '.join(TEMPLATES)}, or give one with --chat-template"
        )
    notes.append(f"prompts have the template {TEMPLATES[name]!r}, as the config says")
    return TEMPLATES[name]
