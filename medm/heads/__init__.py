"""Mask heads: pixels and prompts to masks. The table at the end has one line per member.

To add one, write a file with a `MaskHead` and a line here. Its options stand above the table and
are torch-free. A prompt is a vector, such as the projected state of an LLM at `[SEG]`; a head
depends on no data set, token or loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, model_validator

from medm.config import Options
from medm.registry import Registry
from medm.types import MASK_TOKEN

if TYPE_CHECKING:
    from medm.heads.base import MaskHead

FeatureNetwork: TypeAlias = Literal["unet", "segresnet", "swin-unetr"]


class HeadOptions(Options):
    """Options of every mask head."""

    control_tokens: ClassVar[tuple[str, ...]] = (MASK_TOKEN,)
    """Tokens of replies whose states prompt the head."""

    name: str
    """Registered name of the head."""
    path: str | None = None
    """Published weights: a Hugging Face id, a folder or a file. Default: random weights."""
    architecture: dict[str, Any] = {}
    """Sizes that replace those of the published config, or all of them when there is no `path`."""


class DotProductOptions(HeadOptions):
    """Dot product of the prompt with features: of a network of MONAI from scratch, or of a vision
    encoder.
    """

    network: FeatureNetwork = "unet"
    """Network of MONAI that gives the features. `architecture` holds its sizes by MONAI's names,
    beside `dim` (width of a prompt, 64), `features` (32), `in_channels` (1) and `stride` (1: a mask
    as fine as the input)."""
    encoder: dict[str, Any] | None = None
    """Block of a vision encoder, in place of `network`: its patches are the features, which a small
    decoder makes finer. `architecture` then holds `dim` (64), `features` (32) and `upsample` (4:
    cells of the mask per patch along an axis, a power of 2; one number, or one for each axis)."""
    image_size: int | list[int] | None = None
    """Size of the input: one side, or one number for each axis. Default: 256 x 256 for images, 32 x
    128 x 128 for volumes. With `encoder`, its own block gives the size."""

    @model_validator(mode="after")
    def _size_stands_once(self) -> DotProductOptions:
        if self.encoder is not None and self.image_size is not None:
            raise ValueError("image_size: with encoder, write it in the block of the encoder")
        return self


class VISTA3DOptions(HeadOptions):
    """VISTA3D of MONAI (arXiv 2406.05285) with a prompt in place of its class embedding."""

    patch: list[int] | None = Field(default=[128, 128, 128], min_length=3, max_length=3)
    """Voxels of a window: outside of training, a larger volume is read in windows of this size.
    null reads it as a whole, as training always does."""
    overlap: float = Field(default=0.25, ge=0, lt=1)
    """Fraction by which neighboring windows overlap. More is smoother and slower: the authors
    evaluate whole volumes with 0.625, which reads each voxel up to 19 times."""
    image_size: list[int] | None = Field(default=None, min_length=3, max_length=3)
    """Voxels of the input. Default: 128 x 128 x 128."""


Sam2Size: TypeAlias = Literal["tiny", "small", "base_plus", "large", "medsam2"]
Sam2Era: TypeAlias = Literal["2.0", "2.1"]


Sam3Instances: TypeAlias = Literal["union", "best"]


class Sam3Options(HeadOptions):
    """SAM 3, with the prompt in place of the words of a concept."""

    instances: Sam3Instances = "union"
    """Mask of a prompt: the `union` of all instances, by the head for semantic segmentation, or the
    instance of the `best` score."""


class SamOptions(HeadOptions):
    """SAM of 2023, and MedSAM."""

    multimask: bool = True
    """Decode three candidates and take the one of the best predicted IoU; false decodes one mask,
    as MedSAM was trained."""
    padding_points: int = Field(default=0, ge=0)
    """Tokens that stand for no point in front of a prompt without points."""


class Sam2Options(HeadOptions):
    """SAM 2, MedSAM2, and the grounding encoder of UniBiomed and Sa2VA."""

    size: Sam2Size | None = None
    """Encoder: Hiera `tiny`, `small`, `base_plus`, `large`, or `medsam2`, which is `tiny` at 512
    pixels. Needed for a `.pt` file, which has no config. Default: that of the published config,
    else `tiny`."""
    era: Sam2Era | None = None
    """Generation of the weights, of which the memory depends: UniBiomed's are 2.0, MedSAM2's 2.1.
    Weights of the other one are refused. Default: that of the published config, else 2.1."""
    multimask: bool = True
    """Decode three candidates and take the one of the best predicted IoU; false decodes one
    mask."""
    padding_points: int = Field(default=2, ge=0)
    """Tokens that stand for no point in front of a prompt without points; SAM 2 and Sa2VA have
    two."""
    memory: bool = False
    """Also build and load the memory, which carries a mask through the slices of a volume (3-D mode
    `memory`). It is for inference and is not trained."""
    image_size: int | None = Field(default=None, ge=1)
    """Side of the square input in pixels. Positions adapt. Default: the published one, 1024 or
    512."""

    @model_validator(mode="before")
    @classmethod
    def _image_size_of_the_preset(cls, value: object) -> object:
        if not isinstance(value, Mapping) or value.get("size") != "medsam2":
            return value
        return {**value, "image_size": value.get("image_size") or 512}


HEADS: Registry[type[MaskHead]] = Registry("mask head", group="medm.heads", options=HeadOptions)
HEADS.add(
    "dot-product",
    "medm.heads.dot_product:DotProductHead",
    "features of a network of MONAI or of a vision encoder, 2-D or 3-D, compared with the prompt",
    options=DotProductOptions,
)
HEADS.add(
    "vista3d",
    "medm.heads.vista3d:VISTA3DHead",
    "MONAI's VISTA3D for CT volumes, the prompt in place of its class embedding",
    options=VISTA3DOptions,
)
HEADS.add(
    "sam2",
    "medm.heads.sam2:Sam2Head",
    "SAM 2 and MedSAM2, language prompt beside points",
    options=Sam2Options,
)
HEADS.add(
    "sam",
    "medm.heads.sam:SamHead",
    "SAM and MedSAM, language prompt beside points",
    options=SamOptions,
)
HEADS.add(
    "sam3",
    "medm.heads.sam3:Sam3Head",
    "SAM 3, the prompt in place of the words of a concept",
    options=Sam3Options,
)
