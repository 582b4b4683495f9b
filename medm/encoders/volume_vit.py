"""Vision towers of M3D-CLIP (arXiv 2404.00578) and MedM-CLIP (MedM-VL, arXiv 2504.04323).

ViTs over CT volumes, without the text encoders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import ClassVar

from einops.layers.torch import Rearrange
from torch import nn

from medm.encoders import VisionTokens
from medm.encoders.plain_vit import PlainViT
from medm.encoders.sizes import wholes
from medm.types import Config

PUBLISHED_SIZES: Config = {
    "image_size": [32, 256, 256], "patch_size": [4, 16, 16], "num_channels": 1, "hidden_size": 768,
    "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
}  # fmt: skip


class M3DCLIPEncoder(PlainViT):
    """The vision tower of M3D-CLIP: pre-norm blocks, and a class token without a position.

    Layer -1 has two published meanings: M3D-LaMed takes it after the last layer norm
    (`norm="after"`), MedM-VL before (`norm="before"`). Reads the whole CLIP (`vision_encoder.`) and
    the tower alone (`pretrained_ViT.bin`).
    """

    axes: ClassVar[int] = 3
    key_map: ClassVar = (
        (r"^(?:vision_encoder\.)?patch_embedding\.patch_embeddings\.1\.", "patches.1."),
        (r"^(?:vision_encoder\.)?patch_embedding\.position_embeddings$", "positions"),
        (r"^(?:vision_encoder\.)?cls_token$", "cls_token"),
        (r"^(?:vision_encoder\.)?blocks\.(\d+)\.attn\.qkv\.", r"blocks.\1.attention.qkv."),
        (r"^(?:vision_encoder\.)?blocks\.(\d+)\.attn\.out_proj\.", r"blocks.\1.attention.out."),
        (r"^(?:vision_encoder\.)?blocks\.(\d+)\.mlp\.linear1\.", r"blocks.\1.up."),
        (r"^(?:vision_encoder\.)?blocks\.(\d+)\.mlp\.linear2\.", r"blocks.\1.down."),
        (r"^(?:vision_encoder\.)?blocks\.(\d+)\.(norm[12])\.", r"blocks.\1.\2."),
        (r"^(?:vision_encoder\.)?norm\.", "norm."),
    )
    ignored_keys: ClassVar = (
        r"^(language_encoder|mm_vision_proj|mm_language_proj)\.",
        r"^logit_scale$",
    )

    published_sizes: ClassVar = PUBLISHED_SIZES
    published_names: ClassVar = {
        "image_size": "img_size",
        "num_channels": "in_channels",
        "intermediate_size": "mlp_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
    }
    block_bias: ClassVar = "none"
    class_token_has_position: ClassVar[bool] = False
    interpolation: ClassVar = "trilinear"

    def embedding(self, channels: int) -> nn.Module:
        """One linear layer on the voxels of a patch, the channel fastest."""
        depth, height, width = self.patch_size
        return nn.Sequential(
            Rearrange("b c (d p) (h q) (w r) -> b (d h w) (p q r c)", p=depth, q=height, r=width),
            nn.Linear(prod(self.patch_size) * channels, self.dim),
        )

    @classmethod
    def preprocess_from(
        cls,
        published: Mapping[str, object],
        architecture: Mapping[str, object],
        image_size: int | Sequence[int] | None = None,
    ) -> Config:
        """Return HU -1000..1000 to 0..1, as in MedM-VL.

        M3D's own arrays of 0..1 need `convention: m3d` in the recipe.
        """
        return {"convention": "medm-vl", "size": volume_size(image_size, architecture)}


class MedMCLIPEncoder(PlainViT):
    """Vision tower of MedM-CLIP.

    Post-norm blocks with ReLU, layer norms around the patch layer.
    """

    axes: ClassVar[int] = 3
    key_map: ClassVar = (
        (r"^(?:vision_encoder\.)?to_patch_embedding\.", "patches."),
        (r"^(?:vision_encoder\.)?pos_embedding$", "positions"),
        (r"^(?:vision_encoder\.)?cls_token$", "cls_token"),
        (
            r"^(?:vision_encoder\.)?transformer_layers\.(\d+)\.self_attn\.in_proj_",
            r"blocks.\1.attention.qkv.",
        ),
        (
            r"^(?:vision_encoder\.)?transformer_layers\.(\d+)\.self_attn\.out_proj\.",
            r"blocks.\1.attention.out.",
        ),
        (r"^(?:vision_encoder\.)?transformer_layers\.(\d+)\.linear1\.", r"blocks.\1.up."),
        (r"^(?:vision_encoder\.)?transformer_layers\.(\d+)\.linear2\.", r"blocks.\1.down."),
        (r"^(?:vision_encoder\.)?transformer_layers\.(\d+)\.(norm[12])\.", r"blocks.\1.\2."),
    )
    ignored_keys: ClassVar = (
        r"^text_encoder\.",
        r"^(vision_encoder\.)?mlp_head\.",
        r"^logit_scale$",
    )

    published_sizes: ClassVar = PUBLISHED_SIZES
    block_norm: ClassVar = "post"
    block_activation: ClassVar[str] = "relu"
    class_token_has_position: ClassVar[bool] = True
    interpolation: ClassVar = "trilinear"

    def __init__(
        self, *, architecture: Mapping[str, object], layer: int = -1, tokens: VisionTokens = "patch"
    ) -> None:
        super().__init__(architecture=architecture, layer=layer, tokens=tokens)

    def embedding(self, channels: int) -> nn.Module:
        """Layer norm, linear layer, layer norm on the voxels of a patch.

        Voxels are in the order rows, columns, slices, then channels.
        """
        depth, height, width = self.patch_size
        voxels = prod(self.patch_size) * channels
        return nn.Sequential(
            Rearrange("b c (d p) (h q) (w r) -> b (d h w) (q r p c)", p=depth, q=height, r=width),
            nn.LayerNorm(voxels, eps=self.eps),
            nn.Linear(voxels, self.dim),
            nn.LayerNorm(self.dim, eps=self.eps),
        )

    @classmethod
    def architecture_from(cls, published: Mapping[str, object]) -> Config:
        """Own size names; the published config keeps slices apart from rows and columns."""
        names = {
            "hidden_size": "hidden_size",
            "intermediate_size": "image_mlp_dim",
            "num_hidden_layers": "image_num_layers",
            "num_attention_heads": "image_num_heads",
        }
        sizes = {own: published[theirs] for own, theirs in names.items() if theirs in published}
        for own, slices, side in (
            ("image_size", "frame_size", "image_size"),
            ("patch_size", "frame_patch_size", "image_patch_size"),
        ):
            if slices in published and side in published:
                sizes[own] = [published[slices], published[side], published[side]]
        return sizes

    @classmethod
    def preprocess_from(
        cls,
        published: Mapping[str, object],
        architecture: Mapping[str, object],
        image_size: int | Sequence[int] | None = None,
    ) -> Config:
        """HU -1000..1000, then the mean and deviation that the tower was trained with."""
        return {"convention": "medm-clip", "size": volume_size(image_size, architecture)}


def volume_size(
    image_size: int | Sequence[int] | None, architecture: Mapping[str, object]
) -> list[int]:
    """Return slices, rows and columns of the input.

    A single number gives rows and columns; the number of slices is the published one.
    """
    native = wholes({**PUBLISHED_SIZES, **architecture}, "image_size")
    if image_size is None:
        return native
    return [native[0], image_size, image_size] if isinstance(image_size, int) else list(image_size)
