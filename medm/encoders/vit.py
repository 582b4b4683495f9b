"""Base class of ViT towers that are modules of transformers."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from medm.encoders import NormPlace, VisionTokens
from medm.encoders.base import VisionEncoder
from medm.encoders.preprocessor_file import published_fields
from medm.encoders.sizes import whole
from medm.errors import RecipeError
from medm.types import Config, VisionFeatures

logger = logging.getLogger(__name__)

_DUAL_ENCODERS = {"clip", "siglip", "siglip2", "metaclip_2", "aimv2", "chinese_clip", "altclip"}
"""Types of published models whose other part is a text encoder, not an LLM."""


def num_blocks(layer: int, *, depth: int, last: bool) -> int:
    """Return the number of blocks up to a layer; the first is 1, the last -1.

    Args:
        layer: as in a recipe.
        depth: blocks of the whole tower.
        last: the layer must be the last one, because the final layer norm was trained on its
            output.

    Raises:
        RecipeError: the tower has no such layer.
    """
    blocks = depth + 1 + layer if layer < 0 else layer
    if not 1 <= blocks <= depth:
        raise RecipeError(
            f"layer {layer}: a tower of {depth} blocks has layers 1 to {depth} and -{depth} to -1"
        )
    if last and blocks != depth:
        raise RecipeError(
            f"norm 'after' and the pooled vector belong to the last of the {depth} blocks, found "
            f"layer {layer}; expected layer -1, or norm 'before' and pooled false"
        )
    return blocks


def is_vlm(published: Mapping[str, object]) -> bool:
    """Return True for the config of a vision-language model, which holds a tower and an LLM."""
    kind = str(published.get("model_type", ""))
    return "vision_config" in published and kind not in _DUAL_ENCODERS


class HFViTEncoder(VisionEncoder):
    """ViT of transformers up to the chosen layer.

    Later blocks are not built: they would cost time and memory, and their parameters would be
    unused.

    Args:
        architecture: fields of the transformers vision config.
        layer: see `ViTOptions`; a positive number counts blocks from the input.
        others: see `TowerOptions`.
    """

    can_drop_patches: ClassVar[bool] = True
    config_class: ClassVar[type[PreTrainedConfig]]
    tower_class: ClassVar[type[PreTrainedModel]]
    has_class_token: ClassVar[bool]
    head_field: ClassVar[str | None] = None
    """Field of the config that builds the pooling head, for towers that have one."""
    truncated_keys: ClassVar = (
        r"^tower\.encoder\.layers\.\d+\.",
        r"^tower\.(post_layernorm|head)\.",
    )

    def __init__(
        self,
        *,
        architecture: Mapping[str, object],
        layer: int = -1,
        tokens: VisionTokens = "patch",
        norm: NormPlace = "before",
        pooled: bool = False,
    ) -> None:
        super().__init__()
        if tokens == "cls" and not self.has_class_token:
            raise RecipeError(
                f"{type(self).__name__} has no class token; expected tokens 'patch' or "
                "'cls_patch', found 'cls'"
            )
        default = self.config_class().num_hidden_layers
        depth = whole({"num_hidden_layers": default, **architecture}, "num_hidden_layers")
        blocks = num_blocks(layer, depth=depth, last=norm == "after" or pooled)
        fields: dict[str, Any] = {**architecture, "num_hidden_layers": blocks}
        if self.head_field is not None:
            fields[self.head_field] = pooled
        config = self.config_class(**fields)
        self.tower: Any = self.tower_class(config)
        # What is not used would be weights without a gradient.
        if norm == "before" and not pooled:
            self.tower.post_layernorm = nn.Identity()
        self.tokens, self.patch_size, self.native_size = (
            tokens,
            int(config.patch_size),
            int(config.image_size),
        )
        self.dim, self.channels = int(config.hidden_size), (int(config.num_channels),)
        self._told_sizes: set[tuple[int, ...]] = set()
        self.prefix = 1 if self.has_class_token and tokens != "patch" else 0
        self.norm, self.pooled_dim = norm, self.dim if pooled else None

    @abstractmethod
    def embed(self, pixels: Tensor, *, interpolate: bool) -> Tensor:
        """Patch and position embeddings, (B, tokens, dim)."""

    def pool(self, hidden: Tensor) -> Tensor:
        """Pooled vector (B, dim) of the last block's output (B, tokens, dim), as published."""
        raise RecipeError(f"{type(self).__name__} gives no pooled vector; expected pooled false")

    def grid(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        if len(spatial) != 2 or min(spatial) < self.patch_size:
            raise ValueError(
                f"expected an image of at least {self.patch_size} pixels a side, found {spatial}"
            )
        if self.tokens == "cls":
            return (0,)
        return tuple(side // self.patch_size for side in spatial)

    def forward(self, pixels: Tensor) -> VisionFeatures:
        spatial = tuple(pixels.shape[2:])
        native = spatial == (self.native_size, self.native_size)
        if not native and spatial not in self._told_sizes:
            self._told_sizes.add(spatial)
            cells = self.native_size // self.patch_size
            wanted = tuple(side // self.patch_size for side in spatial)
            logger.warning(
                "position embeddings of grid %s are interpolated to %s", (cells, cells), wanted
            )
        hidden = self.embed(pixels.to(self.device_and_dtype["dtype"]), interpolate=not native)
        front = int(self.has_class_token)
        hidden = self.sample_patches(hidden, prefix=front)
        grid = self.grid_of(spatial, hidden.shape[1] - front)
        hidden = self.tower.encoder(
            inputs_embeds=hidden
        ).last_hidden_state  # (B, cls + patches, dim)
        pooled = None if self.pooled_dim is None else self.pool(hidden)
        if self.norm == "after":
            hidden = self.tower.post_layernorm(hidden)
        if self.tokens == "cls":
            hidden = hidden[:, :1]
        elif self.has_class_token and self.tokens == "patch":
            hidden = hidden[:, 1:]
        return VisionFeatures(hidden, grid=grid, prefix=self.prefix, pooled=pooled)

    @classmethod
    def architecture_from(cls, published: Mapping[str, object]) -> Config:
        inner = published.get("vision_config")
        vision = inner if isinstance(inner, Mapping) else published
        found = vision.get("model_type", cls.config_class.model_type)
        if is_vlm(published) and found != cls.config_class.model_type:
            raise RecipeError(
                f"its config.json describes a {published.get('model_type')} model with a vision "
                f"tower of type {found!r}; this encoder takes {cls.config_class.model_type!r}, and "
                "'hf-vision' takes any ViT of transformers"
            )
        known = set(cls.config_class().to_dict()) - {
            "model_type",
            "transformers_version",
            "architectures",
            "dtype",
        }
        return {key: value for key, value in vision.items() if key in known}

    @classmethod
    def preprocess_from(
        cls,
        published: Mapping[str, object],
        architecture: Mapping[str, object],
        image_size: int | None = None,
    ) -> Config:
        native = {"image_size": cls.config_class().image_size, **architecture}
        side = image_size or whole(native, "image_size")
        fields: Config = {"kind": "image", "size": [side, side]}
        if "do_center_crop" in published:
            fields["fit"] = "crop" if published["do_center_crop"] else "squash"
        return fields | published_fields(published)
