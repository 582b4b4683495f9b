"""Vision encoders: pixels in, tokens on a grid out. The table at the end has one line a member.

Adding one is a new file with a `VisionEncoder` and a line here; options of its own stand above the table
(they are torch-free, so that a recipe can be checked without loading any model code).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from medm.config import Options
from medm.registry import Registry, named

if TYPE_CHECKING:
    from medm.encoders.base import VisionEncoder


class EncoderOptions(Options):
    """What every encoder block of a recipe may say."""

    name: str
    """Registered name of the encoder."""
    path: str | None = None
    """Published weights: a Hugging Face id, a folder or a file. Without it the encoder starts from random weights."""
    architecture: dict[str, Any] = {}
    """Sizes that replace those of the published config, or all of them when there is no `path`."""


class ViTOptions(EncoderOptions):
    """Encoders of the ViT family."""

    layer: int = -1
    """Layer whose output is used: -1 the last, -2 the one before. Always before the final layer norm."""
    tokens: Literal["patch", "cls_patch", "cls"] = "patch"
    """Which tokens go on: patches, class token and patches, or the class token alone."""
    image_size: int | None = None
    """Side of the square input in pixels; position embeddings are interpolated when it is not the published one."""


class EfficientNetLiteOptions(EncoderOptions):
    """The EfficientNet-Lite family."""

    variant: Literal["lite0", "lite1", "lite2", "lite3", "lite4"] = "lite0"
    """Member of the family."""
    stages: list[int] = Field(default=[5, 7], min_length=1)
    """Feature maps that become tokens, joined on the channel axis: 1 to 7 the block stages, 8 the head's convolution."""
    pool: int | None = Field(default=None, ge=1)
    """Side of the token grid to which each map is averaged; without it, the grid of the coarsest map."""
    statistics: Literal["running", "batch"] = "running"
    """Batch norm in training: stored statistics that never change, or those of each batch (needs large batches)."""
    image_size: int | None = Field(default=None, ge=1)
    """Side of the square input in pixels; without it the one that the variant was trained at: 224 to 300."""

    @model_validator(mode="before")
    @classmethod
    def _size_of_the_variant(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("image_size") is None:
            sizes = {"lite1": 240, "lite2": 260, "lite3": 280, "lite4": 300}
            return {**value, "image_size": sizes.get(str(value.get("variant")), 224)}
        return value


class VolumeViTOptions(EncoderOptions):
    """Encoders of the ViT family over volumes."""

    layer: int = -1
    """Layer whose output is used: -1 the last, -2 the one before."""
    tokens: Literal["patch", "cls_patch", "cls"] = "patch"
    """Which tokens go on: patches, class token and patches, or the class token alone."""
    image_size: list[int] | None = Field(default=None, min_length=3, max_length=3)
    """Slices, rows and columns of the input; position embeddings are interpolated when it is not the published one."""


class M3DCLIPOptions(VolumeViTOptions):
    """The vision tower of M3D-CLIP."""

    norm: Literal["before", "after"] = "before"
    """What layer -1 means: "before" the last layer norm (MedM-VL), or "after" it (M3D-LaMed)."""


class I3DResNetOptions(EncoderOptions):
    """Inflated ResNet over volumes."""

    statistics: Literal["running", "batch"] = "running"
    """Batch norm in training: stored statistics that never change, or those of each batch (needs large batches)."""
    image_size: list[int] | None = Field(default=None, min_length=3, max_length=3)
    """Slices, rows and columns of the input; 160, 224, 224 without it."""


class EVACLIPOptions(ViTOptions):
    """EVA-CLIP ViT-g/14."""

    layer: int = -2
    """Layer whose output is used; BLIP-2, MiniGPT-4 and Uni-Med take the one before the last."""
    ln_vision: Literal["none", "plain", "learned"] = "plain"
    """The layer norm behind the tower: none, one without weights (Uni-Med), or the learned one of BLIP-2 files."""


ENCODERS: Registry[type[VisionEncoder]] = Registry("encoder", group="medm.encoders", options=EncoderOptions)


class SlicesOptions(EncoderOptions):
    """A 2-D encoder over the slices of a volume. Weights and sizes are those of the inner block."""

    encoder: named(ENCODERS)  # type: ignore[valid-type]
    """The 2-D encoder, by name, and its options."""
    image_size: list[int] | None = Field(default=None, min_length=3, max_length=3)
    """Slices, rows and columns of the input; without it 32 slices of the inner encoder's size."""

    @model_validator(mode="after")
    def _weights_belong_to_the_inner_block(self) -> SlicesOptions:
        if self.path is not None or self.architecture:
            raise ValueError("path and architecture belong in the inner block: {name: slices, encoder: {name, path}}")
        return self


ENCODERS.add(
    "clip",
    "medm.encoders.clip:CLIPEncoder",
    "CLIP ViT (OpenAI, LAION, and medical CLIPs in its layout)",
    options=ViTOptions,
)
ENCODERS.add(
    "siglip",
    "medm.encoders.siglip:SiglipEncoder",
    "SigLIP ViT, also SigLIP 2 at fixed resolution; has no class token",
    options=ViTOptions,
)
ENCODERS.add(
    "efficientnet-lite",
    "medm.encoders.efficientnet_lite:EfficientNetLiteEncoder",
    "EfficientNet-Lite 0 to 4 (ImageNet CNN): pooled cells of several feature maps",
    options=EfficientNetLiteOptions,
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
