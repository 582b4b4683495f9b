"""Vision encoders: from pixels to tokens on a grid. The table at the end has one line per member.

To add one, write a file with a `VisionEncoder` and a line here. Its options stand above the table
and are torch-free, so that a recipe can be checked without loading model code. They hold the only
description of each option: constructors take the same names and defaults as keywords, and a test
over all registries compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from medm.config import Options
from medm.registry import NamedBlock, Registry

if TYPE_CHECKING:
    from medm.encoders.base import VisionEncoder


VisionTokens: TypeAlias = Literal["patch", "cls_patch", "cls"]
Statistics: TypeAlias = Literal["running", "batch"]
LayerNormAfter: TypeAlias = Literal["none", "plain", "learned"]
NormPlace: TypeAlias = Literal["before", "after"]
PrefixTokens: TypeAlias = Literal["patch", "cls_patch", "prefix_patch", "cls"]


class EncoderOptions(Options):
    """Options of every encoder."""

    name: str
    """Registered name of the encoder."""
    path: str | None = None
    """Published weights: a Hugging Face id, a folder or a file. Default: random weights."""
    architecture: dict[str, Any] = {}
    """Sizes that replace those of the published config, or all of them when there is no `path`."""

    def inner(self) -> EncoderOptions | None:
        """Return the options of the encoder that this one runs, kept as `encoder`, or None."""
        encoder = getattr(self, "encoder", None)
        return encoder if isinstance(encoder, EncoderOptions) else None


class ViTOptions(EncoderOptions):
    """Encoders of the ViT family."""

    layer: int = -1
    """Layer whose output is used: -1 the last, -2 the one before."""
    tokens: VisionTokens = "patch"
    """Tokens of the output: patches, class token and patches, or the class token alone."""
    image_size: int | None = None
    """Side of the square input in pixels; position embeddings are interpolated when it is not the
    published one."""


class TowerOptions(ViTOptions):
    """CLIP and SigLIP."""

    norm: NormPlace = "before"
    """Output of layer -1: `before` the final layer norm (LLaVA), or `after` it."""
    pooled: bool = False
    """Also return the pooled vector of the tower: CLIP's class token after the final norm, SigLIP's
    attention pooling head. Needs layer -1."""


class HFVisionOptions(EncoderOptions):
    """Any ViT of transformers."""

    layer: int = -1
    """Layer whose output is used: -1 the last, -2 the one before."""
    tokens: PrefixTokens = "patch"
    """Tokens of the output: `patch` the patches, `cls_patch` class token and patches,
    `prefix_patch` everything (class token, registers, patches), `cls` the class token alone."""
    norm: NormPlace = "before"
    """Output of layer -1: `before` the final layer norm, or `after` it (transformers'
    `last_hidden_state`)."""
    pooled: bool = False
    """Also return the pooled vector of the tower, if transformers has one. Needs layer -1."""
    pixel_shuffle: int = Field(default=1, ge=1)
    """Side of the square of neighboring patches that become one token of its square times the
    width: InternVL takes 2. Requires `tokens: patch`."""
    image_size: int | None = Field(default=None, ge=1)
    """Side of the square input in pixels. Default: that of the published preprocessing, or of the
    config."""


class EfficientNetLiteOptions(EncoderOptions):
    """The EfficientNet-Lite family."""

    variant: Literal["lite0", "lite1", "lite2", "lite3", "lite4"] = "lite0"
    """Member of the family."""
    stages: list[int] = Field(default=[5, 7], min_length=1)
    """Feature maps that become tokens, joined on the channel axis: 1 to 7 the block stages, 8 the
    head's convolution. Lite0 at 224 pixels: stage 5 is 14x14x112, stage 7 is 7x7x320, stage 8 is
    7x7x1280."""
    pool: int | None = Field(default=None, ge=1)
    """Side of the token grid to which each map is averaged. Default: the grid of the coarsest
    map."""
    statistics: Statistics = "running"
    """Batch norm in training: stored statistics that never change, or those of each batch (needs
    large batches)."""
    image_size: int | None = Field(default=None, ge=1)
    """Side of the square input in pixels. Default: the one that the variant was trained at, 224 to
    300."""

    @model_validator(mode="before")
    @classmethod
    def _size_of_the_variant(cls, value: object) -> object:
        if isinstance(value, Mapping) and value.get("image_size") is None:
            sizes = {"lite1": 240, "lite2": 260, "lite3": 280, "lite4": 300}
            return {**value, "image_size": sizes.get(str(value.get("variant")), 224)}
        return value


class VolumeViTOptions(EncoderOptions):
    """Encoders of the ViT family over volumes."""

    layer: int = -1
    """Layer whose output is used: -1 the last, -2 the one before."""
    tokens: VisionTokens = "patch"
    """Tokens of the output: patches, class token and patches, or the class token alone."""
    image_size: list[int] | None = Field(default=None, min_length=3, max_length=3)
    """Slices, rows and columns of the input; position embeddings are interpolated when it is not
    the published one."""


class M3DCLIPOptions(VolumeViTOptions):
    """The vision tower of M3D-CLIP."""

    norm: NormPlace = "before"
    """Output of layer -1: `before` the last layer norm (MedM-VL), or `after` it (M3D-LaMed)."""


class BatchNormOptions(EncoderOptions):
    """Encoders with batch norm."""

    statistics: Statistics = "running"
    """Batch norm in training: stored statistics that never change, or those of each batch (needs
    large batches)."""


class CNNOptions(BatchNormOptions):
    """ResNet and DenseNet over images."""

    image_size: int | None = Field(default=None, ge=1)
    """Side of the square input in pixels. Default: that of the published preprocessing, or 224."""


class I3DResNetOptions(BatchNormOptions):
    """Inflated ResNet over volumes."""

    image_size: list[int] | None = Field(default=None, min_length=3, max_length=3)
    """Slices, rows and columns of the input. Default: 160, 224, 224."""


class EVACLIPOptions(ViTOptions):
    """EVA-CLIP ViT-g/14."""

    layer: int = -2
    """Layer whose output is used; BLIP-2, MiniGPT-4 and Uni-Med take the one before the last."""
    ln_vision: LayerNormAfter = "plain"
    """Layer norm after the tower: none, one without weights (Uni-Med, MiniGPT-v2), or the learned
    one of BLIP-2 files."""


ENCODERS: Registry[type[VisionEncoder]] = Registry(
    "encoder", group="medm.encoders", options=EncoderOptions
)


class SlicesOptions(EncoderOptions):
    """A 2-D encoder over the slices of a volume. Weights and sizes are those of the inner block."""

    encoder: Annotated[EncoderOptions, NamedBlock(ENCODERS)]
    """The 2-D encoder, by name, and its options."""
    image_size: list[int] | None = Field(default=None, min_length=3, max_length=3)
    """Slices, rows and columns of the input. Default: 32 slices of the inner encoder's size."""

    @model_validator(mode="after")
    def _weights_belong_to_the_inner_block(self) -> SlicesOptions:
        if self.path is not None or self.architecture:
            raise ValueError(
                "path and architecture belong in the inner block: {name: slices, encoder: {name, "
                "path}}"
            )
        return self


