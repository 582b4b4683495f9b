"""InternViT, the tower of InternVL and of what is built on it (arXiv 2404.16821).

The module is transformers' `InternVLVisionModel`. Published folders come in two layouts: that of
transformers (`-hf`), and that of InternVL's own code (`intern_vit_6b`, alone or as the
`vision_config` of a whole model), which is translated here and never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from medm.encoders import NormPlace, PrefixTokens
from medm.encoders.hf_vision import HFVisionEncoder
from medm.encoders.key_map import map_key
from medm.errors import RecipeError
from medm.types import Config

_MODEL_TYPE = "internvl_vision"
_ORIGINAL_TYPE = "intern_vit_6b"
"""`model_type` of every InternViT in the original layout, whatever its size."""

_300M: Config = {
    "model_type": _MODEL_TYPE,
    "attention_bias": True,
    "hidden_size": 1024,
    "image_size": [448, 448],
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": [14, 14],
}
"""InternViT-300M-448px, without a path."""

_ORIGINAL_DEFAULTS: Config = {
    "hidden_act": "gelu",
    "hidden_size": 3200,
    "image_size": 224,
    "intermediate_size": 12800,
    "layer_norm_eps": 1e-6,
    "norm_type": "rms_norm",
    "num_attention_heads": 25,
    "num_channels": 3,
    "num_hidden_layers": 48,
    "patch_size": 14,
    "qk_normalization": True,
    "qkv_bias": False,
}
"""What a config in the original layout means where it leaves a field out: InternViT-6B."""

_STOCK_FIELDS = {"qk_normalization": "use_qk_norm", "qkv_bias": "attention_bias"}
"""Names of the original layout to those of transformers; the others are the same."""

_STOCK_NAMES = (
    (r"^embeddings\.class_embedding$", "embeddings.cls_token"),
    (r"^embeddings\.position_embedding$", "embeddings.position_embeddings"),
    (r"^embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"^encoder\.layers\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.projection_layer."),
    (r"^encoder\.layers\.(\d+)\.attn\.", r"encoder.layer.\1.attention."),
    (r"^encoder\.layers\.(\d+)\.norm1\.", r"encoder.layer.\1.layernorm_before."),
    (r"^encoder\.layers\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
    (r"^encoder\.layers\.(\d+)\.ls(\d)$", r"encoder.layer.\1.lambda_\2"),
    (r"^encoder\.layers\.(\d+)\.mlp\.", r"encoder.layer.\1.mlp."),
)
_FUSED = ".attention.qkv."


class InternViTEncoder(HFVisionEncoder):
    """InternViT up to the requested layer.

    Args:
        architecture: fields of transformers' `InternVLVisionConfig`.
        others: see `HFVisionOptions`.
    """

    key_map: ClassVar = HFVisionEncoder.key_map

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
        super().__init__(
            architecture={"model_type": _MODEL_TYPE, **architecture},
            layer=layer,
            tokens=tokens,
            norm=norm,
            pooled=pooled,
            pixel_shuffle=pixel_shuffle,
        )

    def rename_published(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map the names of either layout to those of the installed transformers."""
        return super().rename_published(stock_names(tensors)[0])

    @classmethod
    def architecture_from(cls, published: Mapping[str, object]) -> Config:
        """Return the tower's fields in transformers' names; those of 300M without a config.

        Raises:
            RecipeError: the config is of another tower.
        """
        if not published:
            return dict(_300M)
        vision = published.get("vision_config")
        fields = vision if isinstance(vision, Mapping) else published
        kind = fields.get("model_type")
        if kind == _ORIGINAL_TYPE:
            known = {**_ORIGINAL_DEFAULTS, **{k: v for k, v in fields.items() if v is not None}}
            return {
                "model_type": _MODEL_TYPE,
                **{_STOCK_FIELDS.get(key, key): known[key] for key in _ORIGINAL_DEFAULTS},
            }
        if kind != _MODEL_TYPE:
            raise RecipeError(
                f"internvit takes towers of type {_MODEL_TYPE} or {_ORIGINAL_TYPE}, alone or as "
                f"the vision_config of a whole model; found {kind!r}. Other towers: hf-vision"
            )
        return super().architecture_from(published)

    @classmethod
    def preprocess_from(
        cls,
        published: Mapping[str, object],
        architecture: Mapping[str, object],
        image_size: int | None = None,
    ) -> Config:
        """Return the published fields; the whole image is resized to a square or to tiles.

        `preprocessor_config.json` names a center crop, which InternVL's own code never makes.
        """
        fields = super().preprocess_from(published, architecture, image_size)
        return {**fields, "fit": "squash"}


def stock_names(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors under the names of transformers, and the published name of each.

    The fused projection of queries, keys and values is cut into three. Names of another layout
    stay.
    """
    renamed: dict[str, Tensor] = {}
    published: dict[str, str] = {}
    for name, tensor in tensors.items():
        new = map_key(name, _STOCK_NAMES)
        parts = {new: tensor}
        if _FUSED in new:
            parts = {
                new.replace(_FUSED, f".attention.{part}_proj."): piece
                for part, piece in zip("qkv", tensor.chunk(3), strict=True)
            }
        renamed |= parts
        published |= dict.fromkeys(parts, name)
    return renamed, published
