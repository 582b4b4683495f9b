"""ViT-like vision towers that transformers opens by their config.

One encoder for many published families.

Nothing here is a model of its own: the class is the one that transformers has for the config's
`model_type`. Properties that differ between families (the name of the final norm, tokens in front
of the patches, interpolation of positions) are read from the built tower. Remote code is never run.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from medm.encoders import NormPlace, PrefixTokens
from medm.encoders.base import VisionEncoder
from medm.encoders.preprocessor_file import published_fields
from medm.encoders.sizes import whole
from medm.encoders.vit import num_blocks
from medm.errors import RecipeError
from medm.types import Config, VisionFeatures

logger = logging.getLogger(__name__)

_NORMS = ("layernorm", "norm", "post_layernorm", "rms_norm")
"""Names of the final norm in the towers of transformers."""

_PREFIX_PARAMETERS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
"""Parameters of an embedding that become tokens in front of the patches."""

_HEAD_FIELDS = ("vision_use_head", "use_head")
"""Fields of configs that build a pooling head."""

_NOT_A_GRID = {
    "qwen2_vl": "it packs patches of images of any size into one sequence and merges 2 x 2 of them",
    "qwen2_5_vl": "it packs patches of images of any size into one sequence, attends within "
    "windows and merges 2 x 2 patches inside the tower",
    "qwen3_vl": "it packs patches of images of any size into one sequence and merges 2 x 2 of them",
    "gemma4": "it takes patches with their positions, not pixels",
    "internvl_chat": "it is in the layout of InternVL's own code; name the encoder internvit, "
    "which reads it",
}
"""By `model_type` of a whole model, or its beginning, the reason why its tower has no fixed grid of
patches."""

_IMAGENET: Config = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_CLIP: Config = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}
_USUAL: dict[str, Config] = {
    "dinov2": {**_IMAGENET, "fit": "crop"},
    "dinov2_with_registers": {**_IMAGENET, "fit": "crop"},
    "dinov3_vit": {**_IMAGENET, "interpolation": "bilinear"},
    "internvl_vision": _IMAGENET,
    "clip_vision_model": {**_CLIP, "fit": "crop"},
    "aimv2_vision_model": {**_CLIP, "fit": "crop"},
}
"""Preprocessing of a family's published folders, for a recipe that names none. Others: mean and std
0.5."""


class HFVisionEncoder(VisionEncoder):
    """A tower of transformers up to the requested layer.

    Args:
        architecture: `config.json` of the tower, `model_type` included.
        others: see `HFVisionOptions`.
    """

    key_map: ClassVar = ((r"^", "tower."),)
    ignored_keys: ClassVar = (
        r"position_ids$",
        r"(^|\.)mask_token$",  # of pretraining
        r"^(classifier|cls_classifier|distillation_classifier|decoder)\.",
        r"^(text_model\.|text_projection\.|visual_projection\.|logit_scale$|logit_bias$)",
    )
    truncated_keys: ClassVar = (
        r"^tower\.(.+\.)?layers?\.\d+\.",
        rf"^tower\.({'|'.join(_NORMS)}|head|pooler)\.",
    )

    def __init__(
        self,
        *,
        architecture: Mapping[str, object],
        layer: int = -1,
        tokens: PrefixTokens = "patch",
        norm: NormPlace = "before",
        pooled: bool = False,
        pixel_shuffle: int = 1,
    ) -> None:
        super().__init__()
        config = _config(architecture)
        blocks = num_blocks(layer, depth=config.num_hidden_layers, last=norm == "after" or pooled)
        config.num_hidden_layers = blocks
        self.tower: Any = _tower(config, pooled=pooled)
        self.kind = str(config.model_type)
        self.dim = int(config.hidden_size) * pixel_shuffle**2
        self.tokens, self.norm, self.shuffle = tokens, norm, pixel_shuffle
        self.patch_size, self.native_size = _patch(config), _side(config)
        self.channels = (int(config.num_channels),)
        self._count_prefix(tokens)
        self._drop_unused(keep_norm=norm == "after" or pooled)
        self.pooled_dim = self._pooled_dim(config) if pooled else None
        takes = inspect.signature(type(self.tower).forward).parameters
        self._takes_patches = "spatial_shapes" in takes
        self._interpolates = "interpolate_pos_encoding" in takes
        self._native_only = not (
            self._takes_patches
            or self._interpolates
            or hasattr(self.tower.embeddings, "interpolate_pos_encoding")
            or hasattr(self.tower, "rope_embeddings")
            or getattr(config, "is_native", False)
        )
        self._told_sizes: set[tuple[int, ...]] = set()

    def _count_prefix(self, tokens: PrefixTokens) -> None:
        """Tokens in front of the patches, as the embedding's parameters say."""
        found = {
            name: int(parameter.numel()) // int(self.tower.config.hidden_size)
            for name in _PREFIX_PARAMETERS
            if isinstance(parameter := getattr(self.tower.embeddings, name, None), Tensor)
        }
        self.has_class_token = "cls_token" in found or "class_embedding" in found
        self._all_prefix = sum(found.values())
        if tokens == "cls" and not self.has_class_token:
            raise RecipeError(
                f"{self.kind} has no class token; expected tokens 'patch', found {tokens!r}"
            )
        if self.shuffle > 1 and tokens != "patch":
            raise RecipeError(
                f"pixel_shuffle {self.shuffle} joins patches; expected tokens 'patch', found "
                f"{tokens!r}"
            )
        kept = {"patch": 0, "prefix_patch": self._all_prefix}
        self.prefix = kept.get(tokens, int(self.has_class_token))

    def _drop_unused(self, *, keep_norm: bool) -> None:
        """Weights that the output does not depend on would get no gradient."""
        embeddings = self.tower.embeddings
        if isinstance(mask := getattr(embeddings, "mask_token", None), nn.Parameter):
            # Read in pretraining only. A buffer, because transformers' initialization of the module
            # sets it.
            del embeddings.mask_token
            embeddings.register_buffer("mask_token", mask.detach(), persistent=False)
        name = next((name for name in _NORMS if hasattr(self.tower, name)), None)
        if name is None:
            raise RecipeError(
                f"{self.kind}: no final norm among {', '.join(_NORMS)}; hf-vision does not know "
                "this tower"
            )
        # CLIP's family norms the class token alone, behind its `last_hidden_state`.
        self._norm_is_for_pooling = hasattr(self.tower, "pre_layrnorm")
        self._norm_name = name
        if not keep_norm:
            setattr(self.tower, name, nn.Identity())

    def _pooled_dim(self, config: PreTrainedConfig) -> int:
        if self._norm_is_for_pooling or self.kind in (
            "dinov2",
            "dinov2_with_registers",
            "dinov3_vit",
        ):
            return int(config.hidden_size)
        if getattr(self.tower, "head", None) is not None:
            return int(config.hidden_size)
        if getattr(self.tower, "pooler", None) is not None:
            return int(getattr(config, "pooler_output_size", None) or config.hidden_size)
        raise RecipeError(
            f"{self.kind} has no pooled vector in transformers; expected pooled false"
        )

    def grid(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        rows, columns = self.patch_size
        if len(spatial) != 2 or spatial[0] < rows or spatial[1] < columns:
            raise ValueError(
                f"expected an image of at least {rows} x {columns} pixels, found {spatial}"
            )
        if self._native_only and spatial != self.native_size:
            raise ValueError(
                f"expected an image of {self.native_size} pixels, found {spatial}: transformers "
                f"does not interpolate the positions of {self.kind}"
            )
        cells = (spatial[0] // rows, spatial[1] // columns)
        if any(count % self.shuffle for count in cells):
            raise ValueError(
                f"expected an image whose grid of patches divides by pixel_shuffle {self.shuffle}, "
                f"found {spatial} with a grid of {cells}"
            )
        if self.tokens == "cls":
            return (0,)
        return tuple(count // self.shuffle for count in cells)

    def forward(self, pixels: Tensor) -> VisionFeatures:
        """pixels: (B, C, height, width)."""
        spatial = tuple(pixels.shape[2:])
        grid = self.grid(spatial)
        self._tell(spatial)
        hidden, pooled = self._run(pixels.to(self.device_and_dtype["dtype"]))
        cells = (spatial[0] // self.patch_size[0]) * (spatial[1] // self.patch_size[1])
        if hidden.shape[1] != self._all_prefix + cells:
            raise RecipeError(
                f"{self.kind} gives {hidden.shape[1]} tokens for an image of {spatial}; expected "
                f"{self._all_prefix} in front and {cells} patches: hf-vision does not know this "
                "tower"
            )
        prefix, patches = hidden[:, : self._all_prefix], hidden[:, self._all_prefix :]
        if self.tokens == "cls":
            tokens = prefix[:, :1]
        elif self.shuffle > 1:
            rows = spatial[0] // self.patch_size[0]
            tokens = pixel_shuffle(patches, rows=rows, factor=self.shuffle)
        else:
            tokens = torch.cat([prefix[:, : self.prefix], patches], dim=1)
        return VisionFeatures(tokens, grid=grid, prefix=self.prefix, pooled=pooled)

    def _run(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return all tokens (B, prefix + patches, D) and the pooled vector.

        The tokens are taken before or after the final norm.
        """
        inputs: dict[str, Any] = {"pixel_values": pixels}
        if self._takes_patches:
            inputs = self._patches(pixels)
        elif self._interpolates:
            inputs["interpolate_pos_encoding"] = tuple(pixels.shape[2:]) != self.native_size
        # The tower norms what it returns; where the norm is kept for pooling alone, the last
        # block's output is among the hidden states.
        before = self.norm == "before" and self.pooled_dim is not None
        before = before and not self._norm_is_for_pooling
        outputs = self.tower(**inputs, output_hidden_states=before)
        hidden = outputs.hidden_states[-1] if before else outputs.last_hidden_state
        if self.norm == "after" and self._norm_is_for_pooling:
            hidden = getattr(self.tower, self._norm_name)(hidden)
        return hidden, None if self.pooled_dim is None else outputs.pooler_output

    def _patches(self, pixels: Tensor) -> dict[str, Any]:
        """Return the inputs of a tower that takes patches of any grid (SigLIP 2 NaFlex).

        Here all patches are of one grid.
        """
        rows, columns = (n // p for n, p in zip(pixels.shape[2:], self.patch_size, strict=True))
        height, width = self.patch_size
        pixels = pixels[:, :, : rows * height, : columns * width]
        patches = rearrange(
            pixels, "b c (rows h) (columns w) -> b (rows columns) (h w c)", h=height, w=width
        )
        return {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(
                patches.shape[:2], dtype=torch.long, device=pixels.device
            ),
            "spatial_shapes": torch.tensor([[rows, columns]] * len(pixels), device=pixels.device),
        }

    def _tell(self, spatial: tuple[int, ...]) -> None:
        if spatial == self.native_size or spatial in self._told_sizes:
            return
        self._told_sizes.add(spatial)
        logger.warning(
            "positions of %s for images of %s pixels are made those of %s",
            self.kind,
            self.native_size,
            spatial,
        )

    def rename_published(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map published names to those of the installed transformers.

        transformers renames modules from time to time.

        transformers' own loading does it, so that every layout that it opens is opened here.
        """
        own_names = all(name.startswith("tower.") for name in tensors)  # of a bundle
        front = "tower." if own_names else ""
        given = {name.removeprefix(front): tensor for name, tensor in tensors.items()}
        loaded, report = _load(
            type(self.tower), self.tower.config, given, pooled=self.pooled_dim is not None
        )
        missing = set(report["missing_keys"])
        own = {name: value for name, value in loaded.state_dict().items() if name not in missing}
        # `load_module` checks names and shapes.
        for name, found, _ in report["mismatched_keys"]:
            own[name] = torch.empty(found, device="meta")
        base = f"{type(self.tower).base_model_prefix}."
        unknown = {name.removeprefix(base) for name in report["unexpected_keys"]}
        own |= {name: torch.empty(0) for name in unknown if name not in own}
        return {f"{front}{name}": tensor for name, tensor in own.items()}

    @classmethod
    def architecture_from(cls, published: Mapping[str, object]) -> Config:
        """Return the tower's own config: `vision_config` of a larger model, or all of it."""
        if not published:
            return {}
        kind = str(published.get("model_type", ""))
        for name, reason in _NOT_A_GRID.items():
            if kind.startswith(name):
                raise RecipeError(f"hf-vision does not take the tower of {kind}: {reason}")
        config = _completed(published)
        vision = getattr(config, "vision_config", config)
        fields = vision.to_dict()
        foreign = ("transformers_version", "architectures", "dtype", "torch_dtype")
        return {
            key: value
            for key, value in fields.items()
            if key not in (*foreign, "id2label", "label2id") and not key.startswith("_")
        }

    @classmethod
    def preprocess_from(
        cls,
        published: Mapping[str, object],
        architecture: Mapping[str, object],
        image_size: int | None = None,
    ) -> Config:
        usual = _USUAL.get(str(architecture.get("model_type")), {})
        side = image_size or _published_side(published)
        if side is None and "model_type" in architecture:
            config = _config(architecture)
            side = max(_side(config))
        fields: Config = {"kind": "image", **usual}
        if side is not None:
            fields["size"] = [side, side]
        fields |= published_fields(published)
        if (fit := _published_fit(published)) is not None:
            fields["fit"] = fit
        if published.get("do_normalize") is False:
            fields |= {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
        return fields


def pixel_shuffle(patches: Tensor, *, rows: int, factor: int) -> Tensor:
    """Join squares of neighboring patches, as InternVL does.

    (B, rows * columns, D) to (B, cells, factor² * D).

    Args:
        patches: in the order of the grid, the columns fastest.
        rows: of the grid.
        factor: side of a square; divides rows and columns.
    """
    return rearrange(
        patches,
        "b (row i column j) d -> b (row column) (i j d)",
        row=rows // factor,
        i=factor,
        j=factor,
    )


def _completed(published: Mapping[str, object]) -> PreTrainedConfig:
    """Return the config of a published `config.json`.

    Raises `RecipeError` for types that transformers does not have.
    """
    try:
        fields: dict[str, Any] = dict(published)
        return AutoConfig.for_model(**fields)
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"hf-vision: the installed transformers has no model of type "
            f"{published.get('model_type')!r} ({str(error).splitlines()[0]})"
        ) from None


def _config(architecture: Mapping[str, object]) -> PreTrainedConfig:
    """Return the config of a tower, with the fields that the grid arithmetic needs.

    Raises `RecipeError`.
    """
    if "model_type" not in architecture:
        raise RecipeError(
            "hf-vision: expected a path to published weights, or an architecture with a model_type "
            "(such as dinov2)"
        )
    config = _completed(architecture)
    missing = [
        name
        for name in ("hidden_size", "num_hidden_layers", "patch_size", "num_channels")
        if getattr(config, name, None) is None
    ]
    if missing or hasattr(config, "depths"):
        found = (
            f"its config has no {', '.join(missing)}"
            if missing
            else "each of its stages has another"
        )
        raise RecipeError(
            f"hf-vision: {config.model_type} is not a ViT of one grid of patches: {found}"
        )
    return config


def _tower(config: PreTrainedConfig, *, pooled: bool) -> PreTrainedModel:
    """Return the tower with random weights.

    Raises `RecipeError` for classes that need more than pixels.
    """
    try:
        kind: Any = MODEL_MAPPING[type(config)]
    except KeyError:
        raise RecipeError(
            f"hf-vision: transformers has no vision model of type {config.model_type!r}"
        ) from None
    parameters = inspect.signature(kind.forward).parameters
    known = {"self", "pixel_values", "pixel_attention_mask", "spatial_shapes"}
    needed = {
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    } - known
    if needed or "pixel_values" not in parameters:
        raise RecipeError(
            f"hf-vision does not take {config.model_type}: {kind.__name__} is not run on pixels "
            "alone" + (f" (it needs {', '.join(sorted(needed))})" if needed else "")
        )
    for field in _HEAD_FIELDS:
        if hasattr(config, field):
            setattr(config, field, pooled)
    tower = kind(config, **_pooling_layer(kind, pooled))
    if not isinstance(getattr(tower, "embeddings", None), nn.Module):
        raise RecipeError(
            f"hf-vision does not take {config.model_type}: {kind.__name__} has no embedding of "
            "patches"
        )
    return tower


def _pooling_layer(kind: type[PreTrainedModel], pooled: bool) -> dict[str, bool]:
    takes = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return {"add_pooling_layer": pooled} if takes else {}


def _load(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: dict[str, Tensor],
    *,
    pooled: bool,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return a tower with published tensors, and transformers' loading report.

    The messages of transformers are suppressed.
    """
    options: dict[str, Any] = dict(_pooling_layer(kind, pooled))
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        loaded: Any = kind.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    finally:
        transformers_logging.set_verbosity(level)
    model, report = loaded
    return model, report


def _pair(value: object, *, field: str) -> tuple[int, int]:
    if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)):
        rows, columns = (whole({field: side}, field) for side in value)
        return rows, columns
    side = whole({field: value}, field)
    return side, side


def _patch(config: PreTrainedConfig) -> tuple[int, int]:
    return _pair(getattr(config, "patch_size", None), field="patch_size")


def _side(config: PreTrainedConfig) -> tuple[int, int]:
    """Rows and columns of the images that the positions were learned for."""
    size = getattr(config, "image_size", None)
    if size is not None:
        return _pair(size, field="image_size")
    patches = getattr(config, "num_patches", None)
    if patches is None:
        raise RecipeError(f"hf-vision: the config of {config.model_type} has no image_size")
    rows, columns = _patch(config)
    cells = round(int(patches) ** 0.5)
    return cells * rows, cells * columns


def _published_side(published: Mapping[str, object]) -> int | None:
    """Side of the square that a `preprocessor_config.json` makes; None where it makes none."""
    crop = published.get("do_center_crop")
    size = published.get("crop_size") if crop else published.get("size")
    sides = list(size.values()) if isinstance(size, Mapping) else [size]
    whole_sides = [side for side in sides if isinstance(side, int) and not isinstance(side, bool)]
    if not whole_sides:
        return None
    shorter = published.get("size")
    before = shorter.get("shortest_edge") if isinstance(shorter, Mapping) else shorter
    if crop and isinstance(before, int) and before > min(whole_sides):
        logger.warning(
            "the published preprocessing resizes to %d pixels and crops %d of them; here the "
            "shorter side becomes %d, so that less of the image is cut off",
            before,
            min(whole_sides),
            min(whole_sides),
        )
    return min(whole_sides)


def _published_fit(published: Mapping[str, object]) -> str | None:
    if published.get("do_center_crop"):
        return "crop"
    size = published.get("size")
    if isinstance(size, Mapping) and "shortest_edge" in size and "longest_edge" not in size:
        return "crop"
    return "squash" if size is not None or "do_center_crop" in published else None