ENCODERS.add(
    "clip",
    "medm.encoders.clip:CLIPEncoder",
    "CLIP ViT (OpenAI, LAION, and medical CLIPs in its layout)",
    options=TowerOptions,
)
ENCODERS.add(
    "siglip",
    "medm.encoders.siglip:SiglipEncoder",
    "SigLIP ViT, also SigLIP 2 at fixed resolution; has no class token",
    options=TowerOptions,
)
ENCODERS.add(
    "hf-vision",
    "medm.encoders.hf_vision:HFVisionEncoder",
    "any ViT that transformers opens: SigLIP 2, DINOv2, DINOv3, ViT, AIMv2, InternViT",
    options=HFVisionOptions,
)
ENCODERS.add(
    "internvit",
    "medm.encoders.internvit:InternViTEncoder",
    "InternViT in the layout of InternVL or of transformers (InternVL, Sa2VA, UniBiomed)",
    options=HFVisionOptions,
)
ENCODERS.add(
    "efficientnet-lite",
    "medm.encoders.efficientnet_lite:EfficientNetLiteEncoder",
    "EfficientNet-Lite 0 to 4 (ImageNet CNN): pooled cells of several feature maps",
    options=EfficientNetLiteOptions,
)
ENCODERS.add(
    "resnet",
    "medm.encoders.resnet:ResNetEncoder",
    "ResNet-18 to -152 (microsoft/resnet-101, torch's names): one token per cell",
    options=CNNOptions,
)
ENCODERS.add(
    "densenet",
    "medm.encoders.densenet:DenseNetEncoder",
    "DenseNet-121 and its family (torch's and MONAI's names): one token per cell",
    options=CNNOptions,
)
ENCODERS.add(
    "m3d-clip",
    "medm.encoders.volume_vit:M3DCLIPEncoder",
    "M3D-CLIP's vision tower: ViT over CT volumes of 32 x 256 x 256",
    options=M3DCLIPOptions,
)
ENCODERS.add(
    "medm-clip",
    "medm.encoders.volume_vit:MedMCLIPEncoder",
    "MedM-CLIP's vision tower: post-norm ViT over CT volumes",
    options=VolumeViTOptions,
)
ENCODERS.add(
    "slices",
    "medm.encoders.slices:SlicesEncoder",
    "any 2-D encoder over the slices of a volume (MedM-VL-CT-Chest)",
    options=SlicesOptions,
)
ENCODERS.add(
    "i3d-resnet",
    "medm.encoders.i3d_resnet:I3DResNetEncoder",
    "ResNet-152 inflated to CT volumes (Merlin, Astra)",
    options=I3DResNetOptions,
)
ENCODERS.add(
    "eva-clip",
    "medm.encoders.eva_clip:EVACLIPEncoder",
    "EVA-CLIP ViT-g/14 as in BLIP-2, MiniGPT-4 and Uni-Med",
    options=EVACLIPOptions,
)
ENCODERS.add(
    "vit",
    "medm.encoders.image_vit:ViTEncoder",
    "the original ViT under timm's names (BiomedCLIP)",
    options=ViTOptions,
)
