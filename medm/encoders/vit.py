"""Common ground of ViT towers that are transformers' own modules."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from medm.encoders import VisionTokens
from medm.encoders.base import VisionEncoder
from medm.encoders.sizes import numbers, whole
from medm.errors import RecipeError
from medm.types import Config, VisionFeatures

logger = logging.getLogger(__name__)

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's filter numbers, which `preprocessor_config.json` stores."""


class HFViTEncoder(VisionEncoder):
    """A ViT whose blocks after the chosen layer are not built: they would cost time, memory and
    idle parameters.

    Args:
        architecture: fields of the transformers vision config.
        layer: see `ViTOptions`; a positive number counts blocks from the input.
        others: see `ViTOptions`.
    """

    config_class: ClassVar[type[PreTrainedConfig]]
    tower_class: ClassVar[type[PreTrainedModel]]
    config_defaults: ClassVar[Config] = {}
    has_class_token: ClassVar[bool]
    truncated_keys: ClassVar = (r"^tower\.encoder\.layers\.\d+\.",)

    def __init__(
        self, *, architecture: Mapping[str, object], layer: int = -1, tokens: VisionTokens = "patch"
    ) -> None:
        super().__init__()
        if tokens == "cls" and not self.has_class_token:
            raise RecipeError(
                f"{type(self).__name__} has no class token; expected tokens 'patch' or "
                "'cls_patch', found 'cls'"
            )
        default = self.config_class().num_hidden_layers
        depth = whole({"num_hidden_layers": default, **architecture}, "num_hidden_layers")
        blocks = depth + 1 + layer if layer < 0 else layer
        if not 1 <= blocks <= depth:
            raise RecipeError(
                f"layer {layer}: a tower of {depth} blocks has layers 1 to {depth} and -{depth} "
                "to -1"
            )
        fields: dict[str, Any] = {
            **architecture,
            **self.config_defaults,
            "num_hidden_layers": blocks,
        }
        config = self.config_class(**fields)
        self.tower: Any = self.tower_class(config)
        # Of the whole tower only embedding and blocks are used; the rest would be weights without a
        # gradient.
        for unused in ("post_layernorm", "head"):
            if hasattr(self.tower, unused):
                setattr(self.tower, unused, nn.Identity())
        self.tokens, self.patch_size, self.native_size = (
            tokens,
            int(config.patch_size),
            int(config.image_size),
        )
        self.dim, self.channels = int(config.hidden_size), (int(config.num_channels),)
        self._told_sizes: set[tuple[int, ...]] = set()
        self.prefix = 1 if self.has_class_token and tokens != "patch" else 0

    @abstractmethod
    def embed(self, pixels: Tensor, *, interpolate: bool) -> Tensor:
        """Patch and position embeddings, (B, tokens, dim)."""

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
        hidden = self.tower.encoder(
            inputs_embeds=hidden
        ).last_hidden_state  # (B, cls + patches, dim)
        if self.tokens == "cls":
            hidden = hidden[:, :1]
        elif self.has_class_token and self.tokens == "patch":
            hidden = hidden[:, 1:]
        return VisionFeatures(tokens=hidden, grid=self.grid(spatial), prefix=self.prefix)

    @classmethod
    def architecture_from(cls, published: Mapping[str, object]) -> Config:
        inner = published.get("vision_config")
        vision = inner if isinstance(inner, Mapping) else published
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
        if "resample" in published:
            fields["interpolation"] = _RESAMPLE[whole(published, "resample")]
        if "do_center_crop" in published:
            fields["fit"] = "crop" if published["do_center_crop"] else "squash"
        for own, theirs in (("mean", "image_mean"), ("std", "image_std")):
            if theirs in published:
                fields[own] = numbers(published, theirs)
        return fields
